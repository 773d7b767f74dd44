"""Several sets in one run: which rows of a step come from which, by weight.

The sources of a step's rows are a function of (seed, step) and the same on all ranks: each set has
its share of the global batch, rounded up or down so that in the long run it is the weight, in an
order that is drawn anew. Each set keeps a series of its own, with its own shards, cache and
filters, and gives the next of it; in memory and in exact mode that is every sample once an epoch of
the set's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from cascade.errors import UserError
from train.data.cached import Cache, CachedBatch, Pictures, group_of, place_batch
from train.data.config import DataConfig
from train.data.loader import StepSource
from train.data.read import Served
from train.data.resampled import StepRows
from train.draws import derived_seed

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Mixture:
    """Whose the rows of a step are."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    batch_size: int
    """Rows of a rank."""
    seed: int

    @classmethod
    def of(cls, config: DataConfig) -> Mixture:
        """Return a run's: its own set's weight is 1."""
        names = ("own", *(one.name for one in config.mix))
        weights = (1.0, *(one.weight for one in config.mix))
        return cls(names, weights, config.batch_size, config.seed)

    @property
    def shares(self) -> np.ndarray:
        """Share of each set, ``(sets,)``; they sum to 1."""
        weights = np.array(self.weights)
        return weights / weights.sum()

    def counts(self, steps: np.ndarray, world: int) -> np.ndarray:
        """Return the rows of each set in steps over all ranks, ``(len(steps), sets)``.

        Systematic sampling: a step's rows lie at equal distances on a line of which each set has
        its share, and where the first lies moves on by the golden ratio from step to step.
        """
        size = self.batch_size * world
        phase = (derived_seed("mix", self.seed, 0) / 2**63 + steps * _GOLDEN) % 1.0
        edges = np.concatenate([[0.0], np.cumsum(self.shares)[:-1], [1.0]]) * size
        rows: np.ndarray = np.diff(np.ceil(edges - phase[:, None]), axis=1).astype(int)
        return rows

    def sources(self, step: int, world: int) -> np.ndarray:
        """Return the set of each row of a step, over all ranks, ``(batch_size * world,)``."""
        draw = np.random.default_rng(derived_seed("mix", self.seed, step + 1))
        [counts] = self.counts(np.array([step]), world)
        return draw.permutation(np.repeat(np.arange(len(counts)), counts))

    def of_rank(self, step: int, rank: int, world: int) -> np.ndarray:
        """Return the set of each row of one rank, ``(batch_size,)``."""
        first = rank * self.batch_size
        return self.sources(step, world)[first : first + self.batch_size]

    def drawn(self, step: int, world: int) -> dict[str, int]:
        """Return how many rows of a step are each set's."""
        [counts] = self.counts(np.array([step]), world)
        return dict(zip(self.names, counts.tolist(), strict=True))


@dataclass(frozen=True)
class MixedRows(StepRows):
    """What each step takes of one set of a mixture; its shapes are those of all sets."""

    mixture: Mixture
    number: int
    """Of the set."""
    rank: int
    world: int

    @property
    def mean_count(self) -> float:
        """Samples of a step in the long run."""
        return self.batch_size * float(self.mixture.shares[self.number])

    def count(self, step: int) -> int:
        """Return the samples of a step."""
        owners = self.mixture.of_rank(step, self.rank, self.world)
        return int((owners == self.number).sum())

    def before(self, step: int) -> int:
        """Return the samples that the ranks before this one take of a step."""
        owners = self.mixture.sources(step, self.world)[: self.rank * self.batch_size]
        return int((owners == self.number).sum())

    def taken(self, first: int, last: int) -> int:
        """Return the samples of the steps from one to before another, on all ranks."""
        return int(self.mixture.counts(np.arange(first, last), self.world)[:, self.number].sum())


