from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.diffusion.prediction import Prediction, target
from cascade.diffusion.schedules import CosineSchedule
from cascade.diffusion.weighting import draw_t, min_snr, p2

LOG_SNR = st.floats(-9, 9)
MANY = 20_000


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_p2_is_the_share_of_noise_in_the_picture() -> None:
    t = torch.linspace(0, 1, 21)
    _, sigma = CosineSchedule()(t)
    torch.testing.assert_close(p2(CosineSchedule().log_snr(t)), sigma.square())


@given(log_snr=LOG_SNR, k=st.floats(0.1, 3), gamma=st.floats(0, 2))
def test_p2_is_its_formula(log_snr: float, k: float, gamma: float) -> None:
    expected = 1 / (k + math.exp(log_snr)) ** gamma
    assert float(p2(torch.tensor(log_snr), k, gamma)) == pytest.approx(expected, rel=1e-3)


@given(log_snr=LOG_SNR, gamma=st.floats(0.5, 20))
def test_min_snr_is_its_formula_for_each_prediction(log_snr: float, gamma: float) -> None:
    snr = math.exp(log_snr)
    expected = {
        Prediction.X0: min(snr, gamma),
        Prediction.EPSILON: min(snr, gamma) / snr,
        Prediction.V: min(snr, gamma) / (snr + 1),
        Prediction.FLOW: min(snr, gamma) / (snr**0.5 + 1) ** 2,
    }
    for kind, value in expected.items():
        weight = float(min_snr(torch.tensor(log_snr), gamma, kind))
        assert weight == pytest.approx(value, rel=1e-3)


@given(t=st.floats(0.05, 0.95), error=st.floats(0.1, 2))
def test_min_snr_weighs_one_error_of_x0_alike_whatever_is_predicted(t: float, error: float) -> None:
    schedule, time = CosineSchedule(), torch.tensor(t)
    alpha, sigma = schedule(time)
    x_t, wrong = torch.tensor(0.3), torch.tensor(0.5 + error)
    losses = []
    for kind in Prediction:
        said, wanted = (
            target(kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma)
            for x0 in (wrong, torch.tensor(0.5))
        )
        weight = min_snr(schedule.log_snr(time), prediction=kind)
        losses.append(float(weight * (said - wanted).square()))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-2)


def test_uniform_times_are_uniform() -> None:
    t = draw_t(MANY, _generator())
    assert t.shape == (MANY,) and t.dtype == torch.float32
    assert t.min() >= 0 and t.max() <= 1
    assert _distance(t, lambda q: q) < 0.02


def test_logit_normal_times_have_a_normal_logit() -> None:
    t = draw_t(MANY, _generator(), "logit_normal")
    assert 0 < t.min() and t.max() < 1
    logits = torch.logit(t)
    assert abs(float(logits.mean())) < 0.03 and abs(float(logits.std()) - 1) < 0.03
    assert _distance(t, lambda q: torch.special.ndtri(q).sigmoid()) < 0.02


def test_official_times_put_their_surplus_at_pure_noise() -> None:
    t = draw_t(MANY, _generator(), "official")
    assert t.min() >= 0.001 and t.max() == 1.0
    share = float((t == 1).float().mean())
    assert share == pytest.approx(1 - 0.999 / 1.08, abs=0.01)  # 7.5 %
    inside = t[t < 1]
    assert float(inside.mean()) == pytest.approx(0.5005, abs=0.01)


def test_noisy_times_have_the_density_2t() -> None:
    t = draw_t(MANY, _generator(), "noisy")
    assert float((t > 0.5).float().mean()) == pytest.approx(0.75, abs=0.02)
    assert _distance(t, torch.sqrt) < 0.02


def _distance(t: torch.Tensor, quantile: object) -> float:
    """Largest gap between the sorted draws and the quantiles they should have."""
    q = (torch.arange(MANY) + 0.5) / MANY
    inside = (q > 0.01) & (q < 0.99)
    return float((t.sort().values - quantile(q))[inside].abs().max())  # type: ignore[operator]


def test_stratified_draws_take_one_time_of_each_part_in_random_order() -> None:
    t = draw_t(64, _generator(), stratified=True)
    assert (t * 64).floor().long().sort().values.tolist() == list(range(64))
    assert not torch.equal(t, t.sort().values)
    within = (t * 64) % 1
    assert within.std() > 0.2, "a draw lies anywhere in its part"


def test_stratified_draws_keep_the_distribution() -> None:
    t = draw_t(MANY, _generator(), "logit_normal", stratified=True)
    assert _distance(t, lambda q: torch.special.ndtri(q).sigmoid()) < 0.001


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "official"])
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_come_from_the_generator_alone(kind: str, stratified: bool) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        draw_t(9, _generator(seed), kind, stratified=stratified)  # type: ignore[arg-type]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_another_kind_of_draw_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'cosine'; it is uniform, logit_normal, official or noisy"
    ):
        draw_t(2, _generator(), "cosine")  # type: ignore[arg-type]
