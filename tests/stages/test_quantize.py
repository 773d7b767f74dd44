from __future__ import annotations

import pytest
import torch

from stages import quantize
from stages.quantize import VectorQuantizer


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizer(num_codes=11, dim=4)


def test_every_latent_becomes_its_nearest_code(quantizer):
    z = torch.randn(2, 4, 3, 5)
    out = quantizer(z)
    distances = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 4), quantizer.codebook)
    assert torch.equal(out.indices.flatten(), distances.argmin(1))
    assert out.indices.shape == (2, 3, 5)
    torch.testing.assert_close(out.quantized, quantizer.codes(out.indices))


def test_codes_are_their_own_nearest_codes(quantizer):
    indices = torch.arange(11).view(1, 1, 11)
    assert torch.equal(quantizer.nearest(quantizer.codes(indices)), indices)


def test_computing_distances_in_pieces_changes_nothing(quantizer, monkeypatch):
    z = torch.randn(2, 4, 3, 5)
    whole = quantizer.nearest(z)
    monkeypatch.setattr(quantize, "_DISTANCE_ELEMENTS", 40)  # three rows at a time
    assert torch.equal(quantizer.nearest(z), whole)


def test_the_gradient_goes_straight_through_to_the_latents(quantizer):
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 5)
    quantizer(z).quantized.backward(upstream)
    assert torch.equal(z.grad, upstream)
    assert quantizer.codebook.grad is None


def test_each_loss_moves_only_its_own_side(quantizer):
    z = torch.randn(2, 4, 3, 5, requires_grad=True)
    out = quantizer(z)
    expected = (z - quantizer.codes(out.indices)).square().mean()
    torch.testing.assert_close(out.codebook_loss, expected)
    torch.testing.assert_close(out.commitment_loss, expected)
    (grad_z,) = torch.autograd.grad(out.codebook_loss, z, retain_graph=True, allow_unused=True)
    assert grad_z is None
    (grad_codes,) = torch.autograd.grad(out.codebook_loss, quantizer.codebook, retain_graph=True)
    assert grad_codes.abs().sum() > 0
    (grad_z,) = torch.autograd.grad(out.commitment_loss, z, retain_graph=True)
    assert grad_z.abs().sum() > 0


def test_descending_the_codebook_loss_brings_codes_to_the_latents(quantizer):
    z = torch.randn(2, 4, 3, 5)
    optimizer = torch.optim.Adam([quantizer.codebook], lr=0.05)
    first = quantizer(z).codebook_loss.item()
    for _ in range(50):
        optimizer.zero_grad()
        quantizer(z).codebook_loss.backward()
        optimizer.step()
    assert quantizer(z).codebook_loss.item() < 0.6 * first


def test_distances_stay_in_float32_under_autocast(quantizer):
    z = torch.randn(2, 4, 3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(z)
    assert torch.equal(out.indices, quantizer(z).indices)
    assert out.codebook_loss.dtype == torch.float32


def test_the_output_has_the_type_of_the_input(quantizer):
    assert quantizer(torch.randn(1, 4, 2, 2).bfloat16()).quantized.dtype == torch.bfloat16


def test_only_unused_codes_are_reseeded_and_they_become_latents(quantizer):
    z = torch.randn(1, 4, 5, 5)
    before = quantizer.codebook.detach().clone()
    counts = torch.ones(11, dtype=torch.int64)
    counts[[2, 7]] = 0
    assert quantizer.reseed_unused(z, counts) == 2
    kept = counts > 0
    assert torch.equal(quantizer.codebook[kept], before[kept])
    latents = z.permute(0, 2, 3, 1).reshape(-1, 4)
    for code in quantizer.codebook[~kept]:
        assert (latents == code).all(1).any()
    assert not torch.equal(quantizer.codebook[2], quantizer.codebook[7])
    assert quantizer.reseed_unused(z, torch.ones(11)) == 0


def test_reseeding_works_with_fewer_latents_than_dead_codes(quantizer):
    assert quantizer.reseed_unused(torch.randn(1, 4, 2, 2), torch.zeros(11)) == 11


def test_reseeding_is_repeatable_with_a_generator(quantizer):
    z = torch.randn(1, 4, 5, 5)
    results = []
    for _ in range(2):
        quantizer.reseed_unused(z, torch.zeros(11), torch.Generator().manual_seed(3))
        results.append(quantizer.codebook.detach().clone())
    assert torch.equal(*results)


def test_wrong_shapes_and_sizes_are_refused(quantizer):
    with pytest.raises(ValueError, match="do not fit"):
        quantizer(torch.randn(1, 5, 2, 2))
    with pytest.raises(ValueError, match="counts has shape"):
        quantizer.reseed_unused(torch.randn(1, 4, 2, 2), torch.zeros(10))
    with pytest.raises(ValueError, match="num_codes=0"):
        VectorQuantizer(0, 4)
