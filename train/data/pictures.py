"""A picture file's bytes to its size, without decoding, and to pixels of a wanted shape."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cascade.images import flatten

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
"""Formats that Pillow may open; some of its others start programs."""
MOST_PIXELS = 89_478_485
"""Pixels of the largest picture that is decoded; Pillow's own bound for its warning."""
BOMB_WARNING = ".*could be decompression bomb.*"
"""Pillow's warning, which says nothing that the reports do not."""
_MOVING = ("PNG", "WEBP", "GIF", "TIFF")  # the many pictures of a phone's MPO show one scene
_EXTENSIONS = {"PNG": ("png",), "JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "WEBP": ("webp",)}
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
BROKEN_PICTURE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,  # Pillow's word for some broken PNG files
    ValueError,
    TypeError,
)
"""What decoding a picture or its metadata raises when they are broken."""


@dataclass(frozen=True)
class PictureHead:
    """What a picture's first bytes say."""

    width: int
    height: int
    expected_name: bool
    """Whether its extension is one of its format's."""


@dataclass(frozen=True)
class Fitted:
    """A picture in the shape of its batch."""

    pixels: Tensor  # uint8 (3, H, W)
    original_size: tuple[int, int]
    """Height and width of the file's picture, upright."""
    crop: tuple[int, int]
    """Top and left edge of what was kept, in pixels of the resized picture."""


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open a picture that may be decoded: not moving, not made to exhaust memory.

    Raises:
        ValueError: It moves. Others of ``BROKEN_PICTURE``: it can't be read.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        # Pillow warns here and refuses at twice as many; its filter for warnings is not made for
        # the threads that look through shards.
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        if image.format in _MOVING and getattr(image, "is_animated", False):
            raise ValueError("animated; only still pictures are read")
        yield image


def read_head(data: bytes, extension: str) -> PictureHead:
    """Return the upright size of a picture without decoding it.

    Raises:
        One of ``BROKEN_PICTURE``.
    """
    with opened(data) as image:
        width, height = image.size
        # A PNG may keep this at its end: looking there would decode it. Fitting needs no size.
        if image.format != "PNG" and image.getexif().get(_ORIENTATION) in _SIDEWAYS:
            width, height = height, width
        names = _EXTENSIONS.get(str(image.format), ())
        return PictureHead(width, height, extension in names)


def fit_picture(
    data: bytes, size: tuple[int, int], generator: torch.Generator | None = None
) -> Fitted:
    """Decode a picture, resize it until it covers a shape, and cut what is over.

    Args:
        data: The file's bytes.
        size: Height and width.
        generator: Draws which part is kept; None: the middle.

    Raises:
        One of ``BROKEN_PICTURE``.
    """
    height, width = size
    with opened(data) as image:
        original = _upright_size(image)
        # JPEG decodes straight to a smaller size; twice what is needed keeps the resize's quality.
        image.draft(None, (2 * max(size), 2 * max(size)))
        picture = flatten(ImageOps.exif_transpose(image))
    scale = max(height / picture.height, width / picture.width)
    rows = max(height, round(picture.height * scale))
    columns = max(width, round(picture.width * scale))
    top, left = _corner(rows - height, columns - width, generator)
    box = (
        left * picture.width / columns,
        top * picture.height / rows,
        (left + width) * picture.width / columns,
        (top + height) * picture.height / rows,
    )
    if (
        (rows, columns) != (picture.height, picture.width)
        or (top, left) != (0, 0)
        or box[2:]
        != (
            picture.width,
            picture.height,
        )
    ):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    array = np.array(picture)
    return Fitted(torch.from_numpy(array).permute(2, 0, 1), original, (top, left))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
        width, height = height, width
    return height, width


def _corner(
    spare_rows: int, spare_columns: int, generator: torch.Generator | None
) -> tuple[int, int]:
    if generator is None:
        return spare_rows // 2, spare_columns // 2
    # Both are drawn always: what one picture's shape is changes no other's draws.
    draws = torch.rand(2, generator=generator).tolist()
    return math.floor(draws[0] * (spare_rows + 1)), math.floor(draws[1] * (spare_columns + 1))


def decode_picture(data: bytes) -> Tensor:
    """Return a picture file's pixels as they are, uint8 ``(3, H, W)``, on white.

    Raises:
        One of ``BROKEN_PICTURE``.
    """
    with opened(data) as image:
        array = np.array(flatten(ImageOps.exif_transpose(image)))
        return torch.from_numpy(array).permute(2, 0, 1)
