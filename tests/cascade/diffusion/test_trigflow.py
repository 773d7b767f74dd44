from __future__ import annotations

import math

import pytest
import torch

from cascade.diffusion.discrete import DiscreteSchedule
from cascade.diffusion.prediction import Prediction, target
from cascade.diffusion.schedules import CosineSchedule, LinearSchedule, NoiseSchedule
from cascade.diffusion.trigflow import TrigFlow, along, clean, turned

TIMES = torch.tensor([0.02, 0.1, 0.4, 0.7, 0.95])
SCHEDULES = [
    CosineSchedule(),
    CosineSchedule(2.0),
    CosineSchedule(smallest=0.0),
    LinearSchedule(),
    LinearSchedule(3.0),
]


KNOWN = [  # v is the cosine's
    (schedule, prediction)
    for schedule in SCHEDULES
    for prediction in Prediction
    if prediction is not Prediction.V or isinstance(schedule, CosineSchedule)
]


@pytest.mark.parametrize("time_input", ["cosine", "raw"])
@pytest.mark.parametrize(("schedule", "prediction"), KNOWN, ids=str)
def test_a_network_is_asked_as_its_schedule_asks_it(
    schedule: NoiseSchedule, time_input: str, prediction: Prediction
) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(TIMES), 3, 2, 2, generator=generator)
    flow = TrigFlow(schedule, prediction, time_input)  # type: ignore[arg-type]
    angle = flow.angle_of(TIMES)
    x = turned(x0, noise, angle)
    given, told = flow.told(x, angle)
    alpha, sigma = (along(value, x0) for value in schedule(TIMES))
    torch.testing.assert_close(given, alpha * x0 + sigma * noise, atol=1e-5, rtol=1e-5)
    wanted = schedule.network_time(TIMES) if time_input == "cosine" else TIMES
    torch.testing.assert_close(told, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(flow.time_of(angle), TIMES, atol=1e-5, rtol=0)
    velocity = flow.velocity(target(prediction, x0, noise, alpha, sigma), x, angle)
    truth = along(angle.cos(), x) * noise - along(angle.sin(), x) * x0
    torch.testing.assert_close(velocity, truth, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(clean(velocity, x, angle), x0, atol=3e-5, rtol=1e-4)


def test_angles_end_where_a_schedule_does() -> None:
    assert TrigFlow(LinearSchedule(), Prediction.FLOW).angles == pytest.approx((1e-3, math.pi / 2))
    first, last = TrigFlow(CosineSchedule(), Prediction.V).angles
    assert (first, math.pi / 2 - last) == pytest.approx((0.01, 0.01), abs=1e-5)


def test_what_has_no_angle_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon network says nothing"):
        _ = TrigFlow(CosineSchedule(smallest=0.0), Prediction.EPSILON).angles
    with pytest.raises(ValueError, match="DiscreteSchedule has no form"):
        TrigFlow(DiscreteSchedule(), Prediction.V).told(torch.zeros(1, 2), torch.ones(1))
