from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.errors import UserError
from cascade.images import (
    image_grid,
    image_to_pixels,
    open_image,
    pixels_to_images,
    read_png_metadata,
    save_png,
)


def test_eight_bit_pictures_survive_the_round_trip_exactly() -> None:
    levels = torch.arange(256).repeat(3).view(1, 3, 16, 16)
    [image] = pixels_to_images(levels / 255)
    assert torch.equal((image_to_pixels(image) * 255).round().long(), levels[0])


def test_values_outside_of_the_range_are_clamped_and_not_wrapped() -> None:
    [image] = pixels_to_images(torch.tensor([-0.5, 0.5, 1.7]).view(1, 3, 1, 1))
    assert image.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_instead_of_drawn_black(bad: float) -> None:
    pixels = torch.zeros(1, 3, 2, 2)
    pixels[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="not finite"):
        pixels_to_images(pixels)


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4, 4\)"):
        pixels_to_images(torch.zeros(3, 4, 4))


def test_transparency_becomes_white() -> None:
    pixels = image_to_pixels(Image.new("RGBA", (2, 3), (255, 0, 0, 0)))
    assert pixels.shape == (3, 3, 2)
    assert torch.equal(pixels, torch.ones(3, 3, 2))


def test_metadata_is_read_back_whatever_the_language(tmp_path: Path) -> None:
    text = {"prompt": "ein grüner Hut, 青い魚", "seed": "7", "long": "x" * 3000}
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", text)
    assert read_png_metadata(tmp_path / "a.png") == text


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_png(Image.new("RGB", (9, 9), "teal"), tmp_path / name, {"prompt": "p"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_the_old_picture_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (2, 2)), path)
    before = path.read_bytes()

    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match="disk is full"):
        save_png(Image.new("RGB", (4, 4), "red"), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    for read in (open_image, read_png_metadata):
        with pytest.raises(UserError, match=r"broken\.png"):
            read(broken)
        with pytest.raises(UserError, match="no such file"):
            read(tmp_path / "missing.png")


@pytest.mark.parametrize("read", [open_image, read_png_metadata])
def test_a_picture_that_would_fill_the_memory_is_refused(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="not a readable picture"):
        read(tmp_path / "x.png")


def test_a_grid_holds_every_picture_in_reading_order() -> None:
    colours = ["red", "lime", "blue", "black", "yellow"]
    grid = image_grid([Image.new("RGB", (4, 4), colour) for colour in colours], gap_px=1)
    assert grid.size == (14, 9)
    corners = [grid.getpixel((5 * column, 5 * row)) for row in range(2) for column in range(3)]
    assert corners == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (0, 0, 0),
        (255, 255, 0),
        (255, 255, 255),
    ]


def test_a_grid_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no grid"):
        image_grid([])


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_a_picture_of_16_bits_is_scaled_to_8_and_not_clipped(mode: str) -> None:
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    image = Image.fromarray(levels if mode == "I;16" else levels.astype(np.int32))
    assert image.mode == mode
    pixels = image_to_pixels(image)
    assert torch.equal((pixels[0] * 255).round().int().flatten(), torch.arange(256).int())


def test_a_picture_of_floating_point_numbers_is_refused() -> None:
    with pytest.raises(UserError, match="8 or 16 bits"):
        image_to_pixels(Image.new("F", (4, 4)))
