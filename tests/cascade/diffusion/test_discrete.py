"""The discrete schedule of SD and SDXL, its timesteps, and few-step sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.diffusion.discrete import (
    DiscreteSchedule,
    lcm_timesteps,
    spaced_timesteps,
    time_of,
)
from cascade.diffusion.guidance import consistent
from cascade.diffusion.samplers import sample_ddim, sample_lcm
from cascade.diffusion.schedules import equal_times

SCHEDULE = DiscreteSchedule()


def test_the_published_noise_levels() -> None:
    """FACTS_UNET 2.4: trailing with 10 steps spans 14.61 to 0.34, leading starts at 8.39."""
    trailing, leading = (spaced_timesteps(10, one, offset=1) for one in ("trailing", "leading"))
    assert trailing.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert leading.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]

    def level(timestep: Tensor) -> float:
        alpha, sigma = SCHEDULE(time_of(timestep))
        return float(sigma / alpha)

    assert level(trailing[0]) == pytest.approx(14.61, abs=0.01)
    assert level(trailing[-1]) == pytest.approx(0.34, abs=0.01)
    assert level(leading[0]) == pytest.approx(8.39, abs=0.01)


def test_the_network_is_told_whole_timesteps_exactly() -> None:
    timesteps = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(SCHEDULE.network_time(time_of(timesteps)), timesteps.float())
    half = SCHEDULE.network_time(time_of(timesteps[:-1] + 0.5))
    torch.testing.assert_close(half, timesteps[:-1].float() + 0.5, atol=1e-4, rtol=0)


def test_log_snr_falls_is_that_of_the_scales_and_is_inverted() -> None:
    t = torch.linspace(0.001, 1.0, 777)
    log_snr = SCHEDULE.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    alpha, sigma = SCHEDULE(t)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t))
    torch.testing.assert_close(2 * (alpha / sigma).log(), log_snr, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(SCHEDULE.time_from_log_snr(log_snr), t, atol=1e-6, rtol=0)
    clean = SCHEDULE(torch.tensor(0.0))
    assert (float(clean[0]), float(clean[1])) == (1.0, 0.0)


def test_the_schedule_may_be_asked_in_inference_first_and_trained_on_after() -> None:
    schedule = DiscreteSchedule(0.001, 0.013)
    with torch.inference_mode():
        schedule(torch.tensor([0.5]))
    x = torch.ones(1, requires_grad=True)
    alpha, sigma = schedule(torch.tensor([0.5]))
    (alpha * x + sigma).square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("steps", [0, 1000])
def test_steps_that_lead_beyond_the_schedule_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"1 to 1000|beyond the schedule"):
        spaced_timesteps(steps, "leading", offset=1)
    with pytest.raises(ValueError, match="1 to 50"):
        lcm_timesteps(steps)


@pytest.mark.reference
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 25, 30, 50, 250])
def test_timesteps_and_levels_are_those_of_diffusers(spacing: Any, steps: int) -> None:
    import diffusers

    base = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    grids = {
        "EulerDiscreteScheduler": dict(whole=False),
        "EulerAncestralDiscreteScheduler": dict(whole=False),
        "DDIMScheduler": dict(),
        "DPMSolverMultistepScheduler": dict(ends=True),
    }
    for name, grid in grids.items():
        theirs = getattr(diffusers, name)(**base, timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        ours = spaced_timesteps(steps, spacing, offset=1, **grid)
        torch.testing.assert_close(ours, theirs.timesteps.double(), atol=1e-4, rtol=0)
        if name.startswith("Euler"):
            alpha, sigma = SCHEDULE(time_of(ours))
            torch.testing.assert_close(sigma / alpha, theirs.sigmas[:-1], atol=1e-5, rtol=2e-5)
    if steps <= 50:
        lcm = diffusers.LCMScheduler(**base)
        lcm.set_timesteps(steps)
        assert lcm_timesteps(steps).tolist() == lcm.timesteps.tolist()


def test_lcm_jumps_to_the_estimate_and_noises_it_afresh() -> None:
    asked: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x)
        return torch.full_like(x, 3.0)

    x = torch.zeros(1, 1, 4, 4)
    times = time_of(torch.tensor([999.0, 499.0, -1.0]))
    made = sample_lcm(denoise, SCHEDULE, x, times, randn_like=torch.ones_like)
    alpha, sigma = SCHEDULE(times[1])
    torch.testing.assert_close(asked[1], torch.full_like(x, float(3 * alpha + sigma)))
    assert torch.equal(made, torch.full_like(x, 3.0)) and len(asked) == 2


def test_a_consistency_function_is_the_identity_without_noise() -> None:
    call = consistent(lambda x, t: torch.zeros_like(x), SCHEDULE.network_time)
    x = torch.ones(1, 1, 2, 2)
    torch.testing.assert_close(call(x, time_of(torch.tensor(0.0))), x)
    assert float(call(x, time_of(torch.tensor(999.0))).abs().max()) < 1e-6


def test_ddim_may_end_at_the_sample_of_its_last_time() -> None:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, 2.0)

    x = torch.full((1, 1, 2, 2), 0.5)
    times = equal_times(4, 0.9, 0.1)
    ended = sample_ddim(denoise, SCHEDULE, x, times, last="mean")
    alpha, sigma = SCHEDULE(times)
    noise = (0.5 - 2.0 * alpha[0]) / sigma[0]  # the estimate is constant, and so is the noise
    torch.testing.assert_close(ended, torch.full_like(x, float(2 * alpha[-1] + sigma[-1] * noise)))
