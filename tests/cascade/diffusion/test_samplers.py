from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cascade.diffusion.guidance import Denoise
from cascade.diffusion.prediction import Prediction, from_x0
from cascade.diffusion.samplers import (
    SAMPLERS,
    Sampler,
    StepInfo,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
)
from cascade.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, equal_times
from cascade.rng import PictureNoise

ALL = pytest.mark.parametrize("name", sorted(SAMPLERS))
FOLLOWING = pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))
"""Those that follow the path of an estimate of x0; "lcm" wants networks that end it at once."""
DETERMINISTIC = pytest.mark.parametrize("sampler", [sample_ddim, sample_dpmpp_2m])


def _oracle(schedule: NoiseSchedule, mean: float, std: float) -> Denoise:
    """The exact denoiser of N(mean, std^2): the posterior mean of x0 given x_t."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x_t - alpha * mean)

    return denoise


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _source(seed: int):  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


@FOLLOWING
@pytest.mark.parametrize(
    "schedule",
    [
        CosineSchedule(),
        CosineSchedule(shift=2.0),
        CosineSchedule(smallest=0.0),
        LinearSchedule(),
        LinearSchedule(shift=3.0),
    ],
    ids=str,
)
@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.3), (-1.5, 2.0)])
def test_every_sampler_that_follows_draws_the_gaussian_of_its_exact_denoiser(
    name: str, schedule: NoiseSchedule, mean: float, std: float
) -> None:
    x0 = SAMPLERS[name](
        _oracle(schedule, mean, std),
        schedule,
        _noise(64, 1, 16, 16),
        equal_times(250),
        randn_like=_source(1),
    )
    assert float(x0.mean()) == pytest.approx(mean, abs=0.03 * std + 0.01)
    assert float(x0.std()) == pytest.approx(std, rel=0.05)


def test_ddim_in_60_steps_and_ddpm_in_250_give_the_known_numbers() -> None:
    schedule = CosineSchedule()
    start = _noise(64, 1, 32, 32)
    ddim = sample_ddim(_oracle(schedule, 0.7, 0.3), schedule, start, equal_times(60))
    assert float(ddim.mean()) == pytest.approx(0.698, abs=0.004)
    assert float(ddim.std()) == pytest.approx(0.289, abs=0.004)
    ddpm = sample_ddpm(
        *(_oracle(schedule, 0.7, 0.3), schedule, start, equal_times(250)), randn_like=_source(1)
    )
    assert float(ddpm.mean()) == pytest.approx(0.700, abs=0.004)
    assert float(ddpm.std()) == pytest.approx(0.293, abs=0.004)


@pytest.mark.parametrize(
    ("sampler", "least", "most"), [(sample_ddim, 1.9, 2.1), (sample_dpmpp_2m, 3.3, 4.5)]
)
def test_halving_the_step_size_divides_the_error_by_two_to_the_order(
    sampler: Sampler, least: float, most: float
) -> None:
    coarse, fine = (_flow_error(sampler, num_steps) for num_steps in (64, 128))
    assert least < coarse / fine < most


def test_second_order_is_closer_than_first_order_with_the_same_steps() -> None:
    for num_steps in (8, 16, 32):
        assert _flow_error(sample_dpmpp_2m, num_steps) < 0.5 * _flow_error(sample_ddim, num_steps)


def _flow_error(sampler: Sampler, num_steps: int) -> float:
    """Largest error at t = 0.1 of the flow from t = 0.9, which is known for a Gaussian."""
    schedule, mean, std = CosineSchedule(), 0.7, 0.3
    # A sampler returns the estimate of x0, so what it has reached is seen one step later.
    times = torch.cat([torch.linspace(0.9, 0.1, num_steps + 1), torch.tensor([0.0])])
    quantiles = torch.linspace(-2, 2, 9).view(1, 1, 3, 3)

    def exact(t: float) -> Tensor:
        alpha, sigma = schedule(torch.tensor(t))
        return alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * quantiles

    seen: list[StepInfo] = []
    sampler(_oracle(schedule, mean, std), schedule, exact(0.9), times, on_step=seen.append)
    assert seen[-1].t == pytest.approx(0.1)
    return float((seen[-1].x_t - exact(0.1)).abs().max())


def test_2m_takes_the_estimate_at_the_middle_of_steps_of_unequal_length() -> None:
    """Algorithm 2 extrapolates in half log-SNR: exact for an estimate that is linear in it."""
    schedule = CosineSchedule()
    times = torch.tensor([0.8, 0.75, 0.4, 0.3, 0.2])

    def level(t: Tensor) -> Tensor:
        return schedule.log_snr(t) / 2

    seen: list[StepInfo] = []
    sample_dpmpp_2m(
        lambda x, t: level(t).expand(x.shape), schedule, _noise(1), times, on_step=seen.append
    )
    alpha, sigma = schedule(times)
    for i in (1, 2):
        step = level(times[i + 1]) - level(times[i])
        middle = level(times[i]) + step / 2
        # The solution for an estimate that stays at ``middle`` during the step.
        expected = sigma[i + 1] / sigma[i] * seen[i].x_t
        expected = expected + alpha[i + 1] * (1 - torch.exp(-step)) * middle
        torch.testing.assert_close(seen[i + 1].x_t, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule(shift=2.0)], ids=str)
def test_ddim_with_eta_one_equals_ddpm(schedule: NoiseSchedule) -> None:
    arguments = (_oracle(schedule, 0.7, 0.3), schedule, _noise(4, 2, 4, 4), equal_times(12))
    ddim = sample_ddim(*arguments, eta=1.0, randn_like=_source(1))
    ddpm = sample_ddpm(*arguments, randn_like=_source(1))
    torch.testing.assert_close(ddim, ddpm, atol=1e-5, rtol=1e-4)


@ALL
def test_a_right_denoiser_of_one_picture_gives_that_picture(name: str) -> None:
    picture = _noise(2, 3, 4, 4, seed=5)
    schedule = CosineSchedule()
    x0 = SAMPLERS[name](lambda x, t: picture, schedule, _noise(2, 3, 4, 4), equal_times(5))
    assert torch.equal(x0, picture)


@ALL
def test_each_step_costs_one_evaluation_and_is_reported(name: str) -> None:
    schedule, times = CosineSchedule(), equal_times(6)
    asked: list[float] = []
    seen: list[StepInfo] = []
    oracle = _oracle(schedule, 0.7, 0.3)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return oracle(x_t, t)

    start = _noise(1, 1, 4, 4)
    x0 = SAMPLERS[name](denoise, schedule, start, times, randn_like=_source(1), on_step=seen.append)
    assert asked == pytest.approx(times[:-1].tolist())
    assert [(info.index, info.num_steps) for info in seen] == [(i, 6) for i in range(6)]
    assert [info.t for info in seen] == asked
    assert torch.equal(seen[0].x_t, start)
    assert torch.equal(seen[-1].x0_hat, x0)


@ALL
def test_one_step_is_the_first_estimate(name: str) -> None:
    schedule, start = CosineSchedule(), _noise(2, 1, 4, 4)
    oracle = _oracle(schedule, 0.7, 0.3)
    x0 = SAMPLERS[name](oracle, schedule, start, equal_times(1), randn_like=_source(1))
    assert torch.equal(x0, oracle(start, torch.tensor(1.0)))


@FOLLOWING
@pytest.mark.parametrize("shift", [0.25, 4.0])
def test_steps_within_a_clamped_end_of_the_schedule_stay_finite(name: str, shift: float) -> None:
    """A strong shift clamps several steps to one noise level: they have no length."""
    schedule = CosineSchedule(shift=shift)
    times = equal_times(400)
    log_snr = schedule.log_snr(times)
    assert (log_snr.diff() == 0).sum() > 1, "else this test shows nothing"
    x0 = SAMPLERS[name](
        *(_oracle(schedule, 0.7, 0.3), schedule, _noise(16, 1, 16, 16), times),
        randn_like=_source(1),
    )
    assert float(x0.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(x0.std()) == pytest.approx(0.3, abs=0.02)


@ALL
def test_the_same_seed_gives_the_same_sample_and_a_picture_ignores_its_batch(name: str) -> None:
    schedule = CosineSchedule()

    def draw(seeds: list[int]) -> Tensor:
        noise = PictureNoise(seeds, "stage_c")
        start = noise.randn((2, 4, 4))
        arguments = (_oracle(schedule, 0.7, 0.3), schedule, start, equal_times(10))
        return SAMPLERS[name](*arguments, randn_like=noise.randn_like)

    together = draw([3, 4, 5])
    assert torch.equal(together, draw([3, 4, 5]))
    torch.testing.assert_close(together[1:2], draw([4]), atol=1e-6, rtol=1e-6)
    assert (together[0] - together[1]).abs().max() > 0.01


@DETERMINISTIC
def test_deterministic_samplers_draw_no_noise(sampler: Sampler) -> None:
    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("noise was drawn")

    schedule = CosineSchedule()
    x0 = sampler(
        *(_oracle(schedule, 0.7, 0.3), schedule, _noise(1, 1, 4, 4), equal_times(5)),
        randn_like=refuse,
    )
    assert x0.isfinite().all()


@pytest.mark.parametrize("sampler", [sample_ddpm, partial(sample_ddim, eta=0.5)])
def test_stochastic_samplers_draw_noise_from_their_source_alone(sampler: Sampler) -> None:
    schedule, drawn = CosineSchedule(), []

    def draw(x: Tensor) -> Tensor:
        drawn.append(x.shape)
        return torch.zeros_like(x)

    before = torch.get_rng_state()
    start = _noise(2, 1, 4, 4)
    sampler(_oracle(schedule, 0.7, 0.3), schedule, start, equal_times(5), randn_like=draw)
    assert drawn == [start.shape] * 4, "the last step returns the estimate, without noise"
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.reference
def test_ddpm_walks_the_path_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = CosineSchedule()
    oracle = _oracle(schedule, 0.7, 0.3)
    start, num_steps = _noise(2, 4, 8, 8), 20

    seen: list[StepInfo] = []
    x0 = sample_ddpm(
        *(oracle, schedule, start, equal_times(num_steps)),
        randn_like=_source(9),
        on_step=seen.append,
    )

    scheduler = diffusers.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(9)
    x, path = start, []
    for t in scheduler.timesteps[:-1]:
        path.append(x)
        alpha, sigma = schedule(t)
        epsilon = from_x0(oracle(x, t), x, alpha, sigma, Prediction.EPSILON)
        x = scheduler.step(epsilon, t.expand(2), x, generator=generator).prev_sample
    for info, theirs in zip(seen, path, strict=True):
        torch.testing.assert_close(info.x_t, theirs, atol=2e-4, rtol=2e-4)
    # Their end is the mean of a last step to the clamped t = 0; ours is the estimate of x0.
    torch.testing.assert_close(x0, x, atol=0.05, rtol=0)
