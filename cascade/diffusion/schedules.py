"""The noise schedule: diffusion time to signal and noise scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps times ``t`` in [0, 1] to ``(alpha, sigma)``, with ``alpha^2 + sigma^2 = 1``."""


@dataclass(frozen=True)
class CosineSchedule:
    """Cosine schedule with clamps and a resolution shift; all values are float32.

    ``alpha^2(t) = cos^2((t + s) / (1 + s) * pi / 2) / cos^2(s / (1 + s) * pi / 2)``, clamped.

    References: Nichol & Dhariwal, 2021, arXiv:2102.09672, eq. 17; shift: Hoogeboom et al., 2023,
    arXiv:2301.11093, eq. 4.
    """

    shift: float = 1.0
    """Resolution shift k: log-SNR is lowered by ``2 ln k``; Stable Cascade samples Stage C at 2."""
    s: float = 0.008
    """Offset that keeps the noise of the first steps from vanishing."""
    smallest: float = 1e-4
    """Smallest ``alpha^2``."""
    largest: float = 0.9999
    """Largest ``alpha^2``."""

    def __post_init__(self) -> None:
        """Refuse values that describe no schedule."""
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; it must be above 0")
        if not 0 < self.smallest < self.largest < 1:
            raise ValueError(
                f"smallest={self.smallest} and largest={self.largest} must satisfy "
                "0 < smallest < largest < 1"
            )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` at times ``t`` of any shape."""
        log_snr = self.log_snr(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``log(alpha^2 / sigma^2)`` at times ``t``; it falls as ``t`` rises."""
        signal = self._angle(t.float()).cos().square() / self._start().square()
        signal = signal.clamp(self.smallest, self.largest)
        shifted = torch.logit(signal) - 2.0 * math.log(self.shift)
        return shifted.clamp(_logit(self.smallest), _logit(self.largest))

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time that a v3 network is given: where the unshifted cosine has this noise."""
        return self._inverse_cosine(self.log_snr(t).sigmoid())

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which ``log_snr(t)`` has this value (inverse of ``log_snr``)."""
        unshifted = log_snr.float() + 2.0 * math.log(self.shift)
        return self._inverse_cosine(unshifted.sigmoid()).clamp(0.0, 1.0)

    def times(self, num_steps: int, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
        """Return ``num_steps + 1`` equally spaced decreasing times, float32."""
        if num_steps < 1:
            raise ValueError(f"the number of steps is {num_steps}; at least 1 is needed")
        return torch.linspace(t_start, t_end, num_steps + 1)

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1.0 + self.s) * (math.pi / 2)

    def _start(self) -> Tensor:
        return torch.tensor(math.cos(self.s / (1.0 + self.s) * math.pi / 2))

    def _inverse_cosine(self, signal: Tensor) -> Tensor:
        angle = (signal.sqrt() * self._start().to(signal.device)).clamp(-1.0, 1.0).acos()
        return angle / (math.pi / 2) * (1.0 + self.s) - self.s


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability))


def diffuse(x0: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return ``x_t = alpha x0 + sigma noise``.

    Args:
        x0: Clean samples, ``(B, ...)``.
        noise: Standard normal, same shape.
        t: Times, ``(B,)``.
        schedule: Maps times to scales.
    """
    alpha, sigma = (value.view(-1, *[1] * (x0.dim() - 1)) for value in schedule(t))
    return alpha * x0 + sigma * noise
