from __future__ import annotations

import math

import pytest
import torch

from cascade.evaluate.reconstruction import psnr, ssim, to_8bit


def _pictures(seed: int, size: tuple[int, int] = (24, 29)) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error_of_a_tenth_is_twenty_decibels():
    reference = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(psnr(reference + 0.1, reference), torch.full((2,), 20.0))


def test_psnr_of_black_against_white_is_zero():
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    assert psnr(black, white).item() == 0.0


def test_psnr_of_equal_pictures_is_infinite_and_only_for_those():
    reference = _pictures(0)
    changed = reference.clone()
    changed[1] = 1 - changed[1]
    first, second = psnr(changed, reference).tolist()
    assert first == math.inf and math.isfinite(second)


def test_ssim_of_equal_pictures_is_one():
    reference = _pictures(1)
    torch.testing.assert_close(ssim(reference, reference), torch.ones(2))


def test_ssim_of_two_constant_pictures_is_the_luminance_term():
    # Without variance only the first factor is left: (2ab + c1) / (a^2 + b^2 + c1).
    a, b, c1 = 0.25, 0.75, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    value = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    torch.testing.assert_close(value, torch.tensor([expected]))


def test_ssim_of_inverted_contrast_is_negative():
    picture = _pictures(2)
    assert (ssim(1 - picture, picture) < 0).all()


def test_more_noise_lowers_both_measures():
    reference = _pictures(3)
    noise = torch.randn(reference.shape, generator=torch.Generator().manual_seed(4))
    little = (reference + 0.02 * noise).clamp(0, 1)
    much = (reference + 0.2 * noise).clamp(0, 1)
    assert (psnr(little, reference) > psnr(much, reference)).all()
    assert (ssim(little, reference) > ssim(much, reference)).all()


def test_both_measures_equal_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.image")
    reference = _pictures(5)
    pixels = (reference + 0.1 * _pictures(6)).clamp(0, 1)
    # torchmetrics averages over reflected borders too; the paper's windows lie inside the picture.
    _, ssim_map = metrics.structural_similarity_index_measure(
        pixels.double(), reference.double(), data_range=1.0, return_full_image=True
    )
    expected_ssim = ssim_map[..., 5:-5, 5:-5].flatten(1).mean(dim=1).float()
    expected_psnr = metrics.peak_signal_noise_ratio(
        pixels, reference, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(ssim(pixels, reference), expected_ssim)
    torch.testing.assert_close(psnr(pixels, reference), expected_psnr)


def test_eight_bit_pictures_lie_on_the_levels_of_a_file():
    pixels = torch.tensor([-0.5, 0.0, 0.4999, 1.0, 1.5]).view(1, 1, 1, 5)
    levels = to_8bit(pixels) * 255
    torch.testing.assert_close(levels.flatten(), torch.tensor([0.0, 0.0, 127.0, 255.0, 255.0]))


def test_shapes_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="at least 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
