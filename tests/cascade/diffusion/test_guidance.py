from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import Guided, is_within, unguided
from cascade.diffusion.prediction import Prediction, from_x0
from cascade.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule, equal_times

T = torch.tensor(0.6)
SCHEDULE = CosineSchedule()


class Fake:
    """Predicts x0 as ``tanh(x_t) + cond`` and counts the pictures it is asked for."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.denoiser = Denoiser(self, SCHEDULE, Prediction.X0)

    def __call__(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(len(x))
        assert len(cond) == len(x)
        return x.tanh() + cond


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def cond() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def uncond() -> Tensor:
    return 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def x_t() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(3))


def _guided(fake: Fake, cond: Tensor, uncond: Tensor, scale: object, **settings: object) -> Guided:
    return Guided(fake.denoiser, cond, torch.cat([cond, uncond]), scale, **settings)  # type: ignore[arg-type]


def _epsilon(x0: Tensor, x_t: Tensor) -> Tensor:
    return from_x0(x0, x_t, *SCHEDULE(T), Prediction.EPSILON)


def test_a_scale_of_1_is_the_conditional_estimate_at_the_cost_of_one_pass(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    guided = _guided(fake, cond, uncond, 1.0, rescale=0.7)(x_t, T)
    assert torch.equal(guided, unguided(fake.denoiser, cond)(x_t, T))
    assert fake.batches == [3, 3]


def test_a_scale_of_0_is_the_unconditional_estimate(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    torch.testing.assert_close(_guided(fake, cond, uncond, 0.0)(x_t, T), x_t.tanh() + uncond)


def test_both_estimates_are_one_batch_and_the_difference_is_scaled(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    guided = _guided(fake, cond, uncond, 4.0)(x_t, T)
    torch.testing.assert_close(guided, x_t.tanh() + uncond + 4.0 * (cond - uncond))
    assert fake.batches == [6]


def test_guiding_x0_is_guiding_epsilon(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    guided = _epsilon(_guided(fake, cond, uncond, 4.0)(x_t, T), x_t)
    eps_cond, eps_uncond = (_epsilon(x_t.tanh() + c, x_t) for c in (cond, uncond))
    torch.testing.assert_close(guided, torch.lerp(eps_uncond, eps_cond, 4.0), atol=1e-4, rtol=1e-4)


def test_a_whole_rescale_gives_each_picture_the_deviation_of_its_conditional_epsilon(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    spread = lambda x: x.flatten(1).std(dim=1)  # noqa: E731
    plain = _epsilon(_guided(fake, cond, uncond, 5.0)(x_t, T), x_t)
    rescaled = _epsilon(_guided(fake, cond, uncond, 5.0, rescale=1.0)(x_t, T), x_t)
    wanted = spread(_epsilon(x_t.tanh() + cond, x_t))
    torch.testing.assert_close(spread(rescaled), wanted, atol=1e-4, rtol=1e-4)
    assert ((spread(plain) / wanted - 1).abs() > 0.1).all(), "else this test shows nothing"


def test_a_rescale_of_0_7_is_the_published_mixture(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    one = slice(0, 1)  # published with the deviation of the whole batch: alike for one picture
    rescaled = _guided(fake, cond[one], uncond[one], 4.0, rescale=0.7)(x_t[one], T)
    eps_cond = _epsilon(x_t[one].tanh() + cond[one], x_t[one])
    eps = _epsilon(_guided(fake, cond[one], uncond[one], 4.0)(x_t[one], T), x_t[one])
    expected = 0.7 * eps * eps_cond.std() / eps.std() + 0.3 * eps
    torch.testing.assert_close(_epsilon(rescaled, x_t[one]), expected, atol=1e-4, rtol=1e-4)


def test_a_rescaled_picture_does_not_depend_on_its_neighbours(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    uncond = uncond * torch.tensor([1.0, 5.0, 9.0]).view(3, 1, 1, 1)
    together = _guided(fake, cond, uncond, 4.0, rescale=0.7)(x_t, T)
    alone = _guided(fake, cond[:1], uncond[:1], 4.0, rescale=0.7)(x_t[:1], T)
    torch.testing.assert_close(together[:1], alone)


@pytest.mark.parametrize(
    ("t", "passes"), [(0.1, 1), (0.25, 2), (0.5, 2), (0.75, 2), (0.76, 1), (1.0, 1)]
)
def test_outside_its_interval_guidance_costs_and_changes_nothing(
    fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor, t: float, passes: int
) -> None:
    guided = _guided(fake, cond, uncond, 4.0, interval=(0.25, 0.75))(x_t, torch.tensor(t))
    assert fake.batches == [3 * passes]
    changed = not torch.allclose(guided, x_t.tanh() + cond)
    assert changed == (passes == 2)


def test_a_scale_may_depend_on_time(fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor) -> None:
    guided = _guided(fake, cond, uncond, lambda t: 1.0 + 2.0 * t)
    torch.testing.assert_close(
        guided(x_t, torch.tensor(0.5)), x_t.tanh() + uncond + 2.0 * (cond - uncond)
    )
    torch.testing.assert_close(guided(x_t, torch.tensor(0.0)), x_t.tanh() + cond)


@pytest.mark.parametrize("schedule", [CosineSchedule(smallest=0.0), LinearSchedule()], ids=str)
def test_pure_noise_is_rescaled_in_x0(
    schedule: NoiseSchedule, fake: Fake, cond: Tensor, uncond: Tensor, x_t: Tensor
) -> None:
    """Where no signal is left, an estimate of x0 has no epsilon."""
    denoiser = Denoiser(fake, schedule, Prediction.X0)
    pair = torch.cat([cond, uncond])
    plain = Guided(denoiser, cond, pair, 5.0)(x_t, torch.tensor(1.0))
    whole = Guided(denoiser, cond, pair, 5.0, rescale=1.0)(x_t, torch.tensor(1.0))
    wanted = denoiser(x_t, torch.tensor(1.0), cond).std(dim=(1, 2, 3))
    torch.testing.assert_close(whole.std(dim=(1, 2, 3)), wanted)
    half = Guided(denoiser, cond, pair, 5.0, rescale=0.5)(x_t, torch.tensor(1.0))
    torch.testing.assert_close(half, (plain + whole) / 2)


def test_both_ends_of_an_interval_are_in_it_as_float32_has_them() -> None:
    times = equal_times(10)
    assert [is_within(float(time), (0.1, 0.7)) for time in times] == [False] * 3 + [True] * 7 + [
        False
    ]
