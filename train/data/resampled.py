"""Resampled mode: an endless stream from shards drawn with replacement; nothing is indexed first.

Steps are dealt to lanes, one a worker. A lane serves a block of steps from a few shards that it has
drawn, brought here whole and shuffled together; meanwhile the next block's shards are on their way.
What a block holds is a function of (seed, rank, lane, block), the shape of a step one of (seed,
step): so ranks agree on it without a word, and a resumed run begins by fetching the block that it
was in. Within a block, samples of a shape that comes up more often than they last are seen again,
and those of one that comes up less often are not seen.

How many steps a block has, and how often each shape comes up, is measured once on two shards.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from cascade.errors import UserError
from train.data.activity import Activity
from train.data.config import DataConfig
from train.data.index import ShardIndex, index_of
from train.data.loader import StepSource
from train.data.patience import Patience
from train.data.read import BatchMaker, Ref, Served
from train.data.select import Selector, SetReport, lost_kind
from train.data.sources import fetched, shard_title
from train.data.transport import SourceError, shown
from train.draws import derived_seed

_log = logging.getLogger(__name__)

_PROBED = 2
_DRAWS = 5


class FetchedShard:
    """A shard that lies here for as long as it is needed."""

    far = False

    def __init__(self, address: str, *, allow_pipe: bool) -> None:
        """Fetch and look through a shard.

        Raises:
            SourceError: It can't be brought here.
        """
        self.title = shard_title(address)
        self.address = address
        self._file: BinaryIO = fetched(address, allow_pipe=allow_pipe)
        self.index: ShardIndex = index_of(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Return a piece."""
        return os.pread(self._file.fileno(), length, offset)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


@dataclass(frozen=True)
class Probe:
    """What two shards say of all of them."""

    report: SetReport
    kept_per_shard: float
    """Samples of a shard that pass the filters."""
    shares: tuple[float, ...]
    """How often each shape comes up; shapes too rare to fill a batch of a block do not."""
    merged: tuple[int, ...]
    """For each shape the one whose batches its pictures join."""


