"""What depends on the times of a walk alone: computed before its first step, on the device.

Within the loop a step then copies nothing to the device and waits for nothing from it: its scales,
the time that the network is told and what the network makes of that time are looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cascade.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class Timetable:
    """The times of a walk, each with its row in all tables."""

    rows: Mapping[float, int]
    """Row of each time."""
    alphas: Tensor
    """(S, 1, 1, 1), float32."""
    sigmas: Tensor
    """(S, 1, 1, 1), float32."""
    network_times: Tensor
    """(S,), float32: what the network is told."""

    def row(self, t: Tensor) -> int | None:
        """Return the row of a time, a scalar on the CPU; None: it has none."""
        return self.rows.get(float(t)) if t.dim() == 0 and t.device.type == "cpu" else None


@dataclass(frozen=True)
class ByTime:
    """A network's condition at each time of a timetable."""

    rows: Sequence[Any]


def timetable_of(
    schedule: NoiseSchedule,
    times: Tensor,
    device: torch.device,
    time_input: Literal["cosine", "raw"] = "cosine",
) -> Timetable:
    """Return the tables of a walk.

    Args:
        schedule: The path.
        times: ``(S,)``, on the CPU.
        device: Where the network is.
        time_input: See ``Denoiser``.
    """
    there = times.to(device=device, dtype=torch.float32)
    alphas, sigmas = (scale.view(-1, 1, 1, 1) for scale in schedule(there))
    told = schedule.network_time(there) if time_input == "cosine" else there
    rows = {time: row for row, time in enumerate(times.tolist())}
    return Timetable(rows, alphas, sigmas, told)
