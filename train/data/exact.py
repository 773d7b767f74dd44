"""Exact mode: every sample once an epoch; the position is the number of the step alone.

All shards are indexed first. Each batch is then read by its samples' places, by whichever worker's
turn it is: fewer shards than workers or ranks are no trouble, and a resumed run needs no state.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cascade.errors import UserError
from train.data.activity import Activity
from train.data.config import DataConfig
from train.data.index import ShardIndex
from train.data.index_store import IndexStore
from train.data.loader import StepSource
from train.data.mix import MixedRows
from train.data.patience import Patience
from train.data.plan import ExactPlan, Step
from train.data.read import BatchMaker, Ref, Served
from train.data.select import Selector, SetReport
from train.data.sources import PieceReader, scheme_of, shard_title
from train.data.transport import shown
from train.draws import derived_seed

_log = logging.getLogger(__name__)

_SAY_EVERY_S = 20.0
_INDEXERS = 4


@dataclass(frozen=True)
class IndexedSet:
    """All shards of an exact run, looked through."""

    addresses: list[str]
    numbers: np.ndarray
    """The shape of every sample, -1 for those left out."""
    starts: np.ndarray
    """Where each shard's samples begin among all, and how many there are."""
    report: SetReport
    store: IndexStore

    def digest(self) -> str:
        """Return a hash of what the order of the samples depends on beside the configuration."""
        digest = hashlib.sha256(self.numbers.tobytes() + self.starts.tobytes())
        digest.update("\n".join(map(shard_title, self.addresses)).encode())
        return digest.hexdigest()[:12]


def index_set(
    addresses: list[str], selector: Selector, folder: str | None, where: str
) -> IndexedSet:
    """Look through all shards, or take the indexes of an earlier look.

    Raises:
        UserError: A shard can't be read, or nothing is left to train on.
    """
    store = IndexStore(Path(folder) if folder is not None else None)
    report = SetReport(selector.buckets)
    numbers, starts, said_s = [], [0], time.monotonic()
    patience = Patience()

    def read(address: str) -> ShardIndex:
        with patience.reading(shown(address)):
            return store.read(address)

    with ThreadPoolExecutor(_INDEXERS) as pool, patience.watching():
        for address, index in zip(addresses, pool.map(read, addresses), strict=True):
            chosen, reasons = selector.choose(index)
            report.add(address, index, chosen, reasons)
            numbers.append(chosen)
            starts.append(starts[-1] + len(index))
            if time.monotonic() - said_s > _SAY_EVERY_S:
                said_s = time.monotonic()
                _log.info("looked through %d of %d shards", len(numbers), len(addresses))
    report.require_any(where)
    return IndexedSet(addresses, np.concatenate(numbers), np.array(starts), report, store)


class _PlacedShard:
    """A shard that is read by places, wherever it is."""

    def __init__(self, address: str, index: ShardIndex, pieces: PieceReader) -> None:
        self.title = shard_title(address)
        self.address = address
        self.index = index
        self.far = scheme_of(address) is not None
        self._pieces = pieces

    def read(self, offset: int, length: int) -> bytes:
        return self._pieces.read(self.address, offset, length)


class PlacedSamples:
    """The samples of an indexed set by their numbers."""

    def __init__(self, found: IndexedSet) -> None:
        """Take the set."""
        self.found = found
        self._pieces = PieceReader()

    def ref(self, number: int) -> Ref:
        """Return a sample.

        Raises:
            UserError: Its shard is not as it was when it was looked through.
        """
        shard = int(np.searchsorted(self.found.starts, number, side="right")) - 1
        address = self.found.addresses[shard]
        index = self.found.store.get(address)
        sample = number - int(self.found.starts[shard])
        if sample >= len(index):
            raise UserError(f"{address}: has changed since the run began; start it again")
        return Ref(_PlacedShard(address, index, self._pieces), sample)

    def spare(self, number: int, bucket: int, seed: int) -> Ref:
        """Draw the n-th other sample of a shape; seldom needed, so it may look through all."""
        same = np.flatnonzero(self.found.numbers == bucket)
        draws = np.random.default_rng(seed).integers(len(same), size=number + 1)
        return self.ref(int(same[draws[-1]]))


