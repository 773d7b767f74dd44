from __future__ import annotations

import pytest
import torch
from PIL import Image

from cascade.errors import UserError
from cascade.images import image_to_pixels
from cascade.pipelines.picture_input import Mode, PictureInput, fingerprint, fit_picture
from cascade.pipelines.spec import CascadeSpec

SPEC = CascadeSpec("x", image_size=128, pixels_per_stage_c_cell=21.333, min_size=64, max_size=512)


def picture(width: int, height: int) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def half_mask(width: int, height: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


@pytest.mark.parametrize("mode", ["img2img", "reconstruct"])
@pytest.mark.parametrize(
    ("own", "made"),
    [
        ((128, 128), (128, 128)),
        ((192, 96), (192, 96)),  # made, and near what was trained
        ((512, 512), (128, 128)),  # made, but far from it: scaled to the trained area
        ((1000, 500), (192, 96)),
        ((3000, 2000), (192, 128)),  # rather larger than cut
        ((130, 100), (160, 128)),
        ((20, 20), (128, 128)),
        ((4000, 100), (512, 64)),
    ],
)
def test_a_picture_keeps_its_size_or_comes_near_the_trained_area(
    mode: Mode, own: tuple[int, int], made: tuple[int, int]
) -> None:
    task, width, height, notices = fit_picture(SPEC, PictureInput(picture(*own), mode), None, None)
    assert (width, height) == made
    assert task.pixels.shape == (1, 3, made[1], made[0])
    assert bool(notices) == (own != made)


def test_a_picture_of_the_right_size_comes_through_to_the_pixel() -> None:
    given = picture(128, 96)
    task, *_ = fit_picture(SPEC, PictureInput(given), None, None)
    assert torch.equal(task.pixels[0], image_to_pixels(given))


def test_a_wanted_size_cuts_the_middle_out_of_picture_and_mask_alike() -> None:
    image = half_mask(256, 128).convert("RGB")  # white on the right half
    # Below a strength of 1 what is to be drawn anew is the start of it, and stays in the picture.
    given = PictureInput(image, "inpaint", half_mask(256, 128), 0.9)
    task, width, height, notices = fit_picture(SPEC, given, 128, 128)
    assert (width, height) == (128, 128) and "cut from 256x128 to 128x128" in notices[0]
    assert task.mask is not None
    assert torch.equal(task.mask, (task.pixels[:, :1] > 0.5).float())
    assert task.mask.mean() == 0.5


def test_what_surrounds_a_picture_is_drawn_and_the_picture_lies_in_the_middle() -> None:
    image = picture(100, 64)
    task, width, height, _ = fit_picture(SPEC, PictureInput(image, "outpaint"), 192, None)
    assert (width, height) == (192, 64)
    assert task.mask is not None
    assert torch.equal(task.mask[0, 0, 0], torch.tensor([1.0] * 46 + [0.0] * 100 + [1.0] * 46))
    assert torch.equal(task.pixels[0, :, :, 46:146], image_to_pixels(image))
    assert torch.equal(task.pixels[0, :, :, 0], image_to_pixels(image)[:, :, 0])


def test_cells_are_kept_if_no_pixel_of_theirs_is_drawn_anew() -> None:
    mask = Image.new("L", (128, 128))
    mask.putpixel((33, 0), 255)
    task, *_ = fit_picture(SPEC, PictureInput(picture(128, 128), "inpaint", mask), None, None)
    kept = task.kept((4, 4))
    assert kept is not None
    assert kept[0, 0].tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_a_variation_takes_the_size_of_the_model_and_leaves_the_picture_whole() -> None:
    task, width, height, notices = fit_picture(
        SPEC, PictureInput(picture(300, 100), "variation"), None, None
    )
    assert (width, height, notices) == (128, 128, [])
    assert task.pixels.shape == (1, 3, 100, 300)


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        ({"mode": "inpait"}, None, "did you mean 'inpaint'"),
        ({"mode": "inpaint"}, None, "needs a mask"),
        ({"mode": "inpaint", "mask": half_mask(64, 64)}, None, "64x64 but the picture 128x128"),
        ({"mode": "inpaint", "mask": Image.new("L", (128, 128))}, None, "black everywhere"),
        ({"mode": "img2img", "mask": half_mask(128, 128)}, None, "it belongs to 'inpaint'"),
        ({"strength": 0.0}, None, "mode 'reconstruct' changes nothing"),
        ({"strength": 1.5}, None, "above 0 and up to 1"),
        ({"strength": float("nan")}, None, "above 0 and up to 1"),
        ({"strength": True}, None, "a number above 0"),
        ({"mode": "variation", "strength": 0.5}, None, "no use with mode 'variation'"),
        ({"mode": "outpaint"}, None, "needs a width or height"),
        ({"mode": "outpaint"}, 128, "the whole must be larger"),
        ({"mode": "outpaint"}, 96, "the whole must be larger"),
        ({}, 7, "valid sizes near it"),
    ],
)
def test_what_makes_no_sense_is_refused(
    given: dict[str, object], size: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit_picture(SPEC, PictureInput(picture(128, 128), **given), size, None)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_thin_line_of_a_mask_survives_scaling_and_one_that_is_cut_away_is_told() -> None:
    line = Image.new("L", (1000, 1000))
    line.paste(255, (500, 0, 501, 1000))
    given = PictureInput(picture(1000, 1000), "inpaint", line)
    task, *_ = fit_picture(SPEC, given, None, None)
    assert task.mask is not None
    assert task.mask.sum() == 128
    aside = Image.new("L", (1000, 400))
    aside.paste(255, (0, 0, 150, 400))
    with pytest.raises(UserError, match="nothing white of the mask is left"):
        fit_picture(SPEC, PictureInput(picture(1000, 400), "inpaint", aside), 128, 128)


def test_what_is_transparent_in_a_mask_is_kept() -> None:
    mask = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 64, 128))
    task, *_ = fit_picture(SPEC, PictureInput(picture(128, 128), "inpaint", mask), None, None)
    assert task.mask is not None and task.mask.mean() == 0.5


