"""What a training has cost, from its ledger: every step is counted once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cascade.evaluate.training_cost import LEDGER_FILE, PICTURES_PHASE, ledger_rows
from train.distill.teacher_cost import read_teacher_cost

Whose = Literal["own", "teacher"]
_LOOKING = ("pictures", "validation")
"""Phases that a budget does not pay for: judging is not learning."""


@dataclass(frozen=True)
class Spent:
    """A cost; sums add up, and what was not measured of a part is None of the whole."""

    device_seconds: float = 0.0
    samples: float = 0.0
    flops: float | None = 0.0
    energy_j: float | None = 0.0

    def __add__(self, other: Spent) -> Spent:
        """Add two costs."""
        return Spent(
            self.device_seconds + other.device_seconds,
            self.samples + other.samples,
            _sum(self.flops, other.flops),
            _sum(self.energy_j, other.energy_j),
        )


def read_ledger(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ledger; none if it has not begun."""
    path = run / LEDGER_FILE
    return ledger_rows(path) if path.is_file() else []


def spent_until(
    rows: Iterable[Mapping[str, Any]], step: int | None = None, *, whose: Whose = "own"
) -> Spent:
    """Sum a ledger.

    A run that was killed makes some steps again. An accident is no property of an arm, so the last
    time that a step was made counts, and no other; a row of which a part counts, counts by its
    share of steps. Steps of which a kill took the row, and the checkpoint was kept, cost what those
    of the next row do. Set-up, and the seconds of looking, are left out.

    Args:
        rows: Of the ledger.
        step: Steps up to this one; None: all.
        whose: What the run itself has cost, or what its teacher has within it, whose samples are
            none: they are the run's.
    """
    kept: list[tuple[Mapping[str, Any], int]] = []  # rows, and where each ends
    for row in rows:
        begin = row["from_step"]
        if row["step"] <= begin:
            continue  # the end of a run belongs to no step
        while kept and kept[-1][0]["from_step"] >= begin:
            kept.pop()
        if kept:
            kept[-1] = (kept[-1][0], min(kept[-1][1], begin))
        kept.append((row, row["step"]))
    total, done = Spent(), 0
    for row, end in kept:
        end = end if step is None else min(end, step)
        begin = min(done, row["from_step"])
        share = (end - begin) / (row["step"] - row["from_step"])
        if share > 0:
            total += _cost(row, share, end - begin, whose)
        done = max(done, end)
    return total


def spent_by_command(folder: Path | None, seconds: float) -> Spent:
    """Return what a command has cost: what its own ledger says, or the seconds of the clock.

    Without a ledger its operations are not counted: None.

    Args:
        folder: Where it wrote; None: unknown.
        seconds: Of the clock, on one device.
    """
    if folder is None or not (folder / LEDGER_FILE).is_file():
        return Spent(device_seconds=seconds, flops=None)
    cost = read_teacher_cost(folder / LEDGER_FILE)
    return Spent(cost.device_seconds, 0, cost.flops, cost.energy_j)


def _cost(row: Mapping[str, Any], share: float, steps: int, whose: Whose) -> Spent:
    """Return a part of a row's cost, that of so many steps."""
    seconds: dict[str, float] = row["seconds"]
    wall = sum(seconds.values())
    devices = row["device_seconds"] / wall if wall > 0 else 1.0
    taught_s = seconds.get(PICTURES_PHASE, 0.0)
    taught_flops = row.get("teacher_flops", 0.0)
    if whose == "teacher":
        # A meter tells the energy of both together, which is the run's.
        return Spent(
            taught_s * devices * share, 0.0, None if taught_flops is None else taught_flops * share
        )
    learning = wall - taught_s - sum(seconds.get(phase, 0.0) for phase in (*_LOOKING, "setup"))
    samples_per_step = row["samples"] / row["step"]  # both are the run's progress
    flops, energy = row["flops"], row["energy_j"]
    return Spent(
        learning * devices * share,
        samples_per_step * steps,
        None if flops is None or taught_flops is None else (flops - taught_flops) * share,
        None if energy is None else energy * share,
    )


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