class MixedSource(StepSource):
    """The batches of one rank, from several streams."""

    def __init__(
        self, sources: Sequence[StepSource], mixture: Mixture, *, rank: int, world: int
    ) -> None:
        """Take the streams, in the order of the mixture's names."""
        self.sources = sources
        self.mixture = mixture
        self.rank = rank
        self.world = world

    def serve(self, step: int) -> Served:
        """Return the batch of a step."""
        owners = self.mixture.of_rank(step, self.rank, self.world)
        served = Served(CachedBatch([], torch.zeros(0)))
        batches, rows = [], []
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(owners == number)
            if len(mine):
                given = source.serve(step)
                served.broken += given.broken
                served.left_out += given.left_out
                batches.append(given.batch)
                rows.append(mine)
        served.batch = in_places(batches, np.concatenate(rows))
        served.batch.drawn = self.mixture.drawn(step, self.world)
        return served


class _MixedBatches(IterableDataset[CachedBatch]):
    """The same from sets in memory."""

    def __init__(
        self,
        caches: Sequence[Cache],
        config: DataConfig,
        start_step: int,
        rank: int,
        world: int,
    ) -> None:
        # In memory, captions are numbered within a set; here they are compared over all.
        self.caches = [replace(cache, pictures=_renumbered(cache.pictures)) for cache in caches]
        self.mixture = Mixture.of(config)
        self.seeds = [set_seed(config, number) for number in range(len(caches))]
        self.start_step = start_step
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[CachedBatch]:
        step, size = self.start_step, self.mixture.batch_size
        used = self.mixture.counts(np.arange(step), self.world).sum(axis=0)
        mine = slice(self.rank * size, (self.rank + 1) * size)
        while True:
            owners = self.mixture.sources(step, self.world)
            batches, rows = [], []
            for number, cache in enumerate(self.caches):
                own = owners == number
                place = used[number] + np.cumsum(own) - 1  # in the set's series
                if own[mine].any():
                    places = place[mine][own[mine]].tolist()
                    batches.append(place_batch(cache, self.seeds[number], places))
                    rows.append(np.flatnonzero(own[mine]))
                used[number] += own.sum()
            batch = in_places(batches, np.concatenate(rows))
            batch.drawn = self.mixture.drawn(step, self.world)
            yield batch
            step += 1


def _renumbered(pictures: Pictures) -> Pictures:
    groups = torch.tensor([group_of(captions) for captions in pictures.captions])
    return replace(pictures, groups=groups)


def mixed_loader(
    caches: Sequence[Cache], config: DataConfig, *, start_step: int, rank: int, world: int
) -> DataLoader[CachedBatch]:
    """Return an endless loader of sets in memory; it starts with the batch of ``start_step``."""
    return DataLoader(_MixedBatches(caches, config, start_step, rank, world), batch_size=None)


def set_seed(config: DataConfig, number: int) -> int:
    """Return the seed of a set's own series; the first is the run's."""
    return config.seed if number == 0 else derived_seed("mix", config.seed, -number)


def in_places(batches: Sequence[CachedBatch], rows: np.ndarray) -> CachedBatch:
    """Return one batch of several.

    Args:
        batches: Of several sets.
        rows: Where each of their rows comes to stand, one batch after the other.

    Raises:
        UserError: They hold different parts, or pictures of different sizes.
    """
    order = np.argsort(rows)
    places = torch.from_numpy(order)
    captions = [caption for batch in batches for caption in batch.captions]
    whole = CachedBatch(
        captions=[captions[place] for place in order],
        groups=torch.cat([batch.groups for batch in batches])[places],
    )
    keys = [key for batch in batches for key in batch.keys or ()]
    if keys:
        whole.keys = [keys[place] for place in order]
    for field in fields(CachedBatch):
        if field.name in ("captions", "groups", "keys", "drawn", "lost"):
            continue
        tensors = [getattr(batch, field.name) for batch in batches]
        there: list[Tensor] = [tensor for tensor in tensors if tensor is not None]
        if not there:
            continue
        shapes = {tuple(tensor.shape[1:]) for tensor in there}
        if len(there) < len(tensors) or len(shapes) > 1:
            found = ", ".join(map(str, sorted(shapes)))
            raise UserError(
                f"data.mix: {field.name} of its sets is of several sizes or not in all of them "
                f"({found}); all need pictures of one size, cached in one way"
            )
        setattr(whole, field.name, torch.cat(there)[places])
    return whole
