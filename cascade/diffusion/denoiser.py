"""A network, a schedule and a prediction make a denoiser: (x_t, t, cond) -> x0_hat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cascade.diffusion.prediction import Prediction, to_x0
from cascade.diffusion.schedules import NoiseSchedule
from cascade.diffusion.timetable import ByTime, Timetable

Network = Callable[[Tensor, Tensor, Any], Tensor]
"""Maps (noised latents, network time (B,) float32, condition) to its raw prediction."""


@dataclass(frozen=True)
class Denoiser:
    """Turns whatever a network predicts into an estimate of x0, in float32."""

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction = Prediction.EPSILON
    time_input: Literal["cosine", "raw"] = "cosine"
    """The time the network is told: the schedule's ``network_time`` (v3), or t (v2)."""
    dtype: torch.dtype = torch.float32
    """Number format of the latents that the network is given."""
    timetable: Timetable | None = None
    """Times that are known beforehand; any other is computed when it is asked for."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Estimate x0.

        Args:
            x_t: Noised latents, ``(B, C, H, W)``, float32.
            t: Time, a scalar or ``(B,)``.
            cond: The network's condition, passed through unopened, or one for each time of the
                timetable.

        Returns:
            ``x0_hat``, float32, same shape.
        """
        row = None if self.timetable is None else self.timetable.row(t)
        if self.timetable is None or row is None:
            t = t.to(device=x_t.device, dtype=torch.float32).expand(len(x_t))
            time = self.schedule.network_time(t) if self.time_input == "cosine" else t
            shape = (-1, *[1] * (x_t.dim() - 1))
            alpha, sigma = (value.view(shape) for value in self.schedule(t))
        else:
            time = self.timetable.network_times[row].expand(len(x_t))
            alpha, sigma = self.timetable.alphas[row], self.timetable.sigmas[row]
            cond = cond.rows[row] if isinstance(cond, ByTime) else cond
        predicted = self.network(x_t.to(self.dtype), time, cond).float()
        return to_x0(predicted, x_t, alpha, sigma, self.prediction)

    def scales(self, t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` of a time, a scalar, on a device; both broadcast to latents."""
        row = None if self.timetable is None else self.timetable.row(t)
        if self.timetable is None or row is None:
            return self.schedule(t.to(device))
        return self.timetable.alphas[row], self.timetable.sigmas[row]
