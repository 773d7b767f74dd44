from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    check_schedule,
    diffuse,
    equal_times,
)

LIMIT = 9.2102
SHIFTS = st.sampled_from([0.5, 1.0, 2.0, 4.0])
TIMES = st.floats(0.0, 1.0)

# What published Stable Cascade tells its networks over 20 steps.
TIMES_SHIFT_2 = [
    *[0.9936, 0.9750, 0.9497, 0.9240, 0.8975, 0.8701, 0.8413, 0.8110, 0.7785, 0.7436, 0.7056],
    *[0.6640, 0.6179, 0.5665, 0.5089, 0.4441, 0.3715, 0.2906, 0.2018, 0.1063, 0.0071],
]
TIMES_SHIFT_1 = [0.9936, *[0.95 - 0.05 * i for i in range(19)], 0.0023]


@pytest.mark.parametrize(("shift", "expected"), [(1.0, TIMES_SHIFT_1), (2.0, TIMES_SHIFT_2)])
def test_the_network_is_told_the_published_times(shift: float, expected: list[float]) -> None:
    schedule = CosineSchedule(shift=shift)
    told = schedule.network_time(equal_times(20))
    torch.testing.assert_close(told, torch.tensor(expected), atol=6e-5, rtol=0)


def test_the_ends_are_clamped_where_the_published_ones_are() -> None:
    log_snr = CosineSchedule().log_snr(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(log_snr, torch.tensor([LIMIT, -LIMIT]), atol=2e-4, rtol=0)
    alpha, sigma = CosineSchedule()(torch.tensor([0.0, 1.0]))
    expected = torch.tensor([0.9999, 1e-4]).sqrt()
    torch.testing.assert_close(alpha, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(sigma, expected.flip(0), atol=1e-6, rtol=1e-3)


@given(t=st.floats(0.02, 0.98))
def test_alpha_squared_is_the_cosine_formula(t: float) -> None:
    s = 0.008
    angle, start = ((u + s) / (1 + s) * math.pi / 2 for u in (t, 0.0))
    expected = math.cos(angle) ** 2 / math.cos(start) ** 2
    alpha, sigma = CosineSchedule()(torch.tensor(t))
    assert float(alpha) ** 2 == pytest.approx(expected, abs=1e-5)
    assert float(sigma) ** 2 == pytest.approx(1 - expected, abs=1e-5)


@given(t=TIMES, shift=SHIFTS)
def test_variance_is_preserved_and_log_snr_is_that_of_the_scales(t: float, shift: float) -> None:
    schedule = CosineSchedule(shift=shift)
    alpha, sigma = schedule(torch.tensor(t))
    assert float(alpha**2 + sigma**2) == pytest.approx(1.0, abs=1e-5)
    log_snr = float(schedule.log_snr(torch.tensor(t)))
    assert 2 * math.log(float(alpha) / float(sigma)) == pytest.approx(log_snr, abs=1e-3)
    assert abs(log_snr) < LIMIT + 1e-3


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 4.0])
def test_log_snr_falls_with_time(shift: float) -> None:
    log_snr = CosineSchedule(shift=shift).log_snr(torch.linspace(0, 1, 501))
    assert (log_snr.diff() <= 0).all()
    inside = slice(10, 470)  # t in [0.02, 0.94): away from the clamped ends
    assert (log_snr[inside].diff() < 0).all()


@given(t=st.floats(0.05, 0.95), first=SHIFTS, second=SHIFTS)
def test_shifts_lower_log_snr_by_twice_their_logarithm_and_multiply(
    t: float, first: float, second: float
) -> None:
    time = torch.tensor(t)
    plain, both = CosineSchedule(), CosineSchedule(shift=first * second)
    expected = float(plain.log_snr(time)) - 2 * math.log(first) - 2 * math.log(second)
    expected = min(max(expected, -LIMIT), LIMIT)
    assert float(both.log_snr(time)) == pytest.approx(expected, abs=2e-3)


@given(t=st.floats(0.05, 0.95), shift=SHIFTS)
def test_the_network_time_is_where_the_unshifted_schedule_has_this_noise(
    t: float, shift: float
) -> None:
    schedule, time = CosineSchedule(shift=shift), torch.tensor(t)
    told = schedule.network_time(time)
    here, there = schedule.log_snr(time), CosineSchedule().log_snr(told)
    assert float(there) == pytest.approx(float(here), abs=5e-3)
    if shift == 1.0:
        assert float(told) == pytest.approx(t, abs=1e-4)


