"""The discrete schedule of SD and SDXL, and the timesteps at which its samplers stop.

These networks were trained at 1000 timesteps, whose betas are spaced evenly in their square roots.
Here timestep k is the time ``(k + 1) / 1000``: t = 0 is the clean picture, which is no timestep.

References: Rombach et al., 2022, arXiv:2112.10752 (the schedule); Lin et al., 2023,
arXiv:2305.08891, table 2 (the spacings).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
NUM_TIMESTEPS = 1000
_SNAP = 2e-4


@dataclass(frozen=True)
class DiscreteSchedule:
    """SD's and SDXL's schedule; between two timesteps ``sigma / alpha`` is interpolated linearly.

    All values are float32. Of the sampler's two measures, ``sigma / alpha`` is what the
    variance-exploding form of the same process calls sigma: 0.03 to 14.6.
    """

    beta_start: float = 0.00085
    """Noise that the first timestep adds."""
    beta_end: float = 0.012
    """Noise that the last timestep adds."""

    def __post_init__(self) -> None:
        """Refuse values that describe no schedule."""
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start={self.beta_start} and beta_end={self.beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1"
            )

    @property
    def ends_at_noise(self) -> bool:
        """Whether no signal is left at t = 1: never; 0.5 % of the variance is."""
        return False

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(alpha, sigma)`` at times ``t`` of any shape."""
        ratio = self._ratio(t)
        alpha = (ratio.square() + 1.0).rsqrt()
        return alpha, ratio * alpha

    def log_snr(self, t: Tensor) -> Tensor:
        """Return ``log(alpha^2 / sigma^2)``; infinite at t = 0."""
        return -2.0 * self._ratio(t).log()

    def network_time(self, t: Tensor) -> Tensor:
        """Return the timestep that a network is told, 0 to 999; it may be fractional."""
        timestep = t.float() * NUM_TIMESTEPS - 1.0
        # float32 has no thousandths: what is a whole timestep must reach the network as one.
        whole = timestep.round()
        return torch.where((timestep - whole).abs() < _SNAP, whole, timestep)

    def time_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the time at which ``log_snr(t)`` has this value (inverse of ``log_snr``)."""
        ratio = (-0.5 * log_snr.float()).exp()
        known = _ratios(self.beta_start, self.beta_end).to(ratio.device)
        above = torch.searchsorted(known, ratio).clamp(1, NUM_TIMESTEPS)
        low, high = known[above - 1], known[above]
        return (above - 1 + ((ratio - low) / (high - low)).clamp(0.0, 1.0)) / NUM_TIMESTEPS

    def _ratio(self, t: Tensor) -> Tensor:
        """Return ``sigma / alpha``."""
        known = _ratios(self.beta_start, self.beta_end).to(t.device)
        position = (self.network_time(t) + 1.0).clamp(0.0, NUM_TIMESTEPS)
        below = position.floor().long().clamp(max=NUM_TIMESTEPS - 1)
        share = position - below
        return known[below] * (1.0 - share) + known[below + 1] * share


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # whoever asks first, training may ask next
def _ratios(beta_start: float, beta_end: float) -> Tensor:
    """Return ``sigma / alpha`` of the clean picture and of every timestep, ``(1001,)``."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64)
    signal = (1.0 - betas.square()).cumprod(0)  # alpha^2
    ratios = ((1.0 - signal) / signal).sqrt()
    return torch.cat([torch.zeros(1, dtype=torch.float64), ratios]).float()


def time_of(timesteps: Tensor) -> Tensor:
    """Return the times of timesteps, float32."""
    return ((timesteps.double() + 1.0) / NUM_TIMESTEPS).float()


def spaced_timesteps(
    num_steps: int,
    spacing: Spacing,
    *,
    offset: int = 0,
    whole: bool = True,
    ends: bool = False,
) -> Tensor:
    """Return the timesteps at which a network is asked, falling, ``(num_steps,)`` float64.

    Args:
        num_steps: Evaluations of the network.
        spacing: "leading" begins below the last timestep and ends at ``offset``; "trailing" begins
            at the last and ends above the first; "linspace" spans both.
        offset: Added by "leading": 1 as published.
        whole: Whether "linspace" is rounded; Euler's samplers take fractions.
        ends: Whether the end of the way counts as a step, as diffusers' DPM-Solver++ has it: the
            grid is then that of one step more, without its last.

    Raises:
        ValueError: For a number of steps that leads beyond the schedule.
    """
    if not 1 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"{num_steps} steps: 1 to {NUM_TIMESTEPS} are possible")
    if spacing == "trailing":
        timesteps = torch.arange(
            NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps, dtype=torch.float64
        ).round()
        return timesteps[:num_steps] - 1.0
    count = num_steps + ends
    if spacing == "leading":
        stride = NUM_TIMESTEPS // count
        first = stride if ends else 0
        timesteps = first + stride * torch.arange(num_steps, dtype=torch.float64) + offset
        if timesteps[-1] > NUM_TIMESTEPS - 1:
            raise ValueError(
                f"{num_steps} steps with leading spacing and an offset of {offset} lead beyond the "
                "schedule; take fewer, or another spacing"
            )
        return timesteps.flip(0)
    # Not torch.linspace, which counts from both sides: halves are then rounded otherwise.
    stride_wide = (NUM_TIMESTEPS - 1) / max(1, count - 1)
    timesteps = (torch.arange(count, dtype=torch.float64) * stride_wide)[ends:]
    return (timesteps.round() if whole else timesteps).flip(0)


def lcm_timesteps(num_steps: int, trained_steps: int = 50) -> Tensor:
    """Return the timesteps of few-step consistency sampling, falling, ``(num_steps,)`` float64.

    They are among the ``trained_steps`` at which the consistency model learned.

    Raises:
        ValueError: For more steps than it learned at.

    Reference: Luo et al., 2023, arXiv:2310.04378, section 4.3.
    """
    if not 1 <= num_steps <= trained_steps:
        raise ValueError(
            f"{num_steps} steps: the sampler lcm takes 1 to {trained_steps}, at which consistency "
            "models are trained"
        )
    stride = NUM_TIMESTEPS // trained_steps
    learned = torch.arange(trained_steps, 0, -1, dtype=torch.float64) * stride - 1.0
    picked = torch.arange(num_steps, dtype=torch.float64) * trained_steps / num_steps
    return learned[picked.floor().long()]
