"""Samplers: functions of a denoiser, a schedule, a start and decreasing times.

All return the last estimate of x0, as the published code does, and draw noise only through
``randn_like``, so that a picture's noise can come from its own generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from cascade.diffusion.guidance import Denoise
from cascade.diffusion.schedules import Schedule

RandnLike = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class StepInfo:
    """What a sampler tells its observer after each step."""

    index: int
    num_steps: int
    t: float
    x_t: Tensor
    x0_hat: Tensor


OnStep = Callable[[StepInfo], None]


class Sampler(Protocol):
    """The one signature of all samplers."""

    def __call__(
        self,
        denoise: Denoise,
        schedule: Schedule,
        x: Tensor,
        times: Tensor,
        *,
        randn_like: RandnLike = ...,
        on_step: OnStep | None = ...,
    ) -> Tensor:
        """Integrate from ``x`` at ``times[0]`` to ``times[-1]``."""
        ...


def sample_ddim(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    last: Literal["x0", "mean"] = "x0",
    randn_like: RandnLike = torch.randn_like,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate with DDIM.

    In ``x / alpha`` and ``sigma / alpha`` this is Euler's method, and with ``eta=1`` the ancestral
    one: Euler's samplers differ in their times alone.

    Args:
        denoise: Maps ``(x_t, t)`` to an estimate of x0.
        schedule: Maps times to ``(alpha, sigma)``.
        x: Sample at ``times[0]``, ``(B, C, H, W)``; standard normal noise if that is 1.
        times: Decreasing times in [0, 1], ``(num_steps + 1,)``.
        eta: 0 is deterministic, 1 equals DDPM.
        last: What is returned: the last estimate of x0, or the sample at ``times[-1]``, as SD's
            DDIM has it, whose last time is the first timestep.
        randn_like: Source of fresh noise when ``eta > 0``.
        on_step: Called after each step.

    Returns:
        See ``last``; float32, same shape as ``x``.

    Reference: Song et al., 2021, arXiv:2010.02502, eq. 12 and 16.
    """
    x0 = x
    num_steps = len(times) - 1
    scales = _scales(schedule, times, x)
    for index, t in enumerate(times[:-1]):
        x0 = denoise(x, t)
        (alpha, sigma), (alpha_next, sigma_next) = scales[index], scales[index + 1]
        if on_step is not None:
            on_step(StepInfo(index, num_steps, float(t), x, x0))
        if index + 1 == num_steps and last == "x0":
            break
        noise = (x - alpha * x0) / sigma
        # Standard deviation of the fresh noise: eq. 16 times eta.
        fresh = (
            eta * (sigma_next / sigma) * _step_variance(alpha, sigma, alpha_next, sigma_next).sqrt()
        )
        kept = (sigma_next.square() - fresh.square()).clamp(0).sqrt()
        x = alpha_next * x0 + kept * noise
        if eta > 0:
            x = x + fresh * randn_like(x)
    return x0 if last == "x0" else x


def sample_ddpm(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    last: Literal["x0", "mean"] = "x0",
    randn_like: RandnLike = torch.randn_like,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample the posterior ``q(x_s | x_t, x0_hat)`` at each step.

    Arguments and result are those of ``sample_ddim``; with ``last="mean"`` the result is the mean
    of the last step's posterior instead, as in Würstchen v2 and diffusers.

    Reference: Ho et al., 2020, arXiv:2006.11239, eq. 6-7.
    """
    x0 = x
    num_steps = len(times) - 1
    scales = _scales(schedule, times, x)
    for index, t in enumerate(times[:-1]):
        x0 = denoise(x, t)
        (alpha, sigma), (alpha_next, sigma_next) = scales[index], scales[index + 1]
        if on_step is not None:
            on_step(StepInfo(index, num_steps, float(t), x, x0))
        if index + 1 == num_steps and last == "x0":
            break
        step_alpha = alpha / alpha_next  # x_t = step_alpha x_s + sqrt(step_variance) noise
        step_variance = _step_variance(alpha, sigma, alpha_next, sigma_next)
        variance = step_variance * (sigma_next / sigma).square()
        mean = (
            alpha_next * step_variance * x0 + step_alpha * sigma_next.square() * x
        ) / sigma.square()
        if index + 1 == num_steps:
            return mean
        x = mean + variance.sqrt() * randn_like(x)
    return x0


def sample_dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    randn_like: RandnLike = torch.randn_like,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate with DPM-Solver++ 2M: second order from one evaluation a step, deterministic.

    Arguments and result are those of ``sample_ddim``; ``randn_like`` is not used.

    Reference: Lu et al., 2022, arXiv:2211.01095, algorithm 2.
    """
    del randn_like
    x0 = x
    previous: tuple[Tensor, Tensor] | None = None  # (x0_hat, step in half log-SNR)
    steps = _half_log_snr_steps(schedule, times)
    num_steps = len(times) - 1
    scales = _scales(schedule, times, x)
    for index, t in enumerate(times[:-1]):
        x0 = denoise(x, t)
        (alpha, sigma), (alpha_next, sigma_next) = scales[index], scales[index + 1]
        if on_step is not None:
            on_step(StepInfo(index, num_steps, float(t), x, x0))
        if index + 1 == num_steps:
            break
        step = (alpha_next / sigma_next).log() - (alpha / sigma).log()
        slope = x0
        # A step from or to a clamped end of the schedule has no length: first order there.
        if previous is not None and steps[index - 1] > 0 and steps[index] > 0:
            ratio = previous[1] / step
            slope = x0 + (x0 - previous[0]) / (2.0 * ratio)
        x = (sigma_next / sigma) * x - alpha_next * torch.expm1(-step) * slope
        previous = (x0, step)
    return x0


def sample_lcm(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    *,
    randn_like: RandnLike = torch.randn_like,
    on_step: OnStep | None = None,
) -> Tensor:
    """Jump to the estimate of x0 and noise it afresh, again and again: few-step sampling.

    Arguments and result are those of ``sample_ddim``; ``denoise`` is a consistency model.

    Reference: Song et al., 2023, arXiv:2303.01469, algorithm 1.
    """
    x0 = x
    num_steps = len(times) - 1
    scales = _scales(schedule, times, x)
    for index, t in enumerate(times[:-1]):
        x0 = denoise(x, t)
        if on_step is not None:
            on_step(StepInfo(index, num_steps, float(t), x, x0))
        if index + 1 < num_steps:
            alpha_next, sigma_next = scales[index + 1]
            x = alpha_next * x0 + sigma_next * randn_like(x)
    return x0


def _scales(schedule: Schedule, times: Tensor, like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (alpha, sigma) at all times, as scalars on the device of ``like``.

    Before the first step: within the loop nothing is copied to the device.
    """
    alphas, sigmas = schedule(times.to(like.device))
    return list(zip(alphas.unbind(), sigmas.unbind(), strict=True))


def _half_log_snr_steps(schedule: Schedule, times: Tensor) -> list[float]:
    """Return how far each step goes, computed on the CPU: to ask the device is to wait for it."""
    alphas, sigmas = schedule(times.cpu())
    return (alphas / sigmas).log().diff().tolist()


def _step_variance(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """Return the variance that the forward process adds between two times, on any schedule."""
    return (sigma.square() - (alpha / alpha_next * sigma_next).square()).clamp(0)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpmpp_2m": sample_dpmpp_2m,
    "lcm": sample_lcm,
}
"""What ``--sampler`` takes."""
