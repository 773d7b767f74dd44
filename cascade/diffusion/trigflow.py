"""Any stage seen as TrigFlow: time is the angle between the picture and the noise.

``x_t = cos(t) x0 + sin(t) noise`` with t in [0, pi/2], and the network says the velocity
``v = cos(t) noise - sin(t) x0`` at which ``x_t`` turns. The cosine schedule is this up to the
clock; of any other, ``x / sqrt(alpha^2 + sigma^2)`` at the angle ``atan(sigma / alpha)`` is. The
standard deviation of the data is taken as 1, which latents here have by about.

Reference: Lu & Song, 2024, arXiv:2410.11081, section 3 and appendix B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion.prediction import Prediction
from cascade.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule

SMALLEST_ANGLE = 1e-3
"""Where a schedule begins exactly clean, angles begin here: there the velocity says nothing."""


@dataclass(frozen=True)
class TrigFlow:
    """The change of variables of one network; all of it can be differentiated in x and t."""

    schedule: NoiseSchedule
    """What the network was trained on: the cosine or the linear one."""
    prediction: Prediction
    """What it says."""
    time_input: Literal["cosine", "raw"] = "cosine"
    """See ``cascade.diffusion.denoiser.Denoiser``."""

    @property
    def angles(self) -> tuple[float, float]:
        """Smallest and largest angle of the schedule."""
        first, last = self.angle_of(torch.tensor([0.0, 1.0])).tolist()
        if self.prediction is Prediction.EPSILON and last > math.pi / 2 - SMALLEST_ANGLE:
            raise ValueError("an epsilon network says nothing of the picture at pure noise")
        return max(first, SMALLEST_ANGLE), last

    def angle_of(self, t: Tensor) -> Tensor:
        """Return the angles of the schedule's times, float32."""
        alpha, sigma = self.schedule(t)
        return torch.atan2(sigma, alpha)

    def time_of(self, angle: Tensor) -> Tensor:
        """Return the schedule's times of angles, float32."""
        return self.schedule.time_from_log_snr(-2.0 * angle.float().tan().log())

    def told(self, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network is given for ``x`` at an angle.

        Args:
            x: TrigFlow's ``x_t``, ``(B, ...)``.
            angle: ``(B,)``.

        Returns:
            The schedule's own ``x_t``, and the time that the network is told, ``(B,)``.
        """
        share = angle.sin() / (angle.sin() + angle.cos())  # sigma of the straight path
        if isinstance(self.schedule, LinearSchedule):
            time = share
            x = x / along(angle.sin() + angle.cos(), x)
            if self.time_input == "raw":
                time = _unshifted(share, self.schedule.shift)
            return x, time
        if not isinstance(self.schedule, CosineSchedule):
            raise ValueError(f"{type(self.schedule).__name__} has no form as TrigFlow here")
        # tan(angle) is sigma / alpha, which a shift divides: log-SNR rises by 2 ln k.
        if self.time_input == "raw" and self.schedule.shift != 1.0:
            angle = torch.atan2(angle.sin() / self.schedule.shift, angle.cos())
        s = self.schedule.s
        start = math.cos(s / (1.0 + s) * math.pi / 2)
        time = (angle.cos() * start).acos() / (math.pi / 2) * (1.0 + s) - s
        return x, time

    def velocity(self, predicted: Tensor, x: Tensor, angle: Tensor) -> Tensor:
        """Return the velocity that a raw prediction at ``x``, ``(B, ...)``, says."""
        sin, cos = along(angle.sin(), x), along(angle.cos(), x)
        if self.prediction is Prediction.V:
            return predicted
        if self.prediction is Prediction.EPSILON:
            return (predicted - sin * x) / cos
        if self.prediction is Prediction.X0:
            return (cos * x - predicted) / sin
        # flow is noise - x0: v is cos noise - sin x0, and x is cos x0 + sin noise.
        return (predicted + (cos - sin) * x) / (cos + sin)


def _unshifted(share: Tensor, shift: float) -> Tensor:
    return share / (shift - (shift - 1.0) * share)


def along(values: Tensor, like: Tensor) -> Tensor:
    """Give values of a batch, ``(B,)``, the dimensions of ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def turned(x0: Tensor, noise: Tensor, angle: Tensor) -> Tensor:
    """Return TrigFlow's ``x_t`` of samples ``(B, ...)`` and standard normal noise."""
    return along(angle.cos(), x0) * x0 + along(angle.sin(), x0) * noise


def clean(velocity: Tensor, x: Tensor, angle: Tensor) -> Tensor:
    """Return the estimate of x0, which of a consistency model is its end: ``cos x - sin v``."""
    return along(angle.cos(), x) * x - along(angle.sin(), x) * velocity
