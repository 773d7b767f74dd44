"""What a stage computes once for all sampling steps, beside its condition: see ``at_times``.

The text does not change from step to step, and so neither do the keys and values that each block
asks of it; the times of all steps are known before the first one, and so are all modulations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from stages.embeddings import time_embedding
from stages.layers import AttnBlock, KeysValues, Modulation, TimestepBlock

Told = Tensor | KeysValues | None
"""The condition's tokens, (B, M, C_cond), or what a block asks of them; None: it asks nothing."""

Time = Tensor | Modulation
"""Embeddings, (B, 1 + num_extra, time_channels), or what a block does with them."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What every stage keeps of a condition for its blocks, each as often as it runs, in order."""

    asked: tuple[KeysValues | None, ...] | None = None
    """What each block asks of the condition's tokens; None: it asks in every pass."""
    modulations: tuple[Modulation, ...] | None = None
    """What each block does at one time; None: any time can be told."""


P = TypeVar("P", bound=Prepared)


def embed_times(times: Tensor, extra_embeddings: Tensor, time_channels: int) -> Tensor:
    """Embed times and join what is told beside them: ``(B, 1 + num_extra, time_channels)``.

    Args:
        times: ``(B,)``, float32.
        extra_embeddings: ``(B, num_extra, time_channels)``, or one row for all.
        time_channels: Size of the time's embedding.
    """
    embedded = time_embedding(times, time_channels)[:, None]
    return torch.cat([embedded, extra_embeddings.expand(len(times), -1, -1)], dim=1)


def keys_values(
    attentions: Sequence[AttnBlock | None], tokens: Tensor
) -> tuple[KeysValues | None, ...]:
    """Return what each attention asks of ``tokens``, ``(B, M, C_cond)``; None where there is none.

    Attentions that occur more than once are asked once.
    """
    known: dict[AttnBlock, KeysValues] = {}
    for attention in attentions:
        if attention is not None and attention not in known:
            known[attention] = attention.keys_values(tokens)
    return tuple(None if attention is None else known[attention] for attention in attentions)


def modulations(
    blocks: Sequence[TimestepBlock],
    times: Tensor,
    extra_embeddings: Tensor,
    time_channels: int,
) -> list[tuple[Modulation, ...]]:
    """Return what each block does at each time: by time, then by block.

    Args:
        blocks: The blocks in running order; one that occurs more than once is asked once.
        times: ``(S,)``, float32, as the network embeds them.
        extra_embeddings: ``(B, num_extra, time_channels)``, or one row if all B are told the same.
        time_channels: Size of the time's embedding.
    """
    embedded = time_embedding(times, time_channels)  # (S, time_channels)
    count, extras = len(extra_embeddings), extra_embeddings.shape[1:]
    rows = torch.cat(
        [
            embedded[:, None, None].expand(-1, count, -1, -1),
            extra_embeddings[None].expand(len(times), -1, *extras),
        ],
        dim=2,
    ).flatten(0, 1)  # (S * B, 1 + num_extra, time_channels)
    known: dict[TimestepBlock, Modulation] = {}
    for block in blocks:
        if block not in known:
            known[block] = block.modulation(rows)
    return [
        tuple(
            Modulation(known[block].factor[at : at + count], known[block].shift[at : at + count])
            for block in blocks
        )
        for at in range(0, len(rows), count)
    ]


def at_times(
    blocks: Sequence[TimestepBlock],
    prepared: P,
    times: Tensor,
    extra_embeddings: Tensor,
    time_channels: int,
) -> list[P]:
    """Return a prepared condition at each time; other arguments are those of ``modulations``."""
    rows = modulations(blocks, times, extra_embeddings, time_channels)
    return [replace(prepared, modulations=row) for row in rows]


def block_inputs(
    prepared: Prepared,
    tokens: Tensor,
    times: Tensor,
    extra_embeddings: Tensor,
    time_channels: int,
    count: int,
) -> Iterator[tuple[Time, Told]]:
    """Give each of ``count`` blocks what it is told of the time and of the condition.

    Args:
        prepared: What was computed before; the other arguments stand in for what was not.
        tokens: The condition's, ``(B, M, C_cond)``.
        times: ``(B,)``, float32, as the network embeds them.
        extra_embeddings: See ``embed_times``.
        time_channels: Size of the time's embedding.
        count: Blocks that run.
    """
    known: Sequence[Time] | None = prepared.modulations
    if known is None:
        known = [embed_times(times, extra_embeddings, time_channels)] * count
    return zip(known, prepared.asked or [tokens] * count, strict=True)
