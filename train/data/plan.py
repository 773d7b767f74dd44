"""Exact mode's order: which samples make which batch, a function of (seed, epoch, set) alone.

Shards are shuffled, then the samples within each window of so many shards, so that reading stays
local. Walking through that order, each sample joins the queue of its shape; a queue that holds a
batch for every rank is a step. So every step has one shape, on all ranks, and every sample is seen
once an epoch.

What the queues hold in the end is less than a step each. Pictures are joined with those of the next
ratio until they make full steps, and are cropped to the shape that most of them have; the last step
may be smaller. Cached latents can't be cropped: each shape then has one smaller last step. Where
the samples of a smaller step can't be shared out equally, at most ``ranks - 1`` of them are seen
twice. ``describe`` says how many of each there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from train.draws import derived_seed


@dataclass(frozen=True)
class Step:
    """The samples of one step over all ranks."""

    bucket: int
    samples: np.ndarray
    """Numbers of samples in the whole set; a multiple of the ranks."""

    def of_rank(self, rank: int, world: int) -> np.ndarray:
        """Return one rank's share."""
        share = len(self.samples) // world
        return self.samples[rank * share : (rank + 1) * share]


@dataclass(frozen=True)
class ExactPlan:
    """The order of a set's samples over steps, epochs and ranks."""

    numbers: np.ndarray
    """The shape of each sample, -1 for those left out; ``(N,)``."""
    starts: np.ndarray
    """Where each shard's samples begin among all, and N; ``(shards + 1,)``."""
    batch_size: int
    world: int
    seed: int
    window: int
    """Shards that are shuffled together."""
    croppable: bool = True
    """Whether a sample can take another shape than its own."""

    @property
    def step_size(self) -> int:
        """Samples of a full step over all ranks."""
        return self.batch_size * self.world

    @cached_property
    def counts(self) -> np.ndarray:
        """Return the samples of each shape."""
        return np.bincount(self.numbers[self.numbers >= 0])

    @cached_property
    def steps_per_epoch(self) -> int:
        """Return the steps that show every sample once."""
        counts = self.counts
        rests = counts % self.step_size
        full = int((counts // self.step_size).sum())
        if self.croppable:
            return full + -(-int(rests.sum()) // self.step_size)
        return full + int((rests > 0).sum())

    def order(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in the order in which they are walked through."""
        draw = np.random.default_rng(derived_seed("order", self.seed, epoch))
        shards = draw.permutation(len(self.starts) - 1)
        parts = []
        for first in range(0, len(shards), self.window):
            chosen = np.sort(shards[first : first + self.window])
            samples = np.concatenate(
                [np.arange(self.starts[shard], self.starts[shard + 1]) for shard in chosen]
            )
            samples = samples[self.numbers[samples] >= 0]
            parts.append(draw.permutation(samples))
        return np.concatenate(parts)

    def epoch(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch in their order."""
        order = self.order(epoch)
        numbers = self.numbers[order]
        full: list[tuple[int, Step]] = []
        rests: list[np.ndarray] = []
        for bucket in np.unique(numbers):
            places = np.flatnonzero(numbers == bucket)
            whole = len(places) - len(places) % self.step_size
            for group in places[:whole].reshape(-1, self.step_size):
                # A step is due when the last of its samples has come.
                full.append((int(group[-1]), Step(int(bucket), order[group])))
            rests.append(order[places[whole:]])
        steps = [step for _, step in sorted(full, key=lambda due: due[0])]
        return steps + self._rests(rests, epoch)

    def _rests(self, rests: list[np.ndarray], epoch: int) -> list[Step]:
        """Make steps of what was left in the queues, from the tallest shape to the widest."""
        if self.croppable:
            joined = np.concatenate(rests)
            groups = [
                joined[first : first + self.step_size]
                for first in range(0, len(joined), self.step_size)
            ]
        else:
            groups = [rest for rest in rests if len(rest)]
        steps = []
        for group in groups:
            bucket = int(np.bincount(self.numbers[group]).argmax())
            lacking = -len(group) % self.world
            steps.append(Step(bucket, np.concatenate([group, np.resize(group, lacking)])))
        # The widest always last would end every epoch on the same kind of picture.
        draw = np.random.default_rng(derived_seed("rests", self.seed, epoch))
        return [steps[place] for place in draw.permutation(len(steps))]

    def describe(self) -> str:
        """Return what an epoch does with the samples that fill no step, as one line."""
        rests = self.counts % self.step_size
        line = f"{self.steps_per_epoch} steps an epoch"
        if not rests.sum():
            return line
        last = self.epoch(0)[int((self.counts // self.step_size).sum()) :]
        moved = sum(int((self.numbers[step.samples] != step.bucket).sum()) for step in last)
        small = [len(step.samples) for step in last if len(step.samples) < self.step_size]
        twice = sum(len(step.samples) - len(np.unique(step.samples)) for step in last)
        line += f"; {int(rests.sum())} samples fill no step of their shape"
        if moved:
            line += f", about {moved} of them are cropped to a neighbour's"
        if small:
            line += f"; {len(small)} smaller steps ({', '.join(map(str, small[:5]))} samples)"
        if twice:
            line += f"; {twice} samples seen twice, so that ranks stay equal"
        return line
