"""Looks at a sample of every shard, before a device is taken, and says what a run would get.

What a run would refuse is refused here, and nothing else: a sample proves that pictures of two
sizes are there, but not that a filter leaves nothing. What it can't tell is a warning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cascade.errors import UserError
from train.data.beside import find_beside
from train.data.cached import CACHE_FILES
from train.data.config import DataConfig
from train.data.fingerprint import CacheFound, check_fits, find_cache
from train.data.index import UNREADABLE_PICTURE, ShardIndex, index_of
from train.data.plan import ExactPlan
from train.data.resampled import drawn_of, probed_places
from train.data.select import Selector, SetReport, quartiles
from train.data.sources import check_allowed, expand_shards, open_stream
from train.data.transport import SourceError, shown

_READERS = 4
_SHOWN = 5


@dataclass(frozen=True)
class CheckOptions:
    """What ``python -m train.data check`` looks at."""

    data: DataConfig
    """The data of the run that is meant."""
    samples: int = 64
    """Samples to look at and decode in each shard; 0: all."""
    ranks: int = 1
    """Devices of the run that is meant."""
    one_size: bool = False
    """Whether the run keeps the set in memory, where all pictures have one size."""
    compares: bool = False
    """Whether the data's size and shapes are the run's own, and a cache has to have them."""
    of_mixture: bool = False
    """Whether the data are one set of several, which fill a step together."""

    def __post_init__(self) -> None:
        """Refuse counts that can't be."""
        if self.samples < 0 or self.ranks < 1:
            raise UserError(
                f"--samples {self.samples} --ranks {self.ranks}: at least 0 (all) and 1"
            )


