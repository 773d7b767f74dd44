"""A contact sheet: pictures in rows, each with its caption written below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetLayout:
    """Measures of a contact sheet, all in pixels except the columns."""

    columns: int = 8
    """Pictures in a row."""
    cell_px: int = 128
    """Side of the square that a picture is fitted into."""
    margin_px: int = 8
    """Space around the sheet, between pictures, and between picture and caption."""
    font_px: int = 11
    """Height of the caption's letters."""

    def __post_init__(self) -> None:
        """Refuse measures that draw nothing."""
        if min(self.columns, self.cell_px, self.font_px) < 1 or self.margin_px < 0:
            raise ValueError(f"a sheet needs positive measures, got {self}")

    @property
    def line_px(self) -> int:
        """Height of a line of caption."""
        return round(self.font_px * 1.25)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], layout: SheetLayout | None = None
) -> Image.Image:
    """Draw pictures in rows with their captions, whole, under them.

    A row is as high as its longest caption needs. The font comes with Pillow, so that the sheet is
    the same on every machine.

    Args:
        images: Pictures, shown at ``cell_px`` at most, their proportions kept.
        captions: One for each picture.
        layout: Measures; the default suits pictures of 128 pixels.

    Returns:
        The sheet, RGB on white.

    Raises:
        ValueError: If there are no pictures, or not as many captions.
    """
    layout = layout or SheetLayout()
    if not images or len(images) != len(captions):
        raise ValueError(f"{len(images)} pictures and {len(captions)} captions make no sheet")
    font = ImageFont.load_default(layout.font_px)
    wrapped = [_wrap(caption, font, layout.cell_px) for caption in captions]
    columns = min(layout.columns, len(images))
    starts = range(0, len(images), columns)
    row_heights = [_row_height(wrapped[start : start + columns], layout) for start in starts]
    step = layout.cell_px + layout.margin_px
    size = (layout.margin_px + columns * step, layout.margin_px + sum(row_heights))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = layout.margin_px
    for start, height in zip(starts, row_heights, strict=True):
        for column, index in enumerate(range(start, min(start + columns, len(images)))):
            left = layout.margin_px + column * step
            _paste(sheet, images[index], left, top, layout.cell_px)
            text_top = top + layout.cell_px + layout.margin_px // 2
            for line_number, line in enumerate(wrapped[index]):
                at = (left, text_top + line_number * layout.line_px)
                draw.text(at, line, fill="black", font=font)
        top += height
    return sheet


def _row_height(captions: Sequence[Sequence[str]], layout: SheetLayout) -> int:
    lines = max(len(caption) for caption in captions)
    return layout.cell_px + layout.margin_px + lines * layout.line_px + layout.margin_px


def _paste(sheet: Image.Image, image: Image.Image, left: int, top: int, cell_px: int) -> None:
    """Fit the picture into its cell, centred."""
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # Enlarging by whole pixels keeps what the model drew; shrinking must average.
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    fitted = image.convert("RGB").resize(size, method)
    sheet.paste(fitted, (left + (cell_px - size[0]) // 2, top + (cell_px - size[1]) // 2))


def _wrap(text: str, font: _Font, width_px: int) -> list[str]:
    """Break text at spaces, and inside a word that is wider than the cell."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width_px:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width_px and len(word) > 1:
            fit = 1
            while fit < len(word) - 1 and font.getlength(word[: fit + 1]) <= width_px:
                fit += 1
            lines.append(word[:fit])
            word = word[fit:]
        line = word
    return [*lines, line] if line else lines or [""]
