from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cascade.diffusion.prediction import Prediction
from cascade.diffusion.samplers import sample_lcm
from cascade.diffusion.schedules import CosineSchedule
from cascade.diffusion.trigflow import TrigFlow, along, clean, turned
from cascade.evaluate.flops import FlopCounter
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from train.losses.consistency import (
    TangentConfig,
    TimeWeight,
    change_along,
    consistency_errors,
    consistency_tangent,
    difference_along,
    draw_angles,
    normalized,
)

Velocity = Callable[[Tensor, Tensor], Tensor]
EXACT = TangentConfig(normalize=None)


def gaussian(std: float) -> tuple[Velocity, Velocity]:
    """The teacher's velocity for N(0, std^2), and that of its exact consistency function."""

    def spread(angle: Tensor) -> Tensor:
        return (std**2 * angle.cos().square() + angle.sin().square()).sqrt()

    def teacher(x: Tensor, angle: Tensor) -> Tensor:
        rate = angle.sin() * angle.cos() * (1.0 - std**2) / spread(angle).square()
        return along(rate, x) * x

    def student(x: Tensor, angle: Tensor) -> Tensor:
        end = along(std / spread(angle), x) * x
        return (along(angle.cos(), x) * x - end) / along(angle.sin(), x)

    return teacher, student


@pytest.mark.parametrize("derivative", ["jvp", "difference"])
def test_the_loss_is_zero_for_the_exact_solution_of_a_gaussian(derivative: str) -> None:
    teacher, student = gaussian(0.3)
    generator = torch.Generator().manual_seed(0)
    angle = torch.linspace(0.05, 1.55, 40, dtype=torch.float64)
    x = torch.randn(40, 7, generator=generator, dtype=torch.float64)
    config = dataclasses.replace(EXACT, derivative=derivative, difference_step=1e-4)
    tangent = consistency_tangent(student, x, angle, teacher(x, angle), config)
    tolerance = 1e-12 if derivative == "jvp" else 1e-6
    assert tangent.abs().max() < tolerance
    errors = consistency_errors(student(x, angle), normalized(tangent, 0.1))
    assert errors.max() < (10 * tolerance) ** 2
    # What is not the solution has a loss.
    wrong = consistency_tangent(gaussian(0.5)[1], x, angle, teacher(x, angle), config)
    assert wrong.abs().mean() > 0.01


def test_a_tangent_without_its_change_leads_to_the_teacher() -> None:
    teacher, student = gaussian(0.3)
    x, angle = torch.ones(3, 2), torch.tensor([0.3, 0.8, 1.3])
    tangent = consistency_tangent(student, x, angle, teacher(x, angle), EXACT, progress=0.0)
    wanted = -along(angle.cos().square(), x) * (student(x, angle) - teacher(x, angle))
    torch.testing.assert_close(tangent, wanted)


def test_the_gradient_of_the_loss_is_along_the_tangent() -> None:
    predicted = torch.randn(4, 3, requires_grad=True)
    tangent = torch.randn(4, 3)
    consistency_errors(predicted, tangent).sum().backward()
    torch.testing.assert_close(predicted.grad, -2.0 * tangent / 3)


def test_normalized_directions_are_shorter_than_one_and_keep_their_way() -> None:
    tangent = torch.tensor([[30.0, 40.0], [0.0, 0.0]])
    found = normalized(tangent, 0.1)
    assert found[1].abs().sum() == 0
    torch.testing.assert_close(found[0], tangent[0] / (math.sqrt(1250.0) + 0.1))
    assert normalized(tangent, None) is tangent


def _stage_c() -> tuple[nn.Module, object]:
    config = StageCConfig(
        latent_channels=3,
        time_channels=8,
        cond_channels=8,
        hidden_channels=(8, 8),
        num_heads=(2, 2),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        text_channels=6,
        text_pooled_channels=5,
        pooled_tokens=2,
        image_channels=4,
        dropout=0.0,
        time_conds=("sca", "cfg"),
        qk_norm=True,
        time_unit=1e-3,
    )
    cond = StageCCondition(torch.randn(2, 4, 6), torch.randn(2, 5), cfg=torch.tensor([1.0, 4.0]))
    return StageC(config), cond


def _stage_b() -> tuple[nn.Module, object]:
    config = StageBConfig(
        latent_channels=3,
        time_channels=8,
        cond_channels=8,
        hidden_channels=(8, 8),
        num_heads=(0, 2),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        up_repeats=(2, 1),
        compressed_channels=3,
        text_pooled_channels=5,
        dropout=(0.0, 0.0),
        time_conds=("sca", "cfg"),
        time_unit=1e-3,
    )
    cond = StageBCondition(torch.randn(2, 3, 2, 2), torch.randn(2, 5), cfg=torch.tensor([1.0, 4.0]))
    return StageB(config), cond


Make = Callable[[], tuple[nn.Module, object]]


