from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cascade.diffusion.prediction import Prediction, from_x0, to_x0
from cascade.diffusion.schedules import CosineSchedule
from cascade.diffusion.weighting import draw_t
from train.draws import StepDraws
from train.losses.contrastive import contrastive_loss
from train.losses.denoising import (
    DiffusionConfig,
    denoising_loss,
    errors_by_noise,
    noise_batch,
    published_errors,
)
from train.losses.reconstruction import (
    feature_distance,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_to_normal,
    pixel_loss,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_a_network_that_says_the_target_has_no_loss_and_knows_x0(prediction):
    x0 = torch.randn(6, 4, 3, 3, generator=generator())
    config = DiffusionConfig(prediction=prediction.value)
    noised = noise_batch(x0, config, StepDraws(1, 0))
    loss, mse = denoising_loss(noised.target, noised)
    assert loss == mse == 0
    alpha, sigma = (v.view(-1, 1, 1, 1) for v in config.noise_schedule()(noised.t))
    estimate = to_x0(noised.target, noised.x_t, alpha, sigma, prediction)
    torch.testing.assert_close(estimate, x0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("constant", lambda snr: torch.ones_like(snr)),
        ("p2", lambda snr: 1 / (1 + snr)),
        ("min_snr", lambda snr: snr.clamp(max=5) / snr),
    ],
)
def test_each_sample_weighs_by_its_signal_to_noise_ratio(weight, expected):
    x0 = torch.randn(5, 4, 2, 2, generator=generator())
    config = DiffusionConfig(weight=weight)
    noised = noise_batch(x0, config, StepDraws(1, 0))
    alpha, sigma = config.noise_schedule()(noised.t)
    torch.testing.assert_close(noised.weight, expected((alpha / sigma) ** 2), rtol=1e-4, atol=0)
    errors = torch.arange(1.0, 6.0).view(-1, 1, 1, 1)
    loss, mse = denoising_loss(noised.target + errors, noised)
    torch.testing.assert_close(loss, (noised.weight * torch.arange(1.0, 6.0) ** 2).mean())
    torch.testing.assert_close(mse, torch.tensor(11.0))


def test_noise_depends_on_its_draws_alone():
    x0 = torch.zeros(3, 4, 2, 2)
    first, again, other = (
        noise_batch(x0, DiffusionConfig(), StepDraws(seed, 0)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.x_t, again.x_t)
    assert not torch.equal(first.x_t, other.x_t)


def test_all_distinct_groups_give_clip_s_loss():
    logits = torch.randn(5, 5, generator=generator())
    labels = torch.arange(5)
    expected = 0.5 * (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels))
    torch.testing.assert_close(contrastive_loss(logits, labels), expected)


def test_pictures_of_one_group_are_not_pushed_apart():
    logits = torch.zeros(4, 4, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 2])
    contrastive_loss(logits, groups).backward()
    same = groups[:, None] == groups[None, :]
    assert (logits.grad[same] < 0).all()  # pulled together, the twin's caption too
    assert (logits.grad[~same] > 0).all()
    best = torch.where(same, 20.0, -20.0)
    assert contrastive_loss(best, groups).item() == pytest.approx(
        0.5 * torch.tensor(2.0).log().item()
    )


def test_the_hinge_leaves_alone_what_is_judged_right():
    real = torch.tensor([2.0, 0.5, -1.0], requires_grad=True)
    fake = torch.tensor([-2.0, -0.5, 1.0], requires_grad=True)
    loss = hinge_discriminator_loss(real, fake)
    assert loss.item() == pytest.approx(0.5 * (2.5 / 3 + 2.5 / 3))
    loss.backward()
    assert real.grad.tolist() == pytest.approx([0, -1 / 6, -1 / 6])
    assert fake.grad.tolist() == pytest.approx([0, 1 / 6, 1 / 6])
    assert hinge_generator_loss(torch.tensor([1.0, 3.0])) == -2


def test_pixels_are_compared_in_float32():
    loss = pixel_loss(torch.full((4,), 0.5, dtype=torch.bfloat16), torch.zeros(4))
    assert loss.dtype == torch.float32
    assert loss == 0.25


def test_features_are_compared_by_direction_and_only_ours_learn():
    ours = torch.randn(2, 5, 8, generator=generator(), requires_grad=True)
    theirs = (3 * ours).detach().requires_grad_()
    assert feature_distance([ours], [theirs]).item() == pytest.approx(0, abs=1e-6)
    assert feature_distance([ours], [-theirs]).item() == pytest.approx(4)
    other = torch.randn(2, 5, 8, generator=generator(1)).requires_grad_()
    feature_distance([ours, ours], [theirs, other]).backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None and other.grad is None


