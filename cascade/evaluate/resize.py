"""One resize, antialiased and in floating point, for every picture that is measured.

The filters are Pillow's, applied to each channel in float32 without rounding in between, as
clean-fid asks; OpenCV's and torch's own default (no antialiasing) move a FID by whole points.

Reference: Parmar et al., 2022, arXiv:2104.11222.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Filter = Literal["bicubic", "bilinear"]


def resize(pixels: Tensor, size: int, filter: Filter) -> Tensor:
    """Bring square pictures to a side; unchanged where they have it.

    Args:
        pixels: ``(B, 3, S, S)`` float, in any range.
        size: The side in pixels.
        filter: Pillow's filter of that name.

    Returns:
        ``(B, 3, size, size)``; "bicubic" may overshoot the range a little.
    """
    if pixels.shape[-2:] == (size, size):
        return pixels
    return F.interpolate(pixels, (size, size), mode=filter, antialias=True)


def to_levels(pixels: Tensor) -> Tensor:
    """Round float pixels of [0, 255] to the levels of 8 bits, uint8."""
    return pixels.clamp(0, 255).round().byte()