def path_of(make: Make, dtype: torch.dtype) -> tuple[Velocity, list[Tensor]]:
    """A random network's velocity; a point, an angle, and how both change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, cond = make()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        x, x_rate = torch.randn(2, 2, 3, 8, 8, dtype=dtype)
    network.to(dtype)
    angle, angle_rate = torch.tensor([[0.4, 1.2], [1.0, -0.7]], dtype=dtype)
    flow = TrigFlow(CosineSchedule(), Prediction.V)

    def velocity(x: Tensor, angle: Tensor) -> Tensor:
        given, time = flow.told(x, angle)
        return flow.velocity(network(given, time, cond), x, angle)

    return velocity, [x, angle, x_rate, angle_rate]


@pytest.mark.parametrize("make", [_stage_c, _stage_b])
def test_a_derivative_that_is_counted_is_the_same_to_the_bit(make: Make) -> None:
    """The first step of a start is counted: a resumed run would not learn as a whole one."""
    velocity, path = path_of(make, torch.float32)
    plain = change_along(velocity, *path)
    with FlopCounter() as counter:
        counted = change_along(velocity, *path)
    assert counter.total > 0
    assert torch.equal(counted[0], plain[0]) and torch.equal(counted[1], plain[1])


@pytest.mark.parametrize("make", [_stage_c, _stage_b])
def test_forward_mode_equals_finite_differences_in_float64(make: Make) -> None:
    velocity, (x, angle, x_rate, angle_rate) = path_of(make, torch.float64)
    value, rate = change_along(velocity, x, angle, x_rate, angle_rate)
    assert not rate.requires_grad and rate.dtype == torch.float64
    torch.testing.assert_close(value, velocity(x, angle).detach(), rtol=1e-6, atol=1e-6)
    found = difference_along(velocity, x, angle, x_rate, angle_rate, 1e-5)
    torch.testing.assert_close(rate, found, rtol=1e-5, atol=1e-5 * float(rate.abs().max()))


def test_a_learned_weight_divides_by_the_loss_that_is_expected() -> None:
    weight = TimeWeight()
    angle = torch.linspace(0.05, 1.5, 256)
    errors = torch.exp(2.0 * angle)
    torch.testing.assert_close(weight(errors, angle), errors)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        weight(errors, angle).mean().backward()
        optimizer.step()
    log_size = weight(torch.zeros_like(angle), angle)
    torch.testing.assert_close(log_size, errors.log(), atol=0.3, rtol=0.0)


def test_angles_lie_in_their_span_and_some_at_its_end() -> None:
    generator = torch.Generator().manual_seed(0)
    angles = draw_angles(4000, generator, (0.01, 1.5), 0.0, 1.0, 0.25)
    assert angles.min() >= 0.01 and angles.max() == 1.5
    assert 0.24 < (angles == 1.5).float().mean() < 0.32
    assert abs(float(angles[angles < 1.5].tan().log().median())) < 0.15


MODES = torch.tensor([[0.9, 0.9], [0.9, -0.9], [-0.9, 0.9], [-0.9, -0.9]])
MODE_STD = 0.2


def mixture_velocity(x: Tensor, angle: Tensor) -> Tensor:
    """The exact velocity of a mixture of four Gaussians."""
    sin, cos = along(angle.sin(), x), along(angle.cos(), x)
    variance = (cos * MODE_STD).square() + sin.square()
    centres = cos[..., None] * MODES  # (B, 4, 2)
    apart = x[:, None] - centres
    weights = (-apart.square().sum(dim=2) / (2.0 * variance)).softmax(dim=1)
    gain = cos * MODE_STD**2 / variance
    x0_hat = (weights[..., None] * (MODES + gain[..., None] * apart)).sum(dim=1)
    return (cos * x - x0_hat) / sin


class Toy(nn.Module):
    """A small network of a point and an angle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2)
        )

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        waves = [f(k * angle) for k in (1, 2) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, torch.stack(waves, dim=1)], dim=1))


@pytest.fixture(scope="module")
def toy() -> Toy:
    """A student of the mixture: first its velocity, then its ends."""
    flow = TrigFlow(CosineSchedule(), Prediction.V)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Toy()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=8e-3)
    first, total = 150, 600
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / total)
    config = TangentConfig(normalize=0.1)
    for step in range(total):
        picked = torch.randint(4, (1024,), generator=generator)
        x0 = MODES[picked] + MODE_STD * torch.randn(1024, 2, generator=generator)
        angle = draw_angles(1024, generator, flow.angles, 0.0, 1.2, 0.05)
        x = turned(x0, torch.randn(1024, 2, generator=generator), angle)
        taught, predicted = mixture_velocity(x, angle), student(x, angle)
        if step < first:
            loss = (predicted - taught).square().mean()
        else:
            progress = min(1.0, (step - first) / 150)
            tangent = consistency_tangent(student, x, angle, taught, config, progress)
            loss = consistency_errors(predicted, normalized(tangent, config.normalize)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return student.requires_grad_(False)


@pytest.mark.parametrize(("steps", "least"), [(1, 0.75), (2, 0.8), (4, 0.75)])
def test_a_mixture_is_drawn_in_few_steps(toy: Toy, steps: int, least: float) -> None:
    flow = TrigFlow(CosineSchedule(), Prediction.V)
    generator = torch.Generator().manual_seed(1)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        angle = flow.angle_of(t).expand(len(x))
        return clean(toy(x, angle), x, angle)

    def randn_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    x = torch.randn(4000, 2, generator=generator)
    times = torch.linspace(1.0, 0.0, steps + 1)
    made = sample_lcm(denoise, CosineSchedule(), x, times, randn_like=randn_like)
    apart = (made[:, None] - MODES).norm(dim=2)
    nearest, mode = apart.min(dim=1)
    close = float((nearest < 3.0 * MODE_STD).float().mean())
    shares = torch.bincount(mode, minlength=4) / len(made)
    assert close > least, (close, shares)
    assert shares.min() > 0.2 and shares.max() < 0.3, shares
    # The teacher's own single step gives the mean of all modes.
    start = torch.ones(4000)
    blurred = clean(mixture_velocity(x, 1.56 * start), x, 1.56 * start)
    assert float(((blurred[:, None] - MODES).norm(dim=2).min(dim=1)[0] < 0.6).float().mean()) < 0.1
