from __future__ import annotations

import pytest

from cascade.errors import UserError
from cascade.pipelines.sizes import fit_size
from cascade.pipelines.spec import CascadeSpec

SPEC = CascadeSpec(
    name="demo",
    image_size=128,
    pixels_per_stage_c_cell=16.0,
    size_multiple=16,
    min_size=64,
    max_size=512,
)


def test_no_wish_is_the_size_of_the_training() -> None:
    assert fit_size(SPEC, None, None) == (128, 128, [])


@pytest.mark.parametrize("side", [64, 128, 160, 256])
def test_a_valid_size_is_kept_without_a_word(side: int) -> None:
    assert fit_size(SPEC, side, 128) == (side, 128, [])


@pytest.mark.parametrize(
    ("wanted", "made"), [(130, 128), (136, 144), (65, 64), (250, 256), (121, 128)]
)
def test_another_size_is_rounded_and_the_change_is_told(wanted: int, made: int) -> None:
    width, height, notices = fit_size(SPEC, wanted, None)
    assert (width, height) == (made, 128)
    assert notices == [f"width {wanted} becomes {made}: this model makes multiples of 16 pixels"]


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        (0, "64, 80, 96"),
        (7, "64, 80, 96"),
        (-128, "64, 80, 96"),
        (63, "64, 80, 96"),
        (513, "480, 496, 512"),
        (100_000, "480, 496, 512"),
    ],
)
def test_an_absurd_size_is_refused_with_the_valid_ones_near_it(wanted: int, near: str) -> None:
    with pytest.raises(UserError, match=f"height {wanted}: .* valid sizes near it: {near}$"):
        fit_size(SPEC, 128, wanted)


def test_a_size_far_from_the_training_is_made_with_a_warning() -> None:
    width, height, notices = fit_size(SPEC, 512, 128)
    assert (width, height) == (512, 128)
    assert len(notices) == 1 and "expect odd pictures" in notices[0]
