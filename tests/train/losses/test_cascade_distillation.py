"""What a U-Net tells a cascade: directions, relations and estimates, never latents."""

from __future__ import annotations

import pytest
import torch

from train.losses.cascade_distillation import (
    FeatureProjector,
    affinities,
    cosine_distances,
    estimate_distances,
    interpolate_curve,
    mean_over_batch,
    on_grid,
    relation_distances,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relations_know_neither_scale_nor_offset_nor_rotation_nor_width_of_the_features():
    features = drawn(2, 6, 3, 4)
    turned = torch.linalg.qr(drawn(9, 6, seed=1)).Q  # (9, 6), orthonormal columns
    other = 7.0 * torch.einsum("bchw,dc->bdhw", features, turned) + drawn(9, 1, 1, seed=2)
    assert torch.allclose(relation_distances(features, other), torch.zeros(2), atol=1e-10)
    shuffled = features.flatten(2)[:, :, torch.arange(12).flip(0)].unflatten(2, (3, 4))
    assert relation_distances(features, shuffled).min() > 0.05


def test_affinities_are_cosines_of_positions_and_alike_positions_do_not_divide_by_zero():
    found = affinities(drawn(1, 5, 2, 2))
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), torch.ones(1, 4), atol=1e-5)
    assert torch.equal(found, found.mT) and found.abs().max() <= 1 + 1e-5
    flat = torch.ones(1, 5, 2, 2, requires_grad=True)
    affinities(flat).sum().backward()
    assert flat.grad is not None and bool(flat.grad.isfinite().all())


def test_the_finer_grid_is_brought_to_the_coarser_and_a_plane_survives_that():
    plane = torch.linspace(0, 1, 12).expand(1, 2, 12, 12)
    small = on_grid(plane, (4, 4))
    assert small.shape == (1, 2, 4, 4)
    assert torch.allclose(small[0, 0, 0].diff(), small[0, 0, 0].diff().mean(), atol=0.03)
    features = drawn(1, 3, 4, 4)
    fine = features.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    unrelated = relation_distances(features, drawn(1, 3, 4, 4, seed=5))
    assert relation_distances(features, fine) < 0.3 * unrelated


def test_aligned_features_are_at_0_opposite_ones_at_2_and_no_gradient_reaches_the_teacher():
    ours = drawn(2, 4, 3, 3).requires_grad_()
    theirs = (3.0 * ours.detach()).requires_grad_()
    assert torch.allclose(cosine_distances(ours, theirs), torch.zeros(2), atol=1e-6)
    assert torch.allclose(cosine_distances(ours, -theirs), torch.full((2,), 2.0), atol=1e-6)
    other = drawn(2, 4, 6, 6, seed=3).requires_grad_()
    total = cosine_distances(ours, other).sum() + relation_distances(ours, other).sum()
    total.backward()
    assert ours.grad is not None and ours.grad.abs().max() > 0 and other.grad is None


def test_an_estimates_error_weighs_as_the_published_loss_does():
    alpha = torch.tensor([0.5, 1.0])
    found = estimate_distances(torch.zeros(2, 3, 2, 2), torch.full((2, 3, 2, 2), 2.0), alpha)
    assert found.tolist() == [1.0, 4.0]


def test_samples_that_are_left_out_count_as_zero():
    whole = mean_over_batch(torch.tensor([4.0, 2.0]), 4)
    halves = [mean_over_batch(torch.tensor([one]), 2) for one in (4.0, 2.0)]
    assert whole == 1.5 and sum(halves) / 2 == whole


def test_a_curve_is_linear_between_its_points_and_level_beyond_them():
    xs, ys = torch.tensor([-1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 0.5])
    found = interpolate_curve(torch.tensor([-9.0, 0.0, 1.0, 1.5, 9.0]), xs, ys)
    assert found.tolist() == pytest.approx([0.0, 0.5, 1.0, 0.75, 0.5])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_projection_works_position_by_position(recompute):
    torch.manual_seed(0)
    projector = FeatureProjector(4, 8, 6)
    projector.recompute = recompute
    features = drawn(2, 4, 3, 5).requires_grad_()
    found = projector(features)
    assert found.shape == (2, 6, 3, 5)
    assert torch.allclose(
        found[:, :, 1, 2], projector(features[:, :, 1:2, 2:3])[:, :, 0, 0], atol=1e-6
    )
    found.square().sum().backward()
    assert all(bool(one.grad.any()) for one in projector.parameters())