@dataclass
class Checked:
    """What was found."""

    report: SetReport
    unreadable: list[str]
    """Shards that can't be read, and why."""
    plan: str | None
    """What an epoch of exact mode does with the samples."""
    cache: CacheFound | None
    options: CheckOptions
    held: list[int | None]
    """Samples of each shard that a run's index would not leave out; None: it can't be read."""
    altered: list[str]
    """Shards that are not as they were written, by the index beside them."""
    whole_sums: int = 0
    """Shards whose checksum is that of the index beside them."""

    def table(self) -> Iterator[str]:
        """Yield the lines of the report."""
        report, data = self.report, self.options.data
        first = "" if report.whole else f", the first {self.options.samples} samples of each"
        if self.whole_sums or self.altered:
            yield _row("sums", f"{self.whole_sums} as written, {len(self.altered)} not")
        left_out = report.samples - report.taken
        yield _row("shards", f"{report.shards}{first}")
        yield _row("samples", f"{report.taken} to train on, {left_out} left out")
        if self.cache is not None:
            weights = ", ".join(f"{part} {w}" for part, w in self.cache.fingerprint.weights.items())
            yield _row("cache", f"{weights}; size {self.cache.fingerprint.size}")
        heights, widths = ([sides[n] for sides in report.sides] for n in (0, 1))
        yield _row("heights", f"{quartiles(heights)} px (least / middle / most)")
        yield _row("widths", f"{quartiles(widths)} px")
        each = report.captions / max(1, report.taken)
        lengths = quartiles(list(report.lengths))
        yield _row("captions", f"{report.captions}, {each:.1f} a sample; {lengths} characters")
        yield from _section("left out", _reasons(report))
        met = [f"{count:>8}  {remark}" for remark, count in report.remarks.most_common()]
        yield from _section("met, and no harm", met)
        damage = [f"          {note}" for note in (*self.unreadable, *report.notes)]
        yield from _section(
            "damaged shards (streams leave out their ends; data.mode memory refuses them)", damage
        )
        yield from _section(f"shapes of size {data.size}", self._shapes())
        if report.enlarged:
            yield f"{report.enlarged:>10}  pictures are smaller than their shape and are enlarged"
        if self.plan is not None:
            yield _row("epoch", self.plan)
        readers = self.options.ranks * max(1, data.workers)
        if report.shards < readers and not self.options.one_size:
            how = "samples are dealt out, not shards"
            if data.mode == "resampled":
                how = "each draws from all of them"
            yield _row("workers", f"{readers} readers on {report.shards} shards: {how}")
        for warning in self.warnings():
            yield f"warning: {warning}"

    def _shapes(self) -> list[str]:
        total = max(1, self.report.taken)
        return [
            f"{count:>10}  {self.report.buckets.name(number)} ({100 * count / total:.1f} %)"
            for number, count in sorted(self.report.per_bucket.items())
        ]

    def warnings(self) -> Iterator[str]:
        """Yield what may stop a run, and what was not looked at."""
        report, data, step = self.report, self.options.data, self._step
        endless = data.mode == "resampled" and not self.options.one_size
        if endless:
            yield from self._lost_shards()
        if not report.whole:
            if not report.taken:
                most = "; ".join(f"{n} {reason}" for reason, n in report.reasons.most_common(3))
                yield f"nothing of this sample is left ({most}); the rest of the shards may be"
            elif report.taken < step and not endless:
                yield (
                    f"{report.taken} samples of those read are left, fewer than one step of "
                    f"{data.batch_size} on {self.options.ranks} device(s); a run counts all"
                )
        if endless or not report.whole:
            try:
                report.require_mostly_whole(data.max_broken_share, data.shards)
            except UserError as error:
                yield f"a run may stop: {error}"
        if not report.whole:
            yield (
                f"only the first {self.options.samples} samples of each shard were read, the rest "
                "may be otherwise; --all reads every one"
            )

    def _lost_shards(self) -> Iterator[str]:
        """Yield what shards of which a resampled run has nothing may do to it."""
        yield from (f"left out by resampled mode: {line}" for line in self.unreadable)
        empty = sum(1 for count in self.held if not count)
        drawn = drawn_of(self.options.data, len(self.held))
        if self.report.whole and drawn <= empty < len(self.held):
            yield (
                f"{empty} of {len(self.held)} shards hold nothing to train on; a run that draws "
                f"{drawn} such shards in a row stops: leave them out of data.shards"
            )

    @property
    def _step(self) -> int:
        """Return the samples without which no step can be made."""
        return 1 if self.options.of_mixture else self.options.data.batch_size * self.options.ranks

    def require_usable(self) -> None:
        """Refuse what a run could certainly not train on.

        Raises:
            UserError: In one line.
        """
        data, report = self.options.data, self.report
        endless = data.mode == "resampled" and not self.options.one_size
        if self.unreadable:
            begun = probed_places(len(self.held)) if endless else range(len(self.held))
            if any(self.held[place] is None for place in begun):
                more = len(self.unreadable) - 1
                others = f", and {more} more" if more else ""
                raise UserError(f"{self.unreadable[0]}{others}; no run can read it")
        if self.options.one_size and report.notes:
            raise UserError(
                f"{report.notes[0]}; data.mode memory reads whole shards alone: write it "
                "again, leave it out, or use data.mode exact"
            )
        sizes = {pair for sides in report.sides for pair in zip(*sides.tolist(), strict=True)}
        if self.options.one_size and len(sizes) > 1:
            raise UserError(
                f"{data.shards}: pictures of {len(sizes)} sizes, but data.mode is memory; write "
                "the shards again with --size, or use data.mode exact"
            )
        if report.whole:
            self._require_enough(endless)
        if self.altered:
            more = len(self.altered) - 1
            raise UserError(self.altered[0] + (f" (and {more} more shards)" if more else ""))

    def _require_enough(self, endless: bool) -> None:
        """Refuse a set, all of which was read, of which a run is left with too little."""
        data, report = self.options.data, self.report
        report.require_any(data.shards)
        if endless:
            begun = probed_places(len(self.held))
            if not any(self.held[place] for place in begun):
                numbers = " and ".join(str(place + 1) for place in begun)
                raise UserError(
                    f"{data.shards}: nothing is left of shard {numbers}, which a resampled run "
                    "begins by looking at; leave them out, or change data.filters"
                )
            return
        report.require_mostly_whole(data.max_broken_share, data.shards)
        # A picture that only decoding shows to be broken counts in a stream's plan: another of
        # the set comes in its place.
        late = 0 if self.options.one_size else report.reasons[UNREADABLE_PICTURE]
        if data.mode != "resampled" and report.taken + late < self._step:
            raise UserError(
                f"{data.shards}: {report.taken} samples, fewer than one step of "
                f"{data.batch_size} on {self.options.ranks} device(s)"
            )


