from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.diffusion.prediction import Prediction, from_x0, target, to_x0
from cascade.diffusion.schedules import CosineSchedule, LinearSchedule

KINDS = st.sampled_from(list(Prediction))
VALUES = st.floats(-5, 5, width=32)
TIMES = st.floats(0.01, 0.95)


@given(x0=VALUES, noise=VALUES, t=TIMES, kind=KINDS)
def test_what_a_network_should_say_is_turned_back_into_x0(
    x0: float, noise: float, t: float, kind: Prediction
) -> None:
    alpha, sigma = CosineSchedule()(torch.tensor(t))
    clean, gaussian = torch.tensor(x0), torch.tensor(noise)
    x_t = alpha * clean + sigma * gaussian
    wanted = target(kind, clean, gaussian, alpha, sigma)
    torch.testing.assert_close(to_x0(wanted, x_t, alpha, sigma, kind), clean, atol=2e-4, rtol=1e-4)


@given(x0=VALUES, noise=VALUES, t=st.floats(0.05, 0.99), kind=KINDS)
def test_x0_is_turned_into_what_a_network_should_say(
    x0: float, noise: float, t: float, kind: Prediction
) -> None:
    alpha, sigma = CosineSchedule()(torch.tensor(t))
    clean, gaussian = torch.tensor(x0), torch.tensor(noise)
    x_t = alpha * clean + sigma * gaussian
    wanted = target(kind, clean, gaussian, alpha, sigma)
    torch.testing.assert_close(
        from_x0(clean, x_t, alpha, sigma, kind), wanted, atol=2e-4, rtol=1e-4
    )


@given(predicted=VALUES, x_t=VALUES, t=st.floats(0.05, 0.95), kind=KINDS)
def test_any_prediction_survives_the_way_over_x0(
    predicted: float, x_t: float, t: float, kind: Prediction
) -> None:
    alpha, sigma = CosineSchedule()(torch.tensor(t))
    said, noised = torch.tensor(predicted), torch.tensor(x_t)
    x0 = to_x0(said, noised, alpha, sigma, kind)
    torch.testing.assert_close(from_x0(x0, noised, alpha, sigma, kind), said, atol=1e-3, rtol=1e-3)


def test_v_is_the_noise_of_a_clean_picture_and_minus_the_picture_of_pure_noise() -> None:
    x0, noise = torch.tensor(3.0), torch.tensor(-2.0)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert target(Prediction.V, x0, noise, one, zero) == noise
    assert target(Prediction.V, x0, noise, zero, one) == -x0
    half = torch.tensor(0.5).sqrt()
    torch.testing.assert_close(target(Prediction.V, x0, noise, half, half), half * (noise - x0))


def test_v_gives_x0_where_no_signal_is_left_unlike_epsilon() -> None:
    alpha, sigma = torch.tensor(0.0), torch.tensor(1.0)
    x0, noise = torch.tensor(3.0), torch.tensor(-2.0)
    v = target(Prediction.V, x0, noise, alpha, sigma)
    assert to_x0(v, noise, alpha, sigma, Prediction.V) == x0
    assert not to_x0(noise, noise, alpha, sigma, Prediction.EPSILON).isfinite()


@given(x0=VALUES, noise=VALUES, t=st.floats(0.0, 1.0))
def test_flow_is_the_velocity_of_the_straight_path_and_gives_x0_all_along_it(
    x0: float, noise: float, t: float
) -> None:
    clean, gaussian = torch.tensor(x0), torch.tensor(noise)
    alpha, sigma = LinearSchedule()(torch.tensor(t))
    x_t = alpha * clean + sigma * gaussian
    velocity = target(Prediction.FLOW, clean, gaussian, alpha, sigma)
    later = LinearSchedule()(torch.tensor(t) + 0.125)
    moved = later[0] * clean + later[1] * gaussian
    torch.testing.assert_close((moved - x_t) / 0.125, velocity, atol=1e-4, rtol=1e-4)
    estimate = to_x0(velocity, x_t, alpha, sigma, Prediction.FLOW)
    torch.testing.assert_close(estimate, clean, atol=1e-4, rtol=1e-4)


def test_scales_of_a_batch_broadcast() -> None:
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    alpha, sigma = (s.view(3, 1, 1, 1) for s in CosineSchedule()(torch.tensor([0.1, 0.5, 0.9])))
    x_t = alpha * x0 + sigma * noise
    for kind in Prediction:
        said = target(kind, x0, noise, alpha, sigma)
        estimate = to_x0(said, x_t, alpha, sigma, kind)
        torch.testing.assert_close(estimate, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["epsilon", "v", "x0", "flow"])
def test_configurations_name_predictions(name: str) -> None:
    assert Prediction(name).value == name
