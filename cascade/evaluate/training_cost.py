"""What training cost, from the ledgers of its runs; the teacher's line stands apart."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.evaluate.results import markdown_table, number_text

_log = logging.getLogger(__name__)

LEDGER_FILE = "ledger.jsonl"
PICTURES_PHASE = "teacher"
"""``phase`` of the rows of ``python -m train.distill generate``."""
_NEEDED = ("samples", "seconds", "device_seconds", "flops", "energy_j", "peak_memory_mib")


@dataclass(frozen=True)
class RunCost:
    """What one run has cost, over all its starts."""

    name: str
    samples: int
    """Samples that it learned from: its progress; what a killed start made again is in the rest.
    Of a teacher's set, the pictures that were made of it."""
    device_seconds: float
    """Seconds of all its devices."""
    phase_seconds: dict[str, float]
    """Wall seconds by phase: data, step, validation, pictures, and so on."""
    flops: float | None
    """None: a row does not tell them (torch.compile)."""
    energy_j: float | None
    """None: nothing told it."""
    peak_memory_mib: int

    def price(self, per_device_hour: float) -> float:
        """Return what it cost at a price of a device hour."""
        return self.device_seconds / 3600.0 * per_device_hour


def read_ledger(run: Path) -> RunCost:
    """Add up a run's ledger.

    Args:
        run: The run's folder, or its ``ledger.jsonl``.

    Raises:
        UserError: If there is none, or a line is no row of one.
    """
    path = run / LEDGER_FILE if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"{path}: no such ledger; every run of python -m train writes one")
    rows = ledger_rows(path)
    if not rows:
        raise UserError(f"{path}: no rows in it; the run has not written any yet")
    phases: dict[str, float] = {}
    for row in rows:
        for phase, seconds in row["seconds"].items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    return RunCost(
        name=path.parent.name,
        samples=_samples(rows),
        device_seconds=math.fsum(row["device_seconds"] for row in rows),
        phase_seconds=phases,
        flops=_sum_of(rows, "flops"),
        energy_j=_sum_of(rows, "energy_j"),
        peak_memory_mib=max(row["peak_memory_mib"] for row in rows),
    )


def _samples(rows: Sequence[Mapping[str, Any]]) -> int:
    """Return a run's progress, or the pictures of a set: its rows count their own alone."""
    made = [row["samples"] for row in rows if row.get("phase") == PICTURES_PHASE]
    return sum(made) if made else max(row["samples"] for row in rows)


def ledger_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ledger: of a run, or of a set that a teacher has drawn.

    A line that is no JSON was cut by a kill, whose run has gone on in the next: it is said, and
    left out. What it told of is not in the ledger any more.

    Raises:
        UserError: A line is JSON, and no row of a ledger.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            _log.warning("%s: line %d is cut off, and left out", path, number)
            continue
        missing = [name for name in _NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(
                f"{path}: line {number}: not a row of a ledger: {missing[0]} is missing"
            )
        rows.append(row)
    return rows


def _sum_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Add a column up; one row that does not tell makes the sum unknown."""
    values = [row[name] for row in rows]
    return None if None in values else math.fsum(values)


@dataclass(frozen=True)
class TrainingCost:
    """All runs that a model needed, and those of its teacher."""

    runs: tuple[RunCost, ...]
    teacher: tuple[RunCost, ...] = ()

    @property
    def device_seconds(self) -> float:
        """Of the model's own runs; the teacher's are a line of their own."""
        return math.fsum(run.device_seconds for run in self.runs)

    @property
    def teacher_device_seconds(self) -> float:
        """Of the teacher's runs."""
        return math.fsum(run.device_seconds for run in self.teacher)


def training_cost(runs: Sequence[Path], teacher: Sequence[Path] = ()) -> TrainingCost:
    """Add up the ledgers of a model's runs and, apart, of its teacher's.

    Raises:
        UserError: If one is missing or broken.
    """
    return TrainingCost(
        tuple(read_ledger(run) for run in runs), tuple(read_ledger(run) for run in teacher)
    )


def cost_table(cost: TrainingCost, per_device_hour: float | None = None) -> str:
    """Return a line for each run, their sum, and the teacher's sum apart.

    Args:
        cost: What was spent.
        per_device_hour: Price of a device hour, in any money; None: no column for it.
    """
    columns = ["run", "samples", "device s", "FLOPs", "energy, J", "peak MiB"]
    columns += [] if per_device_hour is None else ["money"]
    lines = [_line(run.name, [run], per_device_hour) for run in cost.runs]
    lines.append(_line("all", cost.runs, per_device_hour))
    if cost.teacher:
        lines += [_line(f"teacher: {run.name}", [run], per_device_hour) for run in cost.teacher]
        lines.append(_line("with the teacher", (*cost.runs, *cost.teacher), per_device_hour))
    return markdown_table(columns, lines)


def _line(name: str, runs: Sequence[RunCost], per_device_hour: float | None) -> list[str]:
    flops = [run.flops for run in runs]
    energy = [run.energy_j for run in runs]
    cells = [
        name,
        f"{sum(run.samples for run in runs):,}",
        number_text(math.fsum(run.device_seconds for run in runs)),
        _known(flops, "{:.3g}"),
        _known(energy, "{:,.0f}"),
        f"{max((run.peak_memory_mib for run in runs), default=0):,}",
    ]
    if per_device_hour is not None:
        cells.append(f"{math.fsum(run.price(per_device_hour) for run in runs):,.2f}")
    return cells


def _known(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return form.format(math.fsum(known)) if len(known) == len(values) else "unknown"
