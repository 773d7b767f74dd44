"""Batches of two sets side by side: a subject's few pictures beside others of its kind.

Reference: Ruiz et al., 2022, DreamBooth, arXiv:2208.12242, section 3.2 (prior preservation).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor

from cascade.errors import UserError
from train.data.cached import CachedBatch
from train.data.config import DataConfig


@dataclass(frozen=True)
class PriorConfig:
    """Pictures that keep the network from forgetting what the subject is one of."""

    shards: str
    """Their shards, as in ``data.shards``; make pictures with sample.py, and shards of them with
    ``python -m train.data write``."""
    folder: str | None = None
    """Their cache, if the run's data are in memory."""
    batch_size: int | None = None
    """Of them in each step; null: as many as of the run's own."""
    weight: float = 1.0
    """How much their loss counts beside the run's own (1 as published)."""

    def __post_init__(self) -> None:
        """Refuse what keeps nothing."""
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; at least 1 is needed")
        if not self.weight > 0:
            raise ValueError(f"weight is {self.weight}; it must be positive")

    def data(self, own: DataConfig) -> DataConfig:
        """Return how they are served, given how the run's own are."""
        return replace(
            own,
            shards=self.shards,
            folder=self.folder,
            batch_size=self.batch_size or own.batch_size,
            mix=(),  # theirs alone
        )


class PairedLoader:
    """Joins each batch of one loader with one of another."""

    def __init__(
        self, own: Iterable[CachedBatch], prior: Iterable[CachedBatch], weight: float
    ) -> None:
        """Take both loaders, and how much the second one's samples count."""
        self.own = own
        self.prior = prior
        self.weight = weight

    def __iter__(self) -> Iterator[CachedBatch]:
        """Yield the joined batches."""
        for own, prior in zip(self.own, self.prior, strict=False):
            yield joined(own, prior, self.weight)


def joined(own: CachedBatch, prior: CachedBatch, weight: float) -> CachedBatch:
    """Return one batch whose mean loss is the first one's plus ``weight`` times the second one's.

    Raises:
        UserError: They hold different parts, or pictures of different sizes.
    """
    count = len(own) + len(prior)
    both = CachedBatch(
        captions=[*own.captions, *prior.captions],
        groups=torch.cat([own.groups, prior.groups]),
        loss_weights=torch.cat(
            [
                torch.full((len(own),), count / len(own)),
                torch.full((len(prior),), weight * count / len(prior)),
            ]
        ),
    )
    if own.keys is not None and prior.keys is not None:
        both.keys = [*own.keys, *prior.keys]
    if own.lost is not None or prior.lost is not None:
        both.lost = dict(Counter(own.lost) + Counter(prior.lost))
    for field in fields(CachedBatch):
        if getattr(both, field.name) is not None:
            continue
        one, other = getattr(own, field.name), getattr(prior, field.name)
        if (one is None) != (other is None):
            raise UserError(
                f"prior: its batches and those of data do not both have {field.name}; serve both "
                "in the same way"
            )
        if one is None:
            continue
        if one.shape[1:] != other.shape[1:]:
            raise UserError(
                f"prior: its {field.name} is {tuple(other.shape[1:])}, that of data "
                f"{tuple(one.shape[1:])}; both need pictures of one size"
            )
        setattr(both, field.name, torch.cat(cast("list[Tensor]", [one, other])))
    return both
