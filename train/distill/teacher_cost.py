"""What a teacher's pictures cost: a ledger of its own, and an estimate before a GPU is taken."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.evaluate.energy import EnergyMeter, gpus_of
from cascade.evaluate.flops import FlopCounter
from cascade.evaluate.generate import Item, PictureMaker
from cascade.evaluate.training_cost import PICTURES_PHASE, ledger_rows
from train.memory import peak_memory_bytes

TEACHER_PHASE = PICTURES_PHASE
"""``phase`` of the rows, by which a budget tells them from those of a training run."""
_PARTS = ("setup", "teacher", "write")


@dataclass(frozen=True)
class PictureCost:
    """What one picture takes."""

    flops: float
    """Counted, multiply and add as two."""
    seconds: float
    """Measured here, alone in its batch, after one that is not counted."""

    def describe(self, num_bytes: int, device_tflops: float | None) -> list[str]:
        """Return lines: a picture, and a million of them.

        Args:
            num_bytes: Bytes of a picture with all of its members.
            device_tflops: What a device reaches in these networks, in TFLOP/s; None: unknown.
        """
        lines = [
            f"a picture: {self.flops / 1e12:.4g} TFLOP, {self.seconds:.3g} s here, "
            f"{num_bytes / 2**10:,.0f} KiB",
            f"a million: {self.seconds * 1e6 / 3600:,.3g} hours of this device, "
            f"{num_bytes * 1e6 / 2**40:,.3g} TiB",
        ]
        if device_tflops is not None:
            hours = self.flops / (device_tflops * 1e12) * 1e6 / 3600
            lines.append(
                f"a million on a device that reaches {device_tflops:g} TFLOP/s: {hours:,.3g} hours"
            )
        return lines


def measure_cost(maker: PictureMaker, item: Item, *, timed: bool) -> PictureCost:
    """Make a picture and count its operations; if it is to be timed, make it a second time."""
    with FlopCounter(take_apart=True) as counter:
        list(maker.make([item], batch_size=1))
    started_s = time.perf_counter()
    if timed:
        list(maker.make([item], batch_size=1))
    return PictureCost(counter.total, time.perf_counter() - started_s)


class TeacherLedger:
    """Appends a row for what was spent since the row before.

    The rows are those of a training run's ledger, with ``phase: teacher`` and in place of ``step``
    the shard. Several processes append to one file, a row in one write. What a killed process had
    not written yet, at most ``every_s`` seconds of work, is not in it; what it makes again is
    spent again: the sum of all rows is the cost.
    """

    def __init__(self, path: Path, teacher: str, every_s: float = 60.0) -> None:
        """Take the file and the hash of the teacher; the clock runs in ``setup``."""
        self.path = path
        self.teacher = teacher
        self.every_s = every_s
        self._device = torch.device("cpu")
        self._flops_per_picture = self._extra_flops = 0.0
        self._energy = EnergyMeter()
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._samples = self._refused = 0
        self._part = "setup"
        self._since_s = self._row_s = time.monotonic()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Spend a block in ``teacher`` or ``write``, then go on with what was before."""
        before = self._part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(before)

    def begin(self, cost: PictureCost, device: torch.device) -> None:
        """End the set-up, in which a picture was made to count its operations."""
        self._flops_per_picture = self._extra_flops = cost.flops
        self._device = device
        self._energy = EnergyMeter(gpus_of(device))
        self._switch("write")

    def count(self, *, refused: bool) -> None:
        """Count a picture."""
        self._samples += not refused
        self._refused += refused

    def write_row(self, shard: str, *, if_due: bool = False) -> None:
        """Append what was spent since the last row; ``if_due``: only after ``every_s``."""
        self._switch(self._part)
        if if_due and self._since_s - self._row_s < self.every_s:
            return
        made = self._samples + self._refused
        seconds = {part: round(value, 4) for part, value in self._seconds.items()}
        row = {
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "phase": TEACHER_PHASE,
            "teacher": self.teacher,
            "shard": shard,
            "samples": self._samples,
            "refused": self._refused,
            "seconds": seconds,
            "device_seconds": round(sum(seconds.values()), 4),  # so that a row adds up
            "flops": made * self._flops_per_picture + self._extra_flops,
            "energy_j": self._energy.spent_j(),
            "peak_memory_mib": round(peak_memory_bytes(self._device) / 2**20),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._seconds = dict.fromkeys(_PARTS, 0.0)
        self._samples = self._refused = 0
        self._extra_flops, self._row_s = 0.0, self._since_s

    def _switch(self, part: str) -> None:
        now_s = time.monotonic()
        self._seconds[self._part] += now_s - self._since_s
        self._part, self._since_s = part, now_s


@dataclass(frozen=True)
class TeacherCost:
    """The sum of a set's rows."""

    samples: int
    device_seconds: float
    flops: float
    energy_j: float | None
    """None where nothing told it."""


def read_teacher_cost(path: Path) -> TeacherCost:
    """Add up the teacher's rows of a ledger, for the budget of what is trained on its pictures.

    Rows that a kill has cut are left out.
    """
    rows = [row for row in ledger_rows(path) if row.get("phase") == TEACHER_PHASE]
    energy = [row["energy_j"] for row in rows]
    return TeacherCost(
        samples=sum(row["samples"] for row in rows),
        device_seconds=sum(row["device_seconds"] for row in rows),
        flops=sum(row["flops"] for row in rows),
        energy_j=None if None in energy else sum(energy),
    )