class ExactSource(StepSource):
    """The batches of one rank in exact mode."""

    def __init__(
        self,
        config: DataConfig,
        selector: Selector,
        found: IndexedSet,
        activity: Activity,
        *,
        rank: int,
        world: int,
    ) -> None:
        """Plan the epochs.

        Raises:
            UserError: The set is smaller than one step.
        """
        self.config = config
        self.rank = rank
        self.world = world
        self.plan = exact_plan(config, selector, found, world)
        self.maker = BatchMaker(config, selector, activity)
        self.samples = PlacedSamples(found)
        self._epoch: tuple[int, Sequence[Step]] = (-1, ())

    def serve(self, step: int) -> Served:
        """Return the batch of a step."""
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = epoch, self.plan.epoch(epoch)
        planned = self._epoch[1][place]
        refs = [self.samples.ref(int(n)) for n in planned.of_rank(self.rank, self.world)]
        shape = self.maker.selector.buckets.shapes[planned.bucket]

        def spare(number: int) -> Ref:
            seed = derived_seed("spares", self.config.seed, step, self.rank)
            return self.samples.spare(number, planned.bucket, seed)

        place = step * self.plan.step_size + self.rank * len(refs)
        return self.maker.make(refs, shape, spare, place)


class ExactRows(StepSource):
    """What each step takes of one set of a mixture in exact mode.

    The set's samples stand in a series, every one once an epoch of the set's, and each step takes
    the next. All pictures have one shape.
    """

    def __init__(
        self,
        config: DataConfig,
        selector: Selector,
        found: IndexedSet,
        activity: Activity,
        rows: MixedRows,
    ) -> None:
        """Take the set, with the seed of its series, and what each step takes of it."""
        self.config = config
        self.rows = rows
        self.plan = _plan(config, selector, found, world=1)
        self.maker = BatchMaker(config, selector, activity)
        self.samples = PlacedSamples(found)
        self._used = (0, 0)
        self._orders: dict[int, np.ndarray] = {}

    def serve(self, step: int) -> Served:
        """Return this rank's rows of a step."""
        first, count = self._before(step) + self.rows.before(step), self.rows.count(step)
        places = range(first, first + count)
        refs = [self.samples.ref(self._number(place)) for place in places]

        def spare(number: int) -> Ref:
            seed = derived_seed("spares", self.config.seed, step, self.rows.rank)
            return self.samples.spare(number, 0, seed)

        return self.maker.make(refs, self.maker.selector.buckets.shapes[0], spare, first)

    def _before(self, step: int) -> int:
        """Return how many of the set's samples the steps before one take, on all ranks."""
        known, used = self._used
        if step < known:
            known, used = 0, 0
        self._used = step, used + self.rows.taken(known, step)
        return self._used[1]

    def _number(self, place: int) -> int:
        """Return the sample at a place of the series."""
        epoch, within = divmod(place, int(self.plan.counts.sum()))
        if epoch not in self._orders:
            late = {n: order for n, order in self._orders.items() if n == epoch - 1}
            self._orders = {**late, epoch: self.plan.order(epoch)}
        return int(self._orders[epoch][within])


def exact_plan(config: DataConfig, selector: Selector, found: IndexedSet, world: int) -> ExactPlan:
    """Return the order of a set's samples.

    Raises:
        UserError: The set is smaller than one step.
    """
    if found.report.taken < config.batch_size * world:
        raise UserError(
            f"data.batch_size is {config.batch_size} on {world} device(s), but the shards hold "
            f"{found.report.taken} samples to train on"
        )
    return _plan(config, selector, found, world)


def _plan(config: DataConfig, selector: Selector, found: IndexedSet, world: int) -> ExactPlan:
    return ExactPlan(
        numbers=found.numbers,
        starts=found.starts,
        batch_size=config.batch_size,
        world=world,
        seed=config.seed,
        window=config.shuffle_shards,
        croppable=not selector.parts,
    )
