"""How close a reconstruction is to its original: PSNR and SSIM of each picture.

Pure torch, no dependency. ``tests/cascade/evaluate`` holds both against known answers and, where
it is installed, against torchmetrics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.evaluate.protocol import SSIM_WINDOW

_WINDOW_SIGMA = 1.5
_K1 = 0.01
_K2 = 0.03


def to_8bit(pixels: Tensor) -> Tensor:
    """Clamp to ``[0, 1]`` and round to the 256 levels of a saved picture.

    Args:
        pixels: ``(B, 3, H, W)``, float.

    Returns:
        The same shape in float32, as if it had been saved as PNG and read again.
    """
    return (pixels.float().clamp(0.0, 1.0) * 255.0).round() / 255.0


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture, in dB.

    Args:
        pixels: ``(B, 3, H, W)`` in ``[0, 1]``.
        reference: The originals, same shape.

    Returns:
        ``(B,)`` float32; infinite where a picture equals its original.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_shapes(pixels, reference)
    squared_error = (pixels.float() - reference.float()).square().flatten(1).mean(dim=1)
    return -10.0 * squared_error.log10()


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """Return the structural similarity of each picture, averaged over places and channels.

    The published form: an 11 x 11 Gaussian window of standard deviation 1.5, K1 = 0.01, K2 = 0.03,
    only windows that lie inside the picture.

    Args:
        pixels: ``(B, 3, H, W)`` in ``[0, 1]``, at least 11 pixels a side.
        reference: The originals, same shape.

    Returns:
        ``(B,)`` float32 (computed in float64), at most 1; 1 where a picture equals its original.

    Raises:
        ValueError: If the shapes differ or a side is shorter than the window.

    Reference: Wang et al., 2004, "Image quality assessment: from error visibility to structural
        similarity", eq. 13.
    """
    _check_shapes(pixels, reference)
    if min(pixels.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW} pixels a side, got "
            f"{tuple(pixels.shape)}"
        )
    # The variances are small differences of large numbers on the plain grounds of drawings.
    x, y = pixels.double(), reference.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x.square()
    var_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1).float()


def _blur(pixels: Tensor) -> Tensor:
    """Average under the Gaussian window: ``(B, C, H, W)`` to ``(B, C, H - 10, W - 10)``."""
    offsets = torch.arange(SSIM_WINDOW, dtype=pixels.dtype, device=pixels.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _WINDOW_SIGMA**2))
    window = window / window.sum()
    channels = pixels.shape[1]
    columns = window.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    rows = window.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    return F.conv2d(F.conv2d(pixels, columns, groups=channels), rows, groups=channels)


def _check_shapes(pixels: Tensor, reference: Tensor) -> None:
    if pixels.shape != reference.shape or pixels.ndim != 4:
        raise ValueError(
            "pictures and originals must be (B, C, H, W) of one shape, got "
            f"{tuple(pixels.shape)} and {tuple(reference.shape)}"
        )