def test_errors_by_noise_are_the_means_of_their_levels():
    x0 = torch.randn(40, 4, 2, 2, generator=generator())
    noised = noise_batch(x0, DiffusionConfig(), StepDraws(0, 0))
    predicted = noised.target + noised.t.view(-1, 1, 1, 1)
    errors = errors_by_noise(predicted, noised)
    assert list(errors) == [f"mse_t/{k / 5:.1f}-{(k + 1) / 5:.1f}" for k in range(5)]
    inside = (noised.t >= 0.4) & (noised.t < 0.6)
    torch.testing.assert_close(errors["mse_t/0.4-0.6"], noised.t[inside].square().mean())
    few = noise_batch(x0[:1], DiffusionConfig(), StepDraws(0, 0))
    assert len(errors_by_noise(few.target, few)) == 1


RECIPES = [
    DiffusionConfig(),
    DiffusionConfig(prediction="v", shift=2.0),
    DiffusionConfig(prediction="v", zero_terminal_snr=True),
    DiffusionConfig(prediction="x0"),
    DiffusionConfig(prediction="flow", schedule="linear"),
    DiffusionConfig(prediction="flow", schedule="linear", shift=3.0),
]


@pytest.mark.parametrize("config", RECIPES, ids=str)
def test_the_published_loss_of_an_estimate_is_the_same_whatever_was_trained(config):
    """A network whose estimate of x0 is off by 0.5 has alpha^2 / 4, on every schedule."""
    x0 = torch.randn(64, 4, 2, 2, generator=generator())
    seen = []

    def network(x_t, time):
        seen.append(time)
        own_t = config.noise_schedule().time_from_log_snr(CosineSchedule().log_snr(t_of[0]))
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in config.noise_schedule()(own_t))
        torch.testing.assert_close(time, config.noise_schedule().network_time(own_t))
        return from_x0(x0 + 0.5, x_t, alpha, sigma, Prediction(config.prediction))

    t_of = [draw_t(64, StepDraws(3, 0).generator("validation t"), stratified=True)]
    errors, t = published_errors(network, x0, config, StepDraws(3, 0))
    assert torch.equal(t, t_of[0]) and len(seen) == 1
    alpha = CosineSchedule()(t)[0]
    torch.testing.assert_close(errors, 0.25 * alpha.square(), rtol=2e-2, atol=2e-4)


def test_the_published_loss_is_epsilon_s_error_weighted_by_p2():
    x0 = torch.randn(50, 4, 2, 2, generator=generator())
    errors, t = published_errors(
        lambda x_t, time: torch.zeros_like(x_t), x0, DiffusionConfig(), StepDraws(0, 0)
    )
    noise = StepDraws(0, 0).normal("validation noise", x0.shape)
    weight = 1 / (1 + CosineSchedule().log_snr(t).exp())
    expected = weight * noise.square().flatten(1).mean(dim=1)
    torch.testing.assert_close(errors, expected, rtol=1e-3, atol=1e-5)


def test_positions_that_are_not_seen_do_not_count():
    x0 = torch.randn(3, 4, 2, 2, generator=generator())
    noised = noise_batch(x0, DiffusionConfig(weight="constant"), StepDraws(1, 0))
    visible = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).expand(3, 1, 2, 2)
    wrong = noised.target + torch.tensor([[2.0, 50.0], [1.0, 1.0]])
    loss, mse = denoising_loss(wrong, noised, visible)
    assert loss.item() == mse.item() == pytest.approx((4 + 1 + 1) / 3, rel=1e-5)


def test_the_kl_divergence_is_that_of_torch_s_distributions_summed_over_a_sample():
    from torch.distributions import Normal, kl_divergence

    mean, log_variance = torch.randn(2, 3, 4, 5, 5, generator=generator()).unbind()
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    found = kl_to_normal(mean, log_variance)
    torch.testing.assert_close(found, expected.sum(dim=(1, 2, 3)))
    assert kl_to_normal(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0.0


def test_pixels_are_compared_by_absolute_or_squared_differences():
    ours, theirs = torch.tensor([0.0, 0.5]), torch.tensor([1.0, 0.0])
    assert pixel_loss(ours, theirs, "l1").item() == pytest.approx(0.75)
    assert pixel_loss(ours, theirs).item() == pytest.approx(0.625)
