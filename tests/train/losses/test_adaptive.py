"""The loss weight that follows the loss, and the noise with coarser noise on top."""

from __future__ import annotations

import math

import pytest
import torch

from cascade.diffusion.schedules import CosineSchedule
from train.callbacks.checkpoints import newest_checkpoint
from train.draws import StepDraws
from train.losses.adaptive import AdaptiveWeight
from train.losses.denoising import DiffusionConfig, errors_by_sample, noise_batch
from train.losses.pyramid import pyramid_noise


def alone(part: torch.Tensor) -> torch.Tensor:
    return part


def test_the_weight_becomes_one_over_the_loss_of_its_noise_level():
    weight = AdaptiveWeight()
    log_snr = torch.tensor([-8.0, 0.0, 8.0])
    assert torch.equal(weight(log_snr), torch.ones(3))
    for _ in range(2000):
        weight.note(log_snr[:2], torch.tensor([4.0, 0.25]))
        weight.follow(alone)
    torch.testing.assert_close(weight(log_snr), torch.tensor([0.25, 4.0, 1.0]), atol=1e-3, rtol=0)


def test_one_step_moves_an_average_by_a_hundredth():
    """As published: EMA of 0.99 from 1 (StableCascade, gdf/loss_weights.py)."""
    weight = AdaptiveWeight()
    weight.note(torch.tensor([0.0]), torch.tensor([3.0]))
    weight.follow(alone)
    assert weight(torch.tensor([0.0])).item() == pytest.approx(1 / (0.99 + 0.03))


def test_any_split_of_a_batch_gives_the_same_weights():
    log_snr = torch.linspace(-9.2, 9.2, 64)
    errors = torch.rand(64, generator=torch.Generator().manual_seed(0))
    whole, parts = AdaptiveWeight(), AdaptiveWeight()
    whole.note(log_snr, errors)
    whole.follow(alone)
    parts.note(log_snr[::2], errors[::2])  # two micro-batches
    parts.note(log_snr[1::2], errors[1::2])
    parts.follow(alone)
    torch.testing.assert_close(whole.losses, parts.losses)
    ranks = AdaptiveWeight()
    ranks.note(log_snr, errors)
    ranks.follow(lambda part: 3 * part)  # three ranks that saw the same
    torch.testing.assert_close(whole.losses, ranks.losses)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone():
    weight = AdaptiveWeight()
    weight.note(torch.tensor([0.0, 5.0]), torch.tensor([math.nan, math.inf]))
    weight.follow(alone)
    assert torch.equal(weight.losses, torch.ones(300))


def test_all_noise_levels_of_the_schedule_have_a_part_of_their_own():
    weight = AdaptiveWeight()
    log_snr = CosineSchedule().log_snr(torch.linspace(0, 1, 1000))
    buckets = weight._bucket(log_snr)
    assert 0 <= buckets.min() and buckets.max() < 300
    assert len(buckets.unique()) > 100


def test_a_run_with_adaptive_weights_goes_on_to_the_bit(make_run):
    sections = {"diffusion": {"weight": "adaptive"}, "optim": {"schedule": "constant"}}
    whole = make_run("stage_c", "whole", **sections)
    assert whole.start("--run.max_steps", 4) == 0
    halves = make_run("stage_c", "halves", **sections)
    assert halves.start("--run.max_steps", 2) == 0
    assert halves.start("--run.max_steps", 4, "--resume") == 0
    ends = [newest_checkpoint(run.out) for run in (whole, halves)]
    one, two = (torch.load(end, weights_only=True)["state_dict"] for end in ends)
    assert not torch.equal(one["adaptive.losses"], torch.ones(300))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_pyramid_noise_has_unit_variance_and_more_of_it_in_the_coarse():
    shape = (64, 4, 64, 64)
    noise = pyramid_noise(shape, StepDraws(0, 0))
    assert noise.shape == shape
    assert noise.std().item() == pytest.approx(1.0, abs=0.1)
    assert abs(noise.mean().item()) < 0.05
    # The mean over squares of 16 cells: of white noise its deviation would be 1/16.
    coarse = torch.nn.functional.avg_pool2d(noise, 16)
    assert coarse.std().item() > 0.3
    # Grids of 16, 8, 4, 2 and 1 cells take part beside the white noise: levels 2 to 6 of 64.
    gains = [0.75**level for level in range(2, 7)]
    white = 1 / (1 + sum(gain**2 for gain in gains)) ** 0.5
    fine = (noise[..., 1::2] - noise[..., ::2]) / 2**0.5  # within a square of 4, only white
    assert fine.std().item() == pytest.approx(white, rel=0.02)


def test_pyramid_noise_takes_any_shape_and_is_a_function_of_the_sample():
    tall = pyramid_noise((2, 4, 24, 40), StepDraws(0, 3))
    assert tall.shape == (2, 4, 24, 40)
    first, second = (StepDraws(0, 3, rank=rank, world=2) for rank in (0, 1))
    parts = [pyramid_noise((1, 4, 24, 40), draws) for draws in (first, second)]
    assert torch.equal(torch.cat(parts), tall)


def test_a_network_of_v2_is_told_the_time_itself():
    x0 = torch.zeros(512, 1, 2, 2)
    raw, cosine = (
        noise_batch(x0, DiffusionConfig(time_input=kind, draw="official"), StepDraws(0, 0))
        for kind in ("raw", "cosine")
    )
    assert torch.equal(raw.network_time, raw.t) and raw.t.max() == 1.0
    assert torch.equal(cosine.t, raw.t)
    assert cosine.network_time.max() < 0.994  # where the clamped schedule ends
    assert errors_by_sample(raw.target + 2, raw).tolist() == pytest.approx([4.0] * 512, abs=1e-4)


def test_other_noise_takes_the_place_of_white_noise():
    noise = torch.full((2, 1, 2, 2), 3.0)
    noised = noise_batch(torch.zeros_like(noise), DiffusionConfig(), StepDraws(0, 0), noise)
    assert torch.equal(noised.target, noise)
