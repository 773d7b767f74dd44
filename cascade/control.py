"""What a ControlNet sees of a picture: its edges, its hole, or its compressed small version.

Pictures are ``(B, 3, H, W)`` in [0, 1]. The signals are those that the published ControlNets of
Stable Cascade were trained on.

Reference: Canny, 1986, A Computational Approach to Edge Detection, IEEE TPAMI 8(6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.errors import UserError
from stages.controlnet import ControlNet, ControlNetConfig

Control = Literal["canny", "inpainting", "super_resolution"]
Maps = tuple[Tensor | None, ...]

CANNY_SIZE = 224
"""Side of the square in which the published ControlNet saw its edges."""
CANNY_LOW, CANNY_HIGH = 100.0, 200.0
"""Gradients between which an edge needs a stronger one beside it, in levels of 255."""
# Beyond these slopes a gradient counts as horizontal or vertical, between them as diagonal.
_TAN_22, _TAN_67 = math.tan(math.pi / 8), math.tan(3 * math.pi / 8)

_KINDS: dict[int, Control] = {1: "canny", 4: "inpainting", 16: "super_resolution"}


def control_kind(config: ControlNetConfig) -> Control:
    """Tell what a ControlNet wants to see, by its channels.

    Raises:
        UserError: If its signal is none that is made here.
    """
    if config.in_channels not in _KINDS:
        raise UserError(
            f"a ControlNet for signals of {config.in_channels} channels: known are "
            + ", ".join(f"{channels} ({kind})" for channels, kind in _KINDS.items())
        )
    return _KINDS[config.in_channels]


def control_signal(
    config: ControlNetConfig,
    pixels: Tensor,
    latent_size: tuple[int, int],
    *,
    mask: Tensor | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Make of a picture what a ControlNet wants to see.

    Args:
        config: The ControlNet's.
        pixels: The picture, of any size; for super-resolution the small one.
        latent_size: Height and width of the Stage C latents to be drawn.
        mask: ``(B, 1, H, W)``, 1 where the picture is to be drawn anew; for inpainting.
        encode: The compressor of Stage C's latents; for super-resolution.

    Returns:
        ``(B, in_channels, H', W')``, as ``ControlNet.forward`` takes it.

    Raises:
        UserError: For a ControlNet of another kind, or a mask or compressor that is missing.
    """
    kind = control_kind(config)
    if kind == "super_resolution":
        if encode is None:
            raise UserError("super-resolution needs the compressor, which this model lacks")
        return super_resolution_signal(encode, pixels)
    height, width = (side * config.stride for side in latent_size)
    pixels = _resized(pixels, (height, width))
    if kind == "canny":
        return canny_signal(pixels)
    if mask is None:
        raise UserError("a ControlNet for inpainting needs a mask beside the picture")
    return inpainting_signal(pixels, F.interpolate(mask.float(), size=(height, width)))


def control_maps(
    network: ControlNet,
    signal: Tensor,
    strength: float = 1.0,
    *,
    unconditional: Literal["zeros", "same"] = "same",
) -> tuple[Maps, Maps]:
    """Run a ControlNet for both halves of a guided step.

    Args:
        network: The ControlNet.
        signal: What it sees, ``(B, in_channels, H, W)``.
        strength: Factor on all maps; 0 is no control.
        unconditional: What the unconditional half sees: the same signal, as scripts written for
            the published weights do it, or one of zeros, so that guidance strengthens the control.

    Returns:
        ``StageCCondition.control`` of the conditional and of the unconditional half.
    """
    told = _scaled(network(signal), strength)
    if unconditional == "same":
        return told, told
    return told, _scaled(network(torch.zeros_like(signal)), strength)


def _scaled(maps: Maps, strength: float) -> Maps:
    return tuple(None if one is None else one * strength for one in maps)


# The signals


def canny_signal(pixels: Tensor, size: int | None = CANNY_SIZE) -> Tensor:
    """Return the edges ``(B, 1, H, W)`` in [0, 1], found in the picture squeezed to a square.

    Args:
        pixels: ``(B, 3, H, W)`` in [0, 1].
        size: Side of the square; None finds edges at the picture's own size.
    """
    if size is None:
        return canny_edges(pixels)
    # Without antialiasing, as in training.
    small = F.interpolate(pixels.float(), size=(size, size), mode="bilinear", align_corners=False)
    edges = canny_edges(small)
    return F.interpolate(edges, size=pixels.shape[-2:], mode="bilinear", align_corners=False)


