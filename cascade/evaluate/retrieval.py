"""Prompt agreement: does a yardstick find a picture's own prompt among other prompts?

For each picture the true prompt stands among distractors; the yardstick's similarity ranks them.
The share of pictures whose prompt comes first, or in the first five, is the agreement. Everything
here works on embeddings, so any yardstick with a picture and a text tower will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import UserError


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a proportion."""

    low: float
    high: float


@dataclass(frozen=True)
class HitRate:
    """How many of a number of trials succeeded, and how sure that makes one."""

    hits: int
    trials: int
    interval: Interval

    @property
    def rate(self) -> float:
        """Hits as a fraction of the trials."""
        return self.hits / self.trials


@dataclass(frozen=True)
class Agreement:
    """How often the true prompt came first, and in the first five."""

    top_1: HitRate
    top_5: HitRate


def wilson_interval(hits: int, trials: int, z: float = 1.959964) -> Interval:
    """Return the score interval of a proportion.

    Unlike the normal approximation it stays inside ``[0, 1]`` and has a width at 0 and at 1.

    Args:
        hits: Successes, at most ``trials``.
        trials: At least 1.
        z: Quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: If the counts are impossible.

    Reference: Wilson, 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits of {trials} trials have no interval")
    rate = hits / trials
    scale = 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2)) / scale
    # The bounds at 0 and at all hits are exactly 0 and 1; rounding must not say otherwise.
    return Interval(
        low=0.0 if hits == 0 else centre - half, high=1.0 if hits == trials else centre + half
    )


def draw_candidates(
    queries: Sequence[int],
    captions: Sequence[str],
    identities: Sequence[str],
    num_candidates: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw, for each query, its own caption and distractors that are about something else.

    No two candidates of a query share a caption or an identity, so no candidate but the first is
    right by construction.

    Args:
        queries: Indices into the pool.
        captions: The pool's captions, length ``M``.
        identities: What each caption is about (name and style, say), length ``M``; rows of one
            identity are wordings or pictures of the same thing.
        num_candidates: The true caption and the distractors together.
        generator: Source of the draw, on the CPU.

    Returns:
        ``(len(queries), num_candidates)`` indices into the pool; the true one is in column 0.

    Raises:
        UserError: If the pool has too few different captions.
    """
    rows: list[list[int]] = []
    for query in queries:
        row, seen_captions, seen_identities = [query], {captions[query]}, {identities[query]}
        for index in torch.randperm(len(captions), generator=generator).tolist():
            if len(row) == num_candidates:
                break
            if captions[index] in seen_captions or identities[index] in seen_identities:
                continue
            row.append(index)
            seen_captions.add(captions[index])
            seen_identities.add(identities[index])
        if len(row) < num_candidates:
            raise UserError(
                f"only {len(row)} of {num_candidates} candidates differ from each other and from "
                f"{captions[query]!r}; give a larger pool of captions or ask for fewer candidates"
            )
        rows.append(row)
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), num_candidates)


def true_ranks(pictures: Tensor, prompts: Tensor, candidates: Tensor) -> Tensor:
    """Rank each picture's true prompt among its candidates by cosine similarity.

    A tie counts against the prompt, so a yardstick that has collapsed ranks last, not first.

    Args:
        pictures: ``(N, D)`` embeddings, any length.
        prompts: ``(M, D)`` embeddings of the pool.
        candidates: ``(N, K)`` indices into the pool, the true one in column 0.

    Returns:
        ``(N,)`` ranks, 1 is first.

    Raises:
        ValueError: If an embedding is not finite, or the counts differ.
    """
    if len(pictures) != len(candidates):
        raise ValueError(f"{len(pictures)} pictures but {len(candidates)} rows of candidates")
    if not (pictures.isfinite().all() and prompts.isfinite().all()):
        raise ValueError("an embedding is not finite: the yardstick or a picture is broken")
    pictures = torch.nn.functional.normalize(pictures.double(), dim=1)
    prompts = torch.nn.functional.normalize(prompts.double(), dim=1)
    scores = torch.einsum("nd,nkd->nk", pictures, prompts[candidates])
    return 1 + (scores[:, 1:] >= scores[:, :1]).sum(dim=1)


def agreement(ranks: Tensor) -> Agreement:
    """Count ranks of 1 and of 5 or better, with 95 % intervals."""
    return Agreement(top_1=_hit_rate(ranks, 1), top_5=_hit_rate(ranks, 5))


def _hit_rate(ranks: Tensor, worst: int) -> HitRate:
    hits, trials = int((ranks <= worst).sum()), len(ranks)
    return HitRate(hits, trials, wilson_interval(hits, trials))


def derangement(count: int, generator: torch.Generator) -> Tensor:
    """Return a random permutation of ``count`` things that leaves none in its place.

    Raises:
        ValueError: If ``count`` is 1 or less: there is no such permutation.
    """
    if count < 2:
        raise ValueError(f"{count} pictures cannot be shuffled so that none keeps its prompt")
    # One cycle through all things in random order: each goes to the place of the next.
    order = torch.randperm(count, generator=generator)
    shuffled = torch.empty(count, dtype=torch.long)
    shuffled[order] = order.roll(1)
    return shuffled
