"""Autoencoders over a whole picture, or over tiles where memory is short.

A pixel of Stage A's decoder depends on the latent cells within ``StageAConfig.decoder_reach`` and
on nothing else: its convolutions are local and its norms are over channels. A tile that is decoded
with that many cells around it, and then cut, is therefore the whole picture's part, with no seam
to blend; what differs is how matrix products of another size round (float32: below 1e-5). So it is
with the encoder, a latent, and the pixels of the cells within ``encoder_reach``.

AutoencoderKL is another matter: its group norms take their statistics, and its attention its keys,
from all it is given, so no margin makes a tile the whole picture's part. Its tiles overlap and are
blended, and the picture differs from the whole one's, most in large even areas; diffusers' tiles
have the same property. They are used only where no other plan fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import EllipsisType

import torch
from torch import Tensor

from cascade.pipelines.finite import check_finite
from stages.autoencoder_kl import AutoencoderKL, DiagonalGaussian
from stages.stage_a import StageA

TILE_CELLS = (256, 128, 64, 32)
"""Sides of tiles to choose from, in latent cells, largest first: 1024 to 128 px as published."""
BLENDED_TILE_CELLS = (128, 96, 64)
"""The same of AutoencoderKL: 1024 to 512 px as published. The smallest is diffusers', and what SD
was trained at: the smaller a tile, the less it knows of the picture."""
_OVERLAP = 4
"""Two neighbouring tiles share the side of one divided by this (diffusers: as much)."""


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
    scale, (count, _, height, width) = stage_a.downscale, latents.shape
    device = latents.device if latents.is_meta else torch.device("cpu")
    pixels = torch.empty(count, 3, height * scale, width * scale, device=device)
    for row in range(count):
        for tiled in _tiles((height, width), tile, stage_a.config.decoder_reach):
            decoded = stage_a.decode(latents[row : row + 1][tiled.window()])
            inside = decoded[0][tiled.inside(scale)]
            pixels[row][tiled.own(scale)] = inside.to(device, torch.float32)
    return pixels


def decode_blended(autoencoder: AutoencoderKL, latents: Tensor, tile: int) -> Tensor:
    """Decode a U-Net's latents in tiles that overlap, one at a time.

    Args:
        autoencoder: Its weights are on the device of ``latents``.
        latents: ``(B, 4, h, w)``; any sizes.
        tile: Side of a tile in latent cells, without its margin; the tiles of a picture are about
            of one size, and at most that.

    Returns:
        ``(B, 3, H, W)`` float32, not clamped, on the CPU. Of a picture no larger than a tile the
        very pixels of ``decode``.
    """
    scale, (count, _, height, width) = autoencoder.downscale, latents.shape
    pixels = torch.zeros(count, 3, height * scale, width * scale)
    shares = torch.zeros(height * scale, width * scale)
    for tiled, share in _blended_tiles((height, width), tile, scale):
        where = tiled.window(scale)
        shares[where] += share
        for row in range(count):
            decoded = autoencoder.decode(latents[row : row + 1][tiled.window()])
            pixels[row][where] += share * decoded[0].to("cpu", torch.float32)
    return pixels / shares


def encode_blended(
    autoencoder: AutoencoderKL, pixels: Tensor, device: torch.device, tile: int
) -> DiagonalGaussian:
    """Encode a picture for a U-Net in tiles that overlap, one at a time.

    Args:
        autoencoder: Its weights are on ``device``.
        pixels: ``(1, 3, H, W)`` in [0, 1], both sides multiples of its ``downscale``; they come to
            the device with their tile.
        device: Where to compute.
        tile: Side of a tile in latent cells, without its margin.

    Returns:
        The Gaussian of the latents, ``(1, 4, h, w)``, on ``device``: where tiles overlap, means
        and log variances of both are mixed. Of a picture no larger than a tile the very one of
        ``posterior``.
    """
    scale = autoencoder.downscale
    height, width = (side // scale for side in pixels.shape[-2:])
    sums = torch.zeros(2, autoencoder.config.latent_channels, height, width, device=device)
    shares = torch.zeros(height, width, device=device)
    for tiled, share in _blended_tiles((height, width), tile, 1):
        share = share.to(device)
        part = autoencoder.posterior(pixels[tiled.window(scale)].to(device))
        shares[tiled.window()] += share
        sums[tiled.window()] += share * torch.cat([part.mean, part.log_variance])
    mean, log_variance = (sums / shares).split(1)
    return DiagonalGaussian(mean, log_variance)


def blended_margin(tile: int) -> int:
    """Return the cells around a tile that its neighbours decode as well."""
    return tile // (2 * _OVERLAP)


def encode_latents(
    stage_a: StageA,
    pixels: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    tile: int | None = None,
) -> Tensor:
    """Turn pixels into Stage A's latents.

    Args:
        stage_a: Stage A; its weights are on ``device``.
        pixels: ``(B, 3, H, W)`` in [0, 1], wherever they are.
        device: Where to compute.
        dtype: Number format of its weights.
        tile: Side of a tile in latent cells, without its margin; None encodes all at once.

    Returns:
        ``(B, 4, h, w)`` float32 on ``device``.

    Raises:
        NonFiniteError: If a value is infinite or not a number.
    """
    if tile is None:
        latents = stage_a.encode(pixels.to(device, dtype)).float()
    else:
        latents = encode_tiles(stage_a, pixels, device, dtype, tile)
    check_finite(latents, "Stage A's encoder", dtype)
    return latents


def encode_tiles(
    stage_a: StageA, pixels: Tensor, device: torch.device, dtype: torch.dtype, tile: int
) -> Tensor:
    """Encode tile by tile and picture by picture; pixels come to the device with their tile.

    Args:
        stage_a: Stage A.
        pixels: ``(B, 3, H, W)`` in [0, 1], both sides multiples of its ``downscale``.
        device: Where to compute.
        dtype: Number format of its weights.
        tile: Side of a tile in latent cells, without its margin.

    Returns:
        ``(B, 4, h, w)`` float32 on ``device``.
    """
    scale, count = stage_a.downscale, len(pixels)
    height, width = (side // scale for side in pixels.shape[-2:])
    latents = torch.empty(count, stage_a.config.latent_channels, height, width, device=device)
    for row in range(count):
        for tiled in _tiles((height, width), tile, stage_a.config.encoder_reach):
            window = pixels[row : row + 1][tiled.window(scale)]
            encoded = stage_a.encode(window.to(device, dtype))
            latents[row][tiled.own()] = encoded[0][tiled.inside()].float()
    return latents


Index = tuple[EllipsisType, slice, slice]
"""Rows and columns of a tensor."""


@dataclass(frozen=True)
class _Tile:
    """A rectangle of latent cells, and its margin within the picture."""

    rows: tuple[int, int]
    """First row, and the one after the last."""
    columns: tuple[int, int]
    reach: int
    """Cells of margin."""

    def own(self, scale: int = 1) -> Index:
        """Return where it lies in the picture, in parts of a cell."""
        (top, bottom), (left, right) = self.rows, self.columns
        return ..., slice(top * scale, bottom * scale), slice(left * scale, right * scale)

    def window(self, scale: int = 1) -> Index:
        """Return where it lies with its margin; slices end with the picture by themselves."""
        (top, bottom), (left, right) = self.rows, self.columns
        above, before = max(0, top - self.reach), max(0, left - self.reach)
        return (
            ...,
            slice(above * scale, (bottom + self.reach) * scale),
            slice(before * scale, (right + self.reach) * scale),
        )

    def inside(self, scale: int = 1) -> Index:
        """Return where it lies in its window."""
        (top, bottom), (left, right) = self.rows, self.columns
        above, before = min(top, self.reach), min(left, self.reach)
        return (
            ...,
            slice(above * scale, (above + bottom - top) * scale),
            slice(before * scale, (before + right - left) * scale),
        )


def _tiles(size: tuple[int, int], tile: int, reach: int) -> Iterator[_Tile]:
    for rows in _spans(size[0], tile):
        for columns in _spans(size[1], tile):
            yield _Tile(rows, columns, reach)


def _blended_tiles(size: tuple[int, int], tile: int, scale: int) -> Iterator[tuple[_Tile, Tensor]]:
    """Yield tiles and their shares of their windows, ``(rows, columns)`` in parts of a cell."""
    margin = blended_margin(tile)
    for rows in _even_spans(size[0], tile):
        for columns in _even_spans(size[1], tile):
            down, across = (
                _ramp(span, side, margin, scale)
                for span, side in zip((rows, columns), size, strict=True)
            )
            yield _Tile(rows, columns, margin), down[:, None] * across


def _even_spans(side: int, tile: int) -> Iterator[tuple[int, int]]:
    """Cut a side into as few spans of at most ``tile`` as there can be, all about of one length."""
    count = -(-side // tile)
    edges = [round(number * side / count) for number in range(count + 1)]
    yield from pairwise(edges)


def _ramp(span: tuple[int, int], side: int, margin: int, scale: int) -> Tensor:
    """Return a tile's share of each row or column of its window, in parts of a cell.

    It rises across the margin on both sides of the tile's edge, as its neighbour's falls; it is 1
    up to the picture's own edge.
    """
    start, end = span
    first, last = max(0, start - margin), min(side, end + margin)
    places = (torch.arange(first * scale, last * scale) + 0.5) / scale
    share = torch.ones(len(places))
    if margin > 0 and start > 0:
        share = share * ((places - (start - margin)) / (2 * margin)).clamp(0, 1)
    if margin > 0 and end < side:
        share = share * ((end + margin - places) / (2 * margin)).clamp(0, 1)
    return share


def _spans(side: int, tile: int) -> Iterator[tuple[int, int]]:
    """Cut a side into spans of at most ``tile``."""
    for start in range(0, side, tile):
        yield start, min(start + tile, side)
