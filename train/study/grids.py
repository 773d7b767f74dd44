"""The same prompts drawn by every arm, one arm a row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cascade.evaluate.sheet import SheetLayout, contact_sheet
from cascade.images import open_image, read_png_metadata, save_png


def grid_of(folders: Mapping[str, Path], count: int, path: Path) -> bool:
    """Write a sheet of the first prompts.

    Args:
        folders: Arm -> folder of what its model drew; the pictures say their prompts, and lie in a
            folder named by the weights.
        count: Prompts, at most.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    names: list[str] = []
    images, captions = [], []
    for arm, drawn in folders.items():
        # More than one only where a run was taken up again with other weights.
        folder = max(
            (one for one in drawn.iterdir() if one.is_dir()),
            key=lambda one: one.stat().st_mtime,
            default=drawn,  # reconstructions lie there by key
        )
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
