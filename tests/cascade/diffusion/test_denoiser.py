from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.prediction import Prediction, target
from cascade.diffusion.schedules import CosineSchedule, diffuse


@pytest.mark.parametrize("kind", list(Prediction))
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_a_network_that_is_right_gives_x0_whatever_it_predicts(
    kind: Prediction, shift: float
) -> None:
    schedule = CosineSchedule(shift=shift)
    t = torch.tensor([0.2, 0.5, 0.8])
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    alpha, sigma = (scale.view(3, 1, 1, 1) for scale in schedule(t))
    denoiser = Denoiser(lambda *_: target(kind, x0, noise, alpha, sigma), schedule, kind)
    estimate = denoiser(diffuse(x0, noise, t, schedule), t, None)
    torch.testing.assert_close(estimate, x0, atol=1e-4, rtol=1e-4)


def test_a_network_keeps_its_estimate_under_another_schedule() -> None:
    """The time it is told is that of the noise it sees, so a shift moves t and nothing else."""

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        return time.view(-1, 1) * x.tanh()

    plain, shifted = CosineSchedule(), CosineSchedule(shift=2.0)
    x_t, t = torch.randn(5, 3), torch.linspace(0.2, 0.8, 5)
    other_t = shifted.time_from_log_snr(plain.log_snr(t))
    assert (other_t - t).abs().min() > 0.01
    here = Denoiser(network, plain)(x_t, t, None)
    there = Denoiser(network, shifted)(x_t, other_t, None)
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("time_input", "expected"), [("cosine", 0.9936), ("raw", 1.0)])
def test_a_v3_network_is_told_the_clamped_time_and_a_v2_network_the_raw_one(
    time_input: str, expected: float
) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        seen.append(time)
        return x

    Denoiser(network, CosineSchedule(), time_input=time_input)(  # type: ignore[arg-type]
        torch.zeros(2, 1, 1, 1), torch.tensor(1.0), None
    )
    assert seen[0].shape == (2,)
    torch.testing.assert_close(seen[0], torch.full((2,), expected), atol=6e-5, rtol=0)


def test_the_network_works_in_its_format_and_its_time_and_estimate_stay_float32() -> None:
    seen: list[torch.dtype] = []
    marker = object()

    def network(x: Tensor, time: Tensor, cond: object) -> Tensor:
        seen.extend((x.dtype, time.dtype))
        assert cond is marker, "a condition is passed through unopened"
        return x

    denoiser = Denoiser(network, CosineSchedule(), dtype=torch.bfloat16)
    estimate = denoiser(torch.randn(2, 1, 2, 2), torch.tensor([0.3, 0.4]), marker)
    assert seen == [torch.bfloat16, torch.float32]
    assert estimate.dtype == torch.float32


def test_a_time_for_each_sample_is_the_samples_own() -> None:
    denoiser = Denoiser(lambda x, t, c: x.tanh(), CosineSchedule(), Prediction.V)
    x_t, t = torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    together = denoiser(x_t, t, None)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], denoiser(x_t[i : i + 1], t[i], None))