@pytest.mark.parametrize("size", [(128, 128), (131, 77)])
def test_what_is_wholly_drawn_anew_is_filled_in_and_does_not_shine_through(
    size: tuple[int, int],
) -> None:
    mask = Image.new("L", size)
    mask.paste(255, (20, 20, 60, 50))
    first, second = picture(*size), picture(*size)
    second.paste((255, 0, 255), (20, 20, 60, 50))
    tasks = [
        fit_picture(SPEC, PictureInput(one, "inpaint", mask, strength), None, None)[0]
        for one in (first, second)
        for strength in (1.0, 0.9)
    ]
    assert torch.equal(tasks[0].pixels, tasks[2].pixels)
    assert not torch.equal(tasks[1].pixels, tasks[3].pixels)
    hole = tasks[0].mask
    assert hole is not None
    if size == (128, 128):  # scaling mixes pixels along the hole's edge
        assert torch.equal(tasks[0].pixels * (1 - hole), tasks[1].pixels * (1 - hole))


def test_a_hole_in_one_colour_is_filled_with_it() -> None:
    mask = Image.new("L", (128, 128))
    mask.paste(255, (3, 20, 127, 128))
    image = Image.new("RGB", (128, 128), (51, 102, 204))
    image.paste(0, (3, 20, 127, 128))
    task, *_ = fit_picture(SPEC, PictureInput(image, "inpaint", mask), None, None)
    colour = torch.tensor([0.2, 0.4, 0.8]).view(1, 3, 1, 1).expand_as(task.pixels)
    torch.testing.assert_close(task.pixels, colour)


def test_a_mask_of_everything_is_told() -> None:
    mask = Image.new("L", (128, 128), 255)
    *_, notices = fit_picture(SPEC, PictureInput(picture(128, 128), "inpaint", mask), None, None)
    assert "covers the whole picture" in notices[0]


def test_a_fingerprint_tells_pictures_masks_and_shapes_apart() -> None:
    pixels = torch.rand(1, 3, 4, 8)
    prints = {
        fingerprint(pixels, None),
        fingerprint(pixels, torch.ones(1, 1, 4, 8)),
        fingerprint(pixels.view(1, 3, 8, 4), None),
        fingerprint(1 - pixels, None),
    }
    assert len(prints) == 4
    assert fingerprint(pixels.clone(), None) in prints