@given(t=st.floats(0.03, 0.93), shift=st.sampled_from([0.5, 1.0, 2.0]))
def test_time_is_recovered_from_log_snr(t: float, shift: float) -> None:
    schedule = CosineSchedule(shift=shift)
    recovered = schedule.time_from_log_snr(schedule.log_snr(torch.tensor(t)))
    assert float(recovered) == pytest.approx(t, abs=1e-4)


def test_times_fall_in_equal_steps_from_one_end_to_the_other() -> None:
    times = equal_times(8)
    torch.testing.assert_close(times, torch.arange(8, -1, -1) / 8)
    partial = equal_times(2, t_start=0.6, t_end=0.2)
    torch.testing.assert_close(partial, torch.tensor([0.6, 0.4, 0.2]))


def test_a_cosine_with_zero_terminal_snr_ends_at_pure_noise_and_is_the_same_elsewhere() -> None:
    plain, zero = CosineSchedule(), CosineSchedule(smallest=0.0)
    alpha, sigma = zero(torch.tensor([1.0]))
    assert alpha == 0 and sigma == 1
    assert zero.log_snr(torch.tensor(1.0)) == -math.inf
    assert float(zero.network_time(torch.tensor(1.0))) == pytest.approx(1.0, abs=1e-6)
    t = torch.linspace(0, 0.99, 50)
    assert torch.equal(zero.log_snr(t), plain.log_snr(t))
    shifted = CosineSchedule(shift=2.0, smallest=0.0)
    assert shifted(torch.tensor(1.0))[0] == 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_the_linear_schedule_is_a_straight_line_whose_shift_lowers_log_snr(shift: float) -> None:
    t = torch.linspace(0.02, 0.98, 49)
    alpha, sigma = LinearSchedule(shift)(t)
    torch.testing.assert_close(alpha + sigma, torch.ones(49))
    schedule = LinearSchedule(shift)
    torch.testing.assert_close(
        schedule.log_snr(t), LinearSchedule().log_snr(t) - 2 * math.log(shift), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(schedule.log_snr(t), 2 * (alpha / sigma).log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(schedule.time_from_log_snr(schedule.log_snr(t)), t)
    ends = schedule(torch.tensor([0.0, 1.0]))
    assert ends[0].tolist() == [1.0, 0.0] and ends[1].tolist() == [0.0, 1.0]
    if shift == 1.0:
        torch.testing.assert_close(sigma, t)


@pytest.mark.parametrize(
    ("name", "prediction", "zero", "message"),
    [
        ("cosine", "epsilon", True, "use v, flow or x0"),
        ("linear", "epsilon", False, "use flow or x0"),
        ("linear", "v", False, "use flow"),
        ("linear", "flow", True, "zero_terminal_snr is for the cosine"),
    ],
)
def test_schedules_on_which_a_prediction_says_nothing_are_refused(
    name: str, prediction: str, zero: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_schedule(name, prediction, zero)


def test_half_precision_times_are_computed_in_float32() -> None:
    t = torch.tensor([0.25, 0.5], dtype=torch.bfloat16)  # both exact in bfloat16
    alpha, sigma = CosineSchedule()(t)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha, CosineSchedule()(t.float())[0])


def test_diffusing_gives_every_sample_its_own_noise_level() -> None:
    x0, noise = torch.full((2, 3, 1, 1), 2.0), torch.full((2, 3, 1, 1), -1.0)
    t = torch.tensor([0.1, 0.8])
    alpha, sigma = CosineSchedule()(t)
    x_t = diffuse(x0, noise, t, CosineSchedule())
    torch.testing.assert_close(x_t[:, 0, 0, 0], 2.0 * alpha - sigma)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"smallest": 0.9, "largest": 0.1}, "0 <= smallest < largest < 1"),
        ({"largest": 1.0}, "largest=1.0"),
        ({"smallest": -0.1}, "smallest=-0.1"),
    ],
)
def test_values_that_describe_no_schedule_are_refused(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CosineSchedule(**values)


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"number of steps is {num_steps}"):
        equal_times(num_steps)


@pytest.mark.reference
def test_the_scales_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    t = torch.linspace(0, 1, 101)
    theirs = diffusers.DDPMWuerstchenScheduler()._alpha_cumprod(t, torch.device("cpu"))
    alpha, sigma = CosineSchedule()(t)
    torch.testing.assert_close(alpha.square(), theirs, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(sigma.square(), 1 - theirs, atol=2e-6, rtol=1e-4)