def check(options: CheckOptions) -> Checked:
    """Look at the shards; a shard that can't be read is reported, not raised.

    Raises:
        UserError: No shard matches, a command that nobody allowed, or a cache of another size,
            shapes or crop than the run's.
    """
    data = options.data
    addresses = expand_shards(data.shards)
    check_allowed(addresses, allow_pipe=data.allow_pipe, in_pieces=data.mode == "exact")
    cache = find_cache(addresses)
    parts = _parts(cache)
    if cache is not None:
        made = cache.fingerprint
        if options.compares:
            check_fits(made, data, {})
        data = dataclasses.replace(data, size=made.size, buckets=made.buckets)
        options = dataclasses.replace(options, data=data)
    selector = Selector.of(data, parts)
    report = SetReport(selector.buckets)
    unreadable: list[str] = []
    numbers, starts = [], [0]
    held: list[int | None] = []

    altered: list[str] = []
    sums = 0

    def look(address: str) -> ShardIndex | str:
        try:
            with open_stream(address, allow_pipe=data.allow_pipe) as stream:
                return index_of(stream, options.samples or None, decode=True)
        except (SourceError, OSError) as error:
            return str(error) if isinstance(error, SourceError) else f"{shown(address)}: {error}"

    with ThreadPoolExecutor(_READERS) as pool:
        for address, index in zip(addresses, pool.map(look, addresses), strict=True):
            if isinstance(index, str):
                unreadable.append(index)
                held.append(None)
                continue
            chosen, reasons = selector.choose(index)
            if not options.samples:
                wrong = _altered(address)
                altered += [wrong] if wrong else []
                sums += wrong == ""
            held.append(int((chosen >= 0).sum()) + reasons.count(UNREADABLE_PICTURE))
            report.add(address, index, chosen, reasons)
            numbers.append(chosen)
            starts.append(starts[-1] + len(index))
    plan = None
    if data.mode == "exact" and report.whole and report.taken and not options.of_mixture:
        plan = ExactPlan(
            np.concatenate(numbers),
            np.array(starts),
            data.batch_size,
            options.ranks,
            data.seed,
            data.shuffle_shards,
            croppable=not parts,
        ).describe()
    return Checked(report, unreadable, plan, cache, options, held, altered, sums)


def _altered(address: str) -> str | None:
    """Return what the checksum in the index beside a shard says; empty: well, None: nothing."""
    beside = find_beside(address)
    if beside is None:
        return None
    try:
        beside.require_whole()
    except UserError as error:
        return str(error)
    return ""


def _parts(cache: CacheFound | None) -> tuple[str, ...]:
    if cache is None:
        return ()
    return tuple(name for part in cache.fingerprint.weights for name in CACHE_FILES[part])


def _reasons(report: SetReport) -> list[str]:
    return [
        f"{count:>10}  {reason}: {', '.join(report.examples[reason])}"
        + ("..." if count > len(report.examples[reason]) else "")
        for reason, count in report.reasons.most_common()
    ]


def _row(name: str, value: str) -> str:
    return f"{name:<10}{value}"


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield title
        yield from lines
