"""Noise schedules: diffusion time to signal and noise scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps times ``t`` in [0, 1] to ``(alpha, sigma)`` of ``x_t = alpha x0 + sigma noise``."""


class NoiseSchedule(Protocol):
    """A schedule with all that training and sampling ask of one."""

    @property
    def ends_at_noise(self) -> bool:
        """Whether no signal is left at t = 1 (zero terminal SNR)."""
        ...

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` at times ``t`` of any shape."""
        ...

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``log(alpha^2 / sigma^2)`` at times ``t``; it falls as ``t`` rises."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time that a network is told: where the unshifted schedule has this noise."""
        ...

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which ``log_snr(t)`` has this value."""
        ...


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
    """Smallest ``alpha^2``; 0 ends at pure noise (zero terminal SNR), where no epsilon network
    can be asked. Reference: Lin et al., 2023, arXiv:2305.08891, section 3.1."""
    largest: float = 0.9999
    """Largest ``alpha^2``."""

    def __post_init__(self) -> None:
        """Refuse values that describe no schedule."""
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; it must be above 0")
        if not 0 <= self.smallest < self.largest < 1:
            raise ValueError(
                f"smallest={self.smallest} and largest={self.largest} must satisfy "
                "0 <= smallest < largest < 1"
            )

    @property
    def ends_at_noise(self) -> bool:
        """Whether no signal is left at t = 1."""
        return self.smallest == 0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` at times ``t`` of any shape."""
        log_snr = self.log_snr(t)
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``log(alpha^2 / sigma^2)`` at times ``t``; it falls as ``t`` rises."""
        signal = self._angle(t.float()).cos().square() / self._start().square()
        signal = signal.clamp(self.smallest, self.largest)
        if self.smallest == 0:  # the cosine of float32's pi / 2 is not quite 0
            signal = torch.where(t >= 1, 0.0, signal)
        shifted = torch.logit(signal) - 2.0 * math.log(self.shift)
        return shifted.clamp(_logit(self.smallest), _logit(self.largest))

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time that a v3 network is given: where the unshifted cosine has this noise."""
        return self._inverse_cosine(self.log_snr(t).sigmoid())

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which ``log_snr(t)`` has this value (inverse of ``log_snr``)."""
        unshifted = log_snr.float() + 2.0 * math.log(self.shift)
        return self._inverse_cosine(unshifted.sigmoid()).clamp(0.0, 1.0)

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.s) / (1.0 + self.s) * (math.pi / 2)

    def _start(self) -> Tensor:
        return torch.tensor(math.cos(self.s / (1.0 + self.s) * math.pi / 2))

    def _inverse_cosine(self, signal: Tensor) -> Tensor:
        angle = (signal.sqrt() * self._start().to(signal.device)).clamp(-1.0, 1.0).acos()
        return angle / (math.pi / 2) * (1.0 + self.s) - self.s


def _logit(probability: float) -> float:
    return math.log(probability / (1.0 - probability)) if probability > 0 else -math.inf


@dataclass(frozen=True)
class LinearSchedule:
    """The straight path of flow matching: ``alpha = 1 - sigma``, ``sigma = t``, from data to noise.

    ``alpha^2 + sigma^2`` is not 1 on it; its ends are exactly clean and exactly noise.

    References: Lipman et al., 2022, arXiv:2210.02747; Liu et al., 2022, arXiv:2209.03003; shift:
    Esser et al., 2024, arXiv:2403.03206, eq. 23, which lowers log-SNR by ``2 ln k`` as that of
    the cosine does.
    """

    shift: float = 1.0
    """Resolution shift k."""

    def __post_init__(self) -> None:
        """Refuse values that describe no schedule."""
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; it must be above 0")

    @property
    def ends_at_noise(self) -> bool:
        """Whether no signal is left at t = 1: always."""
        return True

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` at times ``t`` of any shape."""
        sigma = self.network_time(t)
        return 1.0 - sigma, sigma

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``log(alpha^2 / sigma^2)``; infinite at the ends."""
        return -2.0 * torch.logit(self.network_time(t))

    def network_time(self, t: Tensor) -> Tensor:
        """Return the time that a network is told: the share of noise."""
        t = t.float()
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which ``log_snr(t)`` has this value (inverse of ``log_snr``)."""
        sigma = (-0.5 * log_snr.float()).sigmoid()
        return sigma / (self.shift - (self.shift - 1.0) * sigma)


def equal_times(num_steps: int, t_start: float = 1.0, t_end: float = 0.0) -> Tensor:
    """Return ``num_steps + 1`` equally spaced decreasing times, float32."""
    if num_steps < 1:
        raise ValueError(f"the number of steps is {num_steps}; at least 1 is needed")
    return torch.linspace(t_start, t_end, num_steps + 1)


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


def make_schedule(
    name: Literal["cosine", "linear"], shift: float = 1.0, *, zero_terminal_snr: bool = False
) -> NoiseSchedule:
    """Return the schedule that a configuration names."""
    if name == "linear":
        return LinearSchedule(shift)
    return CosineSchedule(shift, smallest=0.0) if zero_terminal_snr else CosineSchedule(shift)


def check_schedule(name: str, prediction: str, zero_terminal_snr: bool) -> None:
    """Refuse a schedule on which a prediction says nothing.

    Raises:
        ValueError: At pure noise epsilon is the input itself; v is defined on the cosine alone.
    """
    if name == "linear" and prediction == "v":
        raise ValueError("prediction is v, which the linear schedule does not know; use flow")
    if name == "linear" and zero_terminal_snr:
        raise ValueError(
            "zero_terminal_snr is for the cosine; the linear schedule ends at 0 anyway"
        )
    if prediction == "epsilon" and (name == "linear" or zero_terminal_snr):
        raise ValueError(
            "prediction is epsilon, but the schedule ends at pure noise, where epsilon says "
            "nothing of the picture; use " + ("flow or x0" if name == "linear" else "v, flow or x0")
        )
