"""The same prompts drawn by every arm, one arm a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cascade.evaluate.sheet import SheetLayout, contact_sheet
from cascade.images import open_image, read_png_metadata, save_png


def grid_of(folders: Mapping[str, Path], count: int, path: Path) -> bool:
    """Write a sheet of the first prompts.

    Args:
        folders: Arm -> folder with its pictures, which say their prompts.
        count: Prompts, at most.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    names: list[str] = []
    images, captions = [], []
    for arm, folder in folders.items():
        names = names or sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*.png")
        )
        for name in names[:count]:
            prompt = read_png_metadata(folder / name).get("prompt", name)
            images.append(open_image(folder / name))
            captions.append(f"{arm}: {prompt}")
    if not images:
        return False
    layout = SheetLayout(columns=min(count, len(names)))
    save_png(contact_sheet(images, captions, layout), path)
    return True
