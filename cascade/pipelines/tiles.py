"""Stage A's decoder over a whole picture, or over tiles of it where memory is short.

A pixel of the decoder depends on the latent cells within ``StageAConfig.decoder_reach`` and on
nothing else: its convolutions are local and its norms are over channels. A tile that is decoded
with that many cells around it, and then cut, is therefore the whole picture's part, with no seam
to blend; what differs is how matrix products of another size round (float32: below 1e-5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cascade.pipelines.finite import check_finite
from stages.stage_a import StageA

TILE_CELLS = (256, 128, 64, 32)
"""Sides of tiles to choose from, in latent cells, largest first: 1024 to 128 px as published."""


def decode_pixels(
    stage_a: StageA, latents: Tensor, dtype: torch.dtype, tile: int | None = None
) -> Tensor:
    """Turn Stage B latents into pixels.

    Args:
        stage_a: Stage A; its weights are on the device of ``latents``.
        latents: ``(B, 4, h, w)``.
        dtype: Number format of its weights.
        tile: Side of a tile in latent cells, without its margin; None decodes all at once.

    Returns:
        ``(B, 3, H, W)`` float32 in [0, 1]; of tiles, on the CPU.

    Raises:
        NonFiniteError: If a value is infinite or not a number.
    """
    if tile is None:
        pixels = stage_a.decode(latents.to(dtype)).float()
    else:
        pixels = decode_tiles(stage_a, latents.to(dtype), tile)
    check_finite(pixels, "Stage A", dtype)
    return pixels.clamp(0, 1)


def decode_tiles(stage_a: StageA, latents: Tensor, tile: int) -> Tensor:
    """Decode tile by tile and picture by picture, so that memory depends on neither number.

    Args:
        stage_a: Stage A.
        latents: ``(B, 4, h, w)`` in the number format of its weights.
        tile: Side of a tile in latent cells, without its margin.

    Returns:
        ``(B, 3, H, W)`` float32, not clamped, on the CPU (a meta tensor for meta latents).
    """
    scale, reach = stage_a.downscale, stage_a.config.decoder_reach
    count, _, height, width = latents.shape
    device = latents.device if latents.is_meta else torch.device("cpu")
    pixels = torch.empty(count, 3, height * scale, width * scale, device=device)
    for row in range(count):
        for top, bottom in _spans(height, tile):
            for left, right in _spans(width, tile):
                above, before = max(0, top - reach), max(0, left - reach)
                window = latents[row : row + 1, :, above : bottom + reach, before : right + reach]
                decoded = stage_a.decode(window)
                inside = decoded[
                    0,
                    :,
                    (top - above) * scale : (bottom - above) * scale,
                    (left - before) * scale : (right - before) * scale,
                ]
                pixels[row, :, top * scale : bottom * scale, left * scale : right * scale] = (
                    inside.to(device, torch.float32)
                )
    return pixels


def _spans(side: int, tile: int) -> Iterator[tuple[int, int]]:
    """Cut a side into spans of at most ``tile``."""
    for start in range(0, side, tile):
        yield start, min(start + tile, side)