def inpainting_signal(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return the picture, white where it is masked, and the mask: ``(B, 4, H, W)``.

    Args:
        pixels: ``(B, 3, H, W)`` in [0, 1].
        mask: ``(B, 1, H, W)``; above 0.5 the picture is to be drawn anew.
    """
    hole = mask > 0.5
    return torch.cat([torch.where(hole, 1.0, pixels.float()), hole.float()], dim=1)


def super_resolution_signal(
    encode: Callable[[Tensor], Tensor], pixels: Tensor, factor: int = 2
) -> Tensor:
    """Return the compressed small picture, each cell repeated: ``(B, 16, factor h, factor w)``.

    Args:
        encode: The compressor of Stage C's latents.
        pixels: The small picture, ``(B, 3, H, W)`` in [0, 1], at its own size.
        factor: How many times larger the wanted picture is along each side; 2 in training.
    """
    return F.interpolate(encode(pixels), scale_factor=factor, mode="nearest")


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    return F.interpolate(
        pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )


# Edges


def canny_edges(
    pixels: Tensor,
    low: float = CANNY_LOW,
    high: float = CANNY_HIGH,
    blur_sigma: float = 0.0,
) -> Tensor:
    """Find edges one pixel wide.

    Equal to OpenCV's ``Canny`` with its defaults (3x3 Sobel, |dx| + |dy|, the channel of the
    largest gradient), which blurs nothing.

    Args:
        pixels: ``(B, C, H, W)`` in [0, 1]; rounded down to 256 levels.
        low: Gradient, in levels, above which a pixel can belong to an edge.
        high: Gradient that at least one pixel of an edge must exceed.
        blur_sigma: Standard deviation in pixels of a Gaussian blur before; 0 is none.

    Returns:
        ``(B, 1, H, W)``, 1 on an edge and 0 elsewhere, float32.
    """
    levels = (pixels.float() * 255).floor()
    if blur_sigma > 0:
        levels = _blurred(levels, blur_sigma)
    dx, dy = _gradient(levels)
    strength = dx.abs() + dy.abs()
    thin = _is_ridge(dx, dy, strength) & (strength > low)
    return _connected(thin, thin & (strength > high)).float()


def _blurred(levels: Tensor, sigma: float) -> Tensor:
    """Blur along both sides; the picture goes on as at its border."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=levels.device, dtype=torch.float32)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).view(1, 1, -1, 1)
    batch, channels, height, width = levels.shape
    x = levels.reshape(batch * channels, 1, height, width)
    x = F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), weights)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), weights.mT)
    return x.reshape(batch, channels, height, width)


def _gradient(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return Sobel's dx and dy of the channel with the largest |dx| + |dy|: (B, 1, H, W) each."""
    x = F.pad(levels, (1, 1, 1, 1), mode="replicate")
    smooth_y = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    smooth_x = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    dx = smooth_y[..., 2:] - smooth_y[..., :-2]
    dy = smooth_x[..., 2:, :] - smooth_x[..., :-2, :]
    channel = (dx.abs() + dy.abs()).argmax(dim=1, keepdim=True)
    return dx.gather(1, channel), dy.gather(1, channel)


def _is_ridge(dx: Tensor, dy: Tensor, strength: Tensor) -> Tensor:
    """Say where no neighbour along the gradient is stronger; of two equal ones the first wins."""
    height, width = strength.shape[-2:]
    around = F.pad(strength, (1, 1, 1, 1))

    def neighbour(down: int, right: int) -> Tensor:
        return around[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    flat, steep = dx.abs() * _TAN_22, dx.abs() * _TAN_67
    horizontal, vertical = dy.abs() < flat, dy.abs() > steep
    falling = torch.sign(dx) * torch.sign(dy) >= 0  # the gradient runs along the main diagonal
    along_x = (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1))
    along_y = (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0))
    along_main = (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1))
    along_other = (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1))
    diagonal = torch.where(falling, along_main, along_other)
    return torch.where(horizontal, along_x, torch.where(vertical, along_y, diagonal))


def _connected(candidates: Tensor, seeds: Tensor) -> Tensor:
    """Return the candidates that are linked to a seed through candidates, diagonals too."""
    while True:
        grown = F.max_pool2d(seeds.float(), kernel_size=3, stride=1, padding=1) > 0
        grown &= candidates
        if seeds.is_meta or torch.equal(grown, seeds):  # without values one round tells the sizes
            return seeds
        seeds = grown
