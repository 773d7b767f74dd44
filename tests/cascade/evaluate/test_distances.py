"""Distances between sets of features, held against closed forms and slow, plain versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cascade.evaluate.distances import (
    Gaussian,
    Moments,
    covariance_warning,
    cubic_mmd,
    frechet_distance,
    gaussian_of,
    kernel_distance,
    matrix_root,
    mean_interval,
    precision_recall,
    rbf_distance,
    spread_by_halves,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(count: int, channels: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=generator(seed), dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    return Gaussian(mean.double(), covariance.double(), 100)


def test_shifted_gaussians_are_as_far_apart_as_the_closed_form_says() -> None:
    a, b = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.5, 0.1, 3.0])
    first = gaussian(torch.zeros(3), torch.diag(a.square()))
    second = gaussian(torch.tensor([1.0, -2.0, 0.5]), torch.diag(b.square()))
    wanted = 1 + 4 + 0.25 + float((a - b).square().sum())
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)


def test_covariances_that_do_not_commute_agree_with_the_eigenvalues_of_their_product() -> None:
    first, second = (gaussian_of(features(50, 5, seed) @ features(5, 5, seed)) for seed in (1, 2))
    roots = torch.linalg.eigvals(first.covariance @ second.covariance).real.sqrt().sum()
    wanted = (first.mean - second.mean).square().sum()
    wanted += first.covariance.trace() + second.covariance.trace() - 2 * roots
    assert frechet_distance(first, second) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("count", [4, 300])
def test_identical_sets_are_at_zero_even_with_a_singular_covariance(count: int) -> None:
    same = gaussian_of(features(count, 40) * 1000)
    scale = float(same.covariance.trace())
    assert 0 <= frechet_distance(same, same) < 1e-6 * scale


def test_a_root_times_itself_is_the_matrix() -> None:
    matrix = gaussian_of(features(30, 8)).covariance
    root = matrix_root(matrix)
    torch.testing.assert_close(root @ root, matrix)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_moments_do_not_depend_on_the_batches(batch: int) -> None:
    # Far from the origin: a sum of squares less a square of sums would lose all digits.
    data = features(200) + 1e6
    moments = Moments(6)
    for rows in data.split(batch):
        moments.update(rows)
    found = moments.gaussian()
    assert found.count == 200
    torch.testing.assert_close(found.mean, data.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.covariance, torch.cov(data.T), rtol=1e-6, atol=1e-7)


def test_one_feature_has_no_covariance_and_broken_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_of(features(1))
    with pytest.raises(ValueError, match="not finite"):
        gaussian_of(torch.tensor([[1.0, math.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="two networks"):
        frechet_distance(gaussian_of(features(5, 3)), gaussian_of(features(5, 4)))


def test_order_does_not_matter() -> None:
    x, y = features(90, seed=1), features(70, seed=2) + 0.3
    shuffled = y[torch.randperm(70, generator=generator())]
    real = gaussian_of(x)
    assert frechet_distance(real, gaussian_of(shuffled)) == pytest.approx(
        frechet_distance(real, gaussian_of(y)), rel=1e-12
    )
    assert rbf_distance(x, shuffled).value == pytest.approx(rbf_distance(x, y).value, rel=1e-9)
    assert precision_recall(x, shuffled) == precision_recall(x, y)


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
@pytest.mark.parametrize("count", [40, 200])  # fewer and more than the features have dimensions
def test_the_spread_of_one_sets_halves_is_that_of_other_sets(kind: str, count: int) -> None:
    channels = 64
    scale = torch.logspace(0, -1.5, channels, dtype=torch.float64)
    reference = features(400, channels, seed=99) * scale
    real = gaussian_of(reference)

    def distance(pictures: Tensor) -> float:
        if kind == "kernel":
            return cubic_mmd(reference, pictures)
        return frechet_distance(real, gaussian_of(pictures))

    sets = [features(count, channels, seed=seed) * scale + 0.1 for seed in range(40)]
    true = float(torch.tensor([distance(one) for one in sets]).std())
    told = []
    for one in sets[:5]:
        spread = spread_by_halves(
            lambda rows, one=one: distance(one[rows]), count, generator(1), 20
        )
        assert spread is not None
        told.append(spread)
    assert 0.6 * true < sum(told) / len(told) < 1.7 * true
    assert spread_by_halves(lambda rows: 0.0, 3, generator(), 20) is None


def test_kid_is_the_published_unbiased_estimate() -> None:
    x, y = features(8, 3, seed=1), features(8, 3, seed=2)

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = sum(
        kernel(one[i], one[j]) for one in (x, y) for i in range(8) for j in range(8) if i != j
    )
    across = sum(kernel(a, b) for a in x for b in y)
    wanted = within / (8 * 7) - 2 * across / 64
    found = kernel_distance(x, y, 1, 8, generator())
    assert found.mean == pytest.approx(wanted, rel=1e-9)
    assert found.spread is None and found.subset_size == 8


def test_kid_of_one_distribution_is_zero_within_its_spread_and_grows_with_a_shift() -> None:
    x, y = features(600, seed=1), features(600, seed=2)
    near = kernel_distance(x, y, 50, 100, generator())
    assert near.spread is not None and abs(near.mean) < near.spread
    assert kernel_distance(x, y, 50, 400, generator()).spread is None, "much the same pictures"
    far = kernel_distance(x, y + 1, 50, 100, generator())
    assert far.mean > 10 * near.spread
    assert kernel_distance(x, y, 50, 100, generator()) == near


def test_cmmds_distance_agrees_with_its_formula_and_is_zero_for_a_set_and_itself() -> None:
    x, y = features(20, 4, seed=1), features(30, 4, seed=2) + 0.5
    unit_x, unit_y = (torch.nn.functional.normalize(one, dim=1) for one in (x, y))

    def mean(a: Tensor, b: Tensor) -> float:
        return float((-torch.cdist(a, b).square() / 200).exp().mean())

    wanted = 1000 * (mean(unit_x, unit_x) + mean(unit_y, unit_y) - 2 * mean(unit_x, unit_y))
    found = rbf_distance(x, 7 * y, 10, generator())
    assert found.value == pytest.approx(wanted, rel=1e-9)
    assert found.spread is not None and 0 < found.spread < found.value
    assert rbf_distance(x, x).value == pytest.approx(0, abs=1e-9)
    assert rbf_distance(x, x).spread is None


def test_the_weighted_bootstrap_is_that_of_drawn_rows() -> None:
    x, y = features(20, 4, seed=1), features(15, 4, seed=2)
    draws, by_hand = generator(5), []
    for _ in range(3):
        by_hand.append(rbf_distance(x, y[torch.randint(15, (15,), generator=draws)]).value)
    wanted = float(torch.tensor(by_hand, dtype=torch.float64).std())
    assert rbf_distance(x, y, 3, generator(5)).spread == pytest.approx(wanted, rel=1e-9)


def test_precision_and_recall_tell_lost_quality_from_lost_variety() -> None:
    real = torch.cat([features(200, 2, seed=1), features(200, 2, seed=2) + 50])
    one_mode = features(200, 2, seed=3) * 0.5
    found = precision_recall(real, one_mode)
    assert found.precise >= 190  # they lie among real ones
    assert found.recalled / found.num_real < 0.5  # the other mode is lost
    off = precision_recall(real, features(200, 2, seed=4) + 500)
    assert off.precise == 0 and off.recalled == 0


def test_a_set_covers_itself_even_if_a_picture_comes_many_times() -> None:
    twice = torch.cat([features(30), features(30)[:5].repeat(4, 1)]) * 1e3 + 1e4
    found = precision_recall(twice, twice.flip(0))
    assert (found.precise, found.recalled) == (50, 50)
    with pytest.raises(ValueError, match="neighbour"):
        precision_recall(twice, twice[:3])


def test_few_pictures_are_told_how_many_are_needed() -> None:
    assert covariance_warning(193, 192) is None
    assert "more than 192 are needed" in str(covariance_warning(192, 192))


def test_a_means_interval_is_normal_theorys() -> None:
    mean, half = mean_interval(torch.tensor([1.0, 2.0, 3.0]))
    assert (mean, half) == (2.0, pytest.approx(1.959964 / math.sqrt(3)))
    assert mean_interval(torch.tensor([5.0])) == (5.0, None)
