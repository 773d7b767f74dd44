"""Pyramid noise: white noise with coarser noise on top, so that large areas change as a whole.

Stable Cascade trains its Stage B on it (StableCascade, train/train_b.py), where white noise leaves
a latent's low frequencies readable at every time.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from train.draws import StepDraws

_LEVELS = 10
_GAIN = 0.75
_COARSEST, _FINEST = 1, 16


def pyramid_noise(shape: tuple[int, int, int, int], draws: StepDraws) -> Tensor:
    """Draw noise of unit variance, white plus what is constant over squares of 2, 4, ... cells.

    Level k adds noise on a grid ``2^k`` times coarser with the gain ``0.75^k``; grids whose sides
    are between 1 and 16 cells take part, as published. Height and width are divided each by
    itself; the published code takes the height for both.

    Args:
        shape: ``(B, C, H, W)``.
        draws: Of this micro-batch.
    """
    noise = draws.normal("noise", shape)
    height, width = shape[-2:]
    variance = 1.0
    for level in range(1, _LEVELS):
        size = (height // 2**level, width // 2**level)
        if min(size) < 1:
            break
        if _COARSEST <= min(size) <= _FINEST:
            coarse = draws.normal(f"noise level {level}", (*shape[:2], *size))
            gain = _GAIN**level
            noise = noise + gain * F.interpolate(coarse, size=(height, width), mode="nearest")
            variance += gain**2
    return noise / variance**0.5
