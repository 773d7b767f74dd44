"""Tensors to pictures and back; PNG files that say how they were made.

A PNG written here depends on its pixels and its text alone (no time, no paths), so that the same
settings give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError

# What Pillow raises for files that are damaged, or made to exhaust memory.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def pixels_to_images(pixels: Tensor) -> list[Image.Image]:
    """Turn pixels into RGB pictures of 8 bits.

    Args:
        pixels: ``(B, 3, H, W)`` in [0, 1], any float type and device; values outside are clamped.

    Raises:
        ValueError: If the shape is another, or a value is not finite: a cast would turn that into
            a black picture without a word.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}: (B, 3, H, W) is needed")
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("pixels hold values that are not finite")
    levels = pixels.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    array = levels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def image_to_pixels(image: Image.Image) -> Tensor:
    """Turn a picture of any mode into pixels ``(3, H, W)``, float32 in [0, 1], on white."""
    array = np.array(flatten(image))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float().div_(255)


_FLOATING = "a picture of floating-point numbers: save it with 8 or 16 bits"


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """Return the picture in RGB with 8 bits, on a background where it is transparent.

    Raises:
        UserError: If its numbers are floating-point ones, whose range nobody knows.
    """
    if image.mode == "F":
        raise UserError(_FLOATING)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8, not scale them
        levels = np.asarray(image).astype(np.int64)
        if image.mode != "I" or levels.max(initial=0) > 255:
            levels = levels >> 8
        image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
    return image.convert("RGB")


ImageLike = Image.Image | str | Path
"""A picture, or its file."""


def as_image(image: ImageLike) -> Image.Image:
    """Return a picture, read whole if it is a file.

    Raises:
        UserError: If it is neither, or the file can't be read.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, Path)):
        return open_image(image)
    raise UserError(
        f"a picture of type {type(image).__name__}: give a PIL.Image or a file's path; "
        "cascade.images.pixels_to_images makes pictures of a tensor"
    )


def open_image(path: Path | str) -> Image.Image:
    """Read a picture whole, turned as its camera held it.

    Raises:
        UserError: If the file is missing, or is no picture that can be read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode == "F":
                raise UserError(f"{path}: {_FLOATING}")
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; name a picture's file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a readable picture (of no kind that Pillow knows)") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def save_png(
    image: Image.Image, path: Path | str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a PNG at once or not at all; a file of that name is replaced.

    Args:
        image: The picture.
        path: File to write; its folder must exist.
        metadata: Text stored in the file, read back by :func:`read_png_metadata`.
    """
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        text.add_itxt(key, value)
    # Compressed in memory first: a full disk then fails in one write, and the bytes do not depend
    # on how the encoder's buffers met the disk.
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=text, compress_level=6)
    with atomic_path(Path(path)) as temporary:
        Path(temporary).write_bytes(buffer.getvalue())


def read_png_metadata(path: Path | str) -> dict[str, str]:
    """Return the text that a PNG carries, by key.

    Raises:
        UserError: If the file cannot be read as a picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {})
            return {str(key): str(value) for key, value in text.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, gap_px: int = 4
) -> Image.Image:
    """Lay pictures out in rows on white; each cell has the size of the largest picture.

    Args:
        images: The pictures, row by row.
        columns: Pictures in a row; None makes the grid about square.
        gap_px: White between pictures.

    Raises:
        ValueError: If there are no pictures, or less than one column.
    """
    if not images or (columns is not None and columns < 1):
        raise ValueError(f"{len(images)} pictures in {columns} columns make no grid")
    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    rows = -(-len(images) // columns)
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    grid = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * (width + gap_px), row * (height + gap_px)))
    return grid
