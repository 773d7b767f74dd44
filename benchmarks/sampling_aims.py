"""The aims of ``benchmarks/sampling.py``: which hold and which are missed, by a run's own rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.sampling_measure import WHOLE, Row
from benchmarks.sampling_sides import HERE, HERE_COMPILED, HERE_GRAPHS, THEIRS, THEIRS_COMPILED
from benchmarks.start_up import HELP, IMPORT, StartUp

_MEMORY_SHARE, _MEMORY_BYTES = 1.05, 4 << 20
"""What the resident set of a process varies by from loop to loop: it comes in pages and arenas."""

_SHOWN = 4
"""Rows that are told one by one though they all hold."""


@dataclass(frozen=True)
class Aim:
    """An aim, and what was found."""

    text: str
    found: str
    """Empty: this run did not measure it."""
    holds: bool | None
    """None: not measured."""


def judge(rows: Sequence[Row], start_up: Sequence[StartUp], device_type: str) -> list[Aim]:
    """Return every aim of this kind of device with what this run says of it.

    Ratios are those of the printed table, to two digits.
    """
    ours = [row for row in rows if row.side == HERE]
    aims = list(_on_gpu(rows) if device_type == "cuda" else _on_cpu(ours))
    aims.append(
        _each(
            "never slower than diffusers, any network",
            [row for row in ours if row.part != WHOLE],
            lambda row: round(row.times_diffusers, 2) >= 1,
            _speed,
        )
    )
    aims.append(_memory(rows))
    for text, name, limit_s in (
        ("import of the pipeline below 2.5 s", IMPORT, 2.5),
        ("sample.py --help below 0.5 s", HELP, 0.5),
    ):
        seconds = [one.seconds.median for one in start_up if one.name == name]
        found = f"{seconds[0]:.2f} s" if seconds else ""
        aims.append(Aim(text, found, seconds[0] < limit_s if seconds else None))
    return aims


def _on_cpu(ours: Sequence[Row]) -> Iterator[Aim]:
    whole = [row for row in ours if row.part == WHOLE and row.batch_size == 1]
    lite = [row for row in whole if row.key == "stable_cascade_lite" and row.px == 512]
    demo = [row for row in whole if row.key == "demo"]
    # Stable Cascade's Stage A is that of all published cascades.
    published = ("stable_cascade_lite", "stable_cascade_full", "wuerstchen_v2")
    stage_a = [row for row in ours if row.part == "Stage A" and row.key in published]
    for text, found, limit in (
        ("1.3 times diffusers, Stable Cascade lite at 512 px end to end", lite, 1.3),
        ("1.5 times diffusers, the demonstration end to end", demo, 1.5),
        ("1.5 times diffusers, published Stage A", stage_a, 1.5),
    ):
        yield _each(text, found, _at_least(limit), _speed)


def _on_gpu(rows: Sequence[Row]) -> Iterator[Aim]:
    whole = [row for row in rows if row.part == WHOLE and row.batch_size == 1]
    fastest: dict[tuple[str, str, int, int, str], Row] = {}
    for row in whole:
        known = fastest.get(_place(row), row)  # of our sides the fastest one counts
        is_ours = row.side in (HERE, HERE_GRAPHS, HERE_COMPILED)
        if is_ours and row.times_diffusers >= known.times_diffusers:
            fastest[_place(row)] = row
    ours = list(fastest.values())
    yield _each("2 times diffusers eager at batch 1, every model", ours, _at_least(2.0), _speed)
    compiled = {_place(row): row.seconds.median for row in whole if row.side == THEIRS_COMPILED}
    pairs = [row for row in ours if _place(row) in compiled]

    def over_compiled(row: Row) -> float:
        return compiled[_place(row)] / row.seconds.median

    yield _each(
        "1.3 times diffusers compiled at batch 1, every model",
        pairs,
        lambda row: round(over_compiled(row), 2) >= 1.3,
        lambda row: f"{over_compiled(row):.2f}",
    )
    yield _each(
        "Stable Cascade full at 1024 px, 20 + 10 steps, within 1.7 times of its roofline",
        [r for r in ours if (r.key, r.px, r.steps) == ("stable_cascade_full", 1024, 31)],
        lambda row: row.roofline_share >= 1 / 1.7,
        lambda row: f"{1 / row.roofline_share:.2f} times",
    )
    yield _each(
        "Stable Cascade lite at 1024 px in less than 0.25 s",
        [r for r in ours if (r.key, r.px) == ("stable_cascade_lite", 1024)],
        lambda row: row.seconds.median < 0.25,
        lambda row: f"{row.seconds.median:.3f} s",
    )


def _at_least(limit: float) -> Callable[[Row], bool]:
    return lambda row: round(row.times_diffusers, 2) >= limit


def _speed(row: Row) -> str:
    return f"{row.times_diffusers:.2f}" + (", computed" if row.is_computed else "")


def _place(row: Row) -> tuple[str, str, int, int, str]:
    return row.key, row.part, row.px, row.batch_size, row.dtype


def _named(row: Row) -> str:
    side = "" if row.side == HERE else f", {row.side}"
    return f"{row.model}, {row.part}, {row.px} px, batch {row.batch_size}, {row.dtype}{side}"


def _each(
    text: str, rows: Sequence[Row], holds: Callable[[Row], bool], show: Callable[[Row], str]
) -> Aim:
    """Judge an aim that all of these rows must hold; those that miss it are named."""
    if not rows:
        return Aim(text, "", None)
    missed = [row for row in rows if not holds(row)]
    shown = missed or rows
    found = "; ".join(f"{_named(row)}: {show(row)}" for row in shown)
    if not missed and len(rows) > 1:
        found = f"all {len(rows)}; {found}" if len(rows) <= _SHOWN else f"all {len(rows)}"
    return Aim(text, found, not missed)


def _memory(rows: Sequence[Row]) -> Aim:
    theirs = {_place(row): row.peak_bytes for row in rows if row.side == THEIRS}
    ours = [
        row for row in rows if row.side == HERE and row.part != WHOLE and row.peak_bytes is not None
    ]

    def limit(row: Row) -> float:
        other = theirs[_place(row)]
        assert other is not None
        return max(_MEMORY_SHARE * other, other + _MEMORY_BYTES)

    def mb(row: Row) -> str:
        other = theirs[_place(row)]
        assert row.peak_bytes is not None and other is not None
        return f"{row.peak_bytes / 1e6:.0f} MB against {other / 1e6:.0f}"

    return _each(
        "peak memory never above diffusers' (by more than 5 % and 4 MB)",
        ours,
        lambda row: row.peak_bytes is not None and row.peak_bytes <= limit(row),
        mb,
    )