def probed_places(shards: int) -> list[int]:
    """Return which of so many shards a run begins by looking at: the first and the middle one."""
    return sorted({0, shards // 2})[:_PROBED]


def drawn_of(config: DataConfig, shards: int) -> int:
    """Return the most shards that are drawn for one block, for want of samples in the others."""
    return min(config.block_shards + _DRAWS, shards)


def probe_shards(addresses: list[str], config: DataConfig, selector: Selector) -> Probe:
    """Look through the first shard and the middle one, the same on all ranks.

    Raises:
        UserError: They can't be read, or nothing of them is left to train on.
    """
    report = SetReport(selector.buckets)
    for place in probed_places(len(addresses)):
        patience = Patience()
        with patience.watching(), patience.reading(shown(addresses[place])):
            shard = FetchedShard(addresses[place], allow_pipe=config.allow_pipe)
        report.add(shard.address, shard.index, *selector.choose(shard.index))
        shard.close()
    report.require_any(config.shards)
    kept = report.taken / report.shards
    counts = np.array([report.per_bucket[n] for n in range(len(selector.buckets.shapes))], float)
    merged = np.arange(len(counts))
    if not selector.parts:  # pictures can be cropped to another shape, latents can't
        expected = counts / report.shards * config.block_shards
        active = np.flatnonzero(expected >= config.batch_size)
        active = active if len(active) else np.array([int(counts.argmax())])
        merged = active[np.abs(active[None] - merged[:, None]).argmin(axis=1)]
    shares = np.bincount(merged, weights=counts, minlength=len(counts)) / counts.sum()
    return Probe(report, kept, tuple(shares.tolist()), tuple(merged.tolist()))


@dataclass(frozen=True)
class StepRows:
    """What each step takes of a set."""

    batch_size: int
    shares: tuple[float, ...]
    """How often each shape comes up."""
    seed: int

    @property
    def mean_count(self) -> float:
        """Samples of a step in the long run."""
        return self.batch_size

    def count(self, step: int) -> int:
        """Return the samples of a step."""
        return self.batch_size

    def bucket(self, step: int) -> int:
        """Return the shape of a step, the same on all ranks."""
        seed = derived_seed("buckets", self.seed, step)
        return int(np.random.default_rng(seed).choice(len(self.shares), p=self.shares))


class ResampledSource(StepSource):
    """The batches of one rank in resampled mode."""

    def __init__(
        self,
        addresses: list[str],
        config: DataConfig,
        selector: Selector,
        probe: Probe,
        activity: Activity,
        *,
        rank: int,
        world: int,
        rows: StepRows | None = None,
    ) -> None:
        """Take the shards and what was learnt of them.

        ``rows`` is what steps take of them; None: whole batches, in the shapes of the set itself.
        """
        self.addresses = addresses
        self.config = config
        self.selector = selector
        self.probe = probe
        self.rank = rank
        self.world = world
        self.lanes = max(1, config.workers)
        self.activity = activity
        self.maker = BatchMaker(config, selector, activity)
        in_block = probe.kept_per_shard * min(config.block_shards, len(addresses))
        self.rows = rows or StepRows(config.batch_size, probe.shares, config.seed)
        self.block_steps = max(1, int(in_block // self.rows.mean_count))
        self._counted: dict[int, tuple[int, int, Counter[int]]] = {}
        """Lane -> first step of its block, the first step that is not counted, and the counts."""
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._coming: dict[tuple[int, int], _Coming] = {}

    def serve(self, step: int) -> Served:
        """Return the batch of a step."""
        lane, turn = step % self.lanes, step // self.lanes
        number, place = divmod(turn, self.block_steps)
        block = self._block(lane, number)
        bucket, count = self.rows.bucket(step), self.rows.count(step)
        used = self._used(step - place * self.lanes, step)[bucket]
        samples = block.of_bucket(bucket)
        refs = [samples[(used + n) % len(samples)] for n in range(count)]

        def spare(n: int) -> Ref:
            return samples[(used + count + n) % len(samples)]

        shape = self.selector.buckets.shapes[bucket]
        place = (step * self.world + self.rank) * self.config.batch_size
        served = self.maker.make(refs, shape, spare, place)
        block.tell(served)
        return served

    def _used(self, first: int, step: int) -> Counter[int]:
        """Return the samples of each shape that a block's steps before this one have taken.

        Steps come in their order, so each is counted once: a set that has a small share of a
        mixture has a hundred thousand steps in a block.
        """
        began, next_step, used = self._counted.get(step % self.lanes, (-1, 0, Counter()))
        if began != first or next_step > step:
            next_step, used = first, Counter()
        for one in range(next_step, step, self.lanes):
            used[self.rows.bucket(one)] += self.rows.count(one)
        self._counted[step % self.lanes] = (first, step, used)
        return used

    def _block(self, lane: int, number: int) -> _Block:
        """Return a block, and let the next one come."""
        if (lane, number) not in self._blocks:
            for key in [key for key in self._blocks if key[0] == lane]:
                self._blocks.pop(key).close()
            coming = self._coming.pop((lane, number), None)
            if coming is not None:
                self._blocks[lane, number] = coming.result(self.activity.say)
            else:
                self._blocks[lane, number] = self._fetch(lane, number, self.activity.say)
            self._coming[lane, number + 1] = _Coming(lambda say: self._fetch(lane, number + 1, say))
        return self._blocks[lane, number]

    def _fetch(self, lane: int, number: int, say: Callable[[str], None]) -> _Block:
        """Draw, fetch and shuffle the shards of a block, and say which one is on its way.

        Raises:
            UserError: None of many shards can be read, or none holds a sample for training.
        """
        seed = derived_seed("blocks", self.config.seed, number, self.rank * self.lanes + lane)
        draw = np.random.default_rng(seed)
        wanted = min(self.config.block_shards, len(self.addresses))
        order = draw.permutation(len(self.addresses))
        block = _Block(self.selector, self.probe)
        for place in order[: wanted + _DRAWS]:
            if len(block.shards) >= wanted and block.complete():
                break
            address = self.addresses[place]
            say(f"fetching {shown(address)}")
            try:
                block.add(FetchedShard(address, allow_pipe=self.config.allow_pipe))
            except SourceError as error:
                block.news.append(f"a shard that can't be read: {error}")
        if not any(block.samples):
            reasons = "; ".join(block.news[:3]) or "all samples are left out by the filters"
            raise UserError(f"{self.config.shards}: no sample in {wanted} drawn shards ({reasons})")
        block.shuffle(draw)
        return block


class _Block:
    """The shuffled samples of a few shards."""

    def __init__(self, selector: Selector, probe: Probe) -> None:
        self.selector = selector
        self.probe = probe
        self.shards: list[FetchedShard] = []
        self.samples: list[list[Ref]] = [[] for _ in probe.shares]
        self.news: list[str] = []
        self.left_out: Counter[str] = Counter()

    def add(self, shard: FetchedShard) -> None:
        self.shards.append(shard)
        numbers, reasons = self.selector.choose(shard.index)
        kinds = Counter(lost_kind(reason) for reason in reasons if reason)
        del kinds["broken"]  # those are told by name
        self.left_out += kinds
        for sample in np.flatnonzero(numbers >= 0):
            self.samples[self.probe.merged[numbers[sample]]].append(Ref(shard, int(sample)))
        self.news += [f"{shard.title}: {note}" for note in shard.index.notes]
        self.news += [
            f"{shard.title}/{key}: {problem}"
            for key, problem in zip(shard.index.keys, shard.index.problems, strict=True)
            if problem
        ]

    def complete(self) -> bool:
        """Return whether every shape that can come up has a sample."""
        return all(
            found or not share for found, share in zip(self.samples, self.probe.shares, strict=True)
        )

    def shuffle(self, draw: np.random.Generator) -> None:
        self.samples = [
            [samples[place] for place in draw.permutation(len(samples))] for samples in self.samples
        ]

    def of_bucket(self, bucket: int) -> Sequence[Ref]:
        """Return the samples of a shape; for pictures, else those of the nearest that has any.

        Raises:
            UserError: Cached latents of that shape are not in these shards.
        """
        if self.samples[bucket]:
            return self.samples[bucket]
        if self.selector.parts:
            titles = ", ".join(shard.title for shard in self.shards)
            raise UserError(
                f"no latents of {self.selector.buckets.name(bucket)} in the shards {titles}; "
                "raise data.block_shards, or use data.mode exact"
            )
        there = [number for number, samples in enumerate(self.samples) if samples]
        return self.samples[min(there, key=lambda number: (abs(number - bucket), number))]

    def tell(self, served: Served) -> None:
        """Tell once, with a batch, what of the shards is not used."""
        served.broken += self.news
        served.left_out += self.left_out
        self.news, self.left_out = [], Counter()

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


class _Coming:
    """A block on its way; it holds up no process that ends, as a pool's threads would."""

    def __init__(self, fetch: Callable[[Callable[[str], None]], _Block]) -> None:
        self._fetch = fetch
        self._doing = ""
        self._listener: Callable[[str], None] | None = None
        self._block: _Block | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._block = self._fetch(self._say)
        except BaseException as error:  # raised where the block is waited for
            self._error = error

    def _say(self, doing: str) -> None:
        # Until it is waited for, its worker has other things to say.
        self._doing = doing
        if self._listener is not None:
            self._listener(doing)

    def result(self, say: Callable[[str], None]) -> _Block:
        """Wait for the block, and say what it waits for.

        Raises:
            UserError: It can't be had.
        """
        self._listener = say
        say(self._doing)
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._block is not None, "a thread without an error has made its block"
        return self._block
