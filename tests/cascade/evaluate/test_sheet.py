from __future__ import annotations

import pytest
from PIL import Image

from cascade.evaluate.sheet import SheetLayout, contact_sheet


def _images(count: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * i, 0, 200)) for i in range(count)]


def test_the_sheet_has_the_size_that_its_layout_says():
    layout = SheetLayout(columns=4, cell_px=32, margin_px=6, font_px=10)
    sheet = contact_sheet(_images(10), ["cat"] * 10, layout)
    row = layout.cell_px + layout.line_px + 2 * layout.margin_px
    assert sheet.size == (6 + 4 * (32 + 6), 6 + 3 * row)


def test_a_long_caption_is_written_whole_in_a_higher_row():
    layout = SheetLayout(columns=2, cell_px=64)
    short = contact_sheet(_images(2), ["cat", "dog"], layout)
    long = contact_sheet(_images(2), ["cat", "a drawing of a dog that sits on a chair"], layout)
    extra_px = long.height - short.height
    assert extra_px > 0 and extra_px % layout.line_px == 0


def test_a_word_wider_than_the_cell_is_broken_and_not_lost():
    layout = SheetLayout(columns=1, cell_px=24)
    assert contact_sheet(_images(1), ["Donaudampfschiff"], layout).height > 24 + 2 * 8 + 2 * 14


def test_pictures_are_where_they_belong():
    layout = SheetLayout(columns=2, cell_px=32, margin_px=4)
    sheet = contact_sheet(_images(3), ["a", "b", "c"], layout)
    assert sheet.getpixel((4 + 16, 4 + 16)) == (0, 0, 200)
    assert sheet.getpixel((4 + 36 + 16, 4 + 16)) == (10, 0, 200)
    assert sheet.getpixel((sheet.width - 1, 0)) == (255, 255, 255)


def test_the_same_pictures_give_the_same_bytes():
    assert contact_sheet(_images(3), ["a"] * 3).tobytes() == (
        contact_sheet(_images(3), ["a"] * 3).tobytes()
    )


def test_a_picture_that_is_not_square_keeps_its_proportions():
    sheet = contact_sheet(_images(1, (32, 16)), ["wide"], SheetLayout(cell_px=32, margin_px=0))
    assert sheet.getpixel((16, 2)) == (255, 255, 255)
    assert sheet.getpixel((16, 16)) == (0, 0, 200)


def test_an_empty_sheet_or_a_missing_caption_is_refused():
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        contact_sheet(_images(2), ["one"])
