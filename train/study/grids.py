"""The same prompts drawn by every arm, one arm a row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from cascade.evaluate.sheet import SheetLayout, contact_sheet
from cascade.images import open_image, save_png

PROMPTS_FILE = "prompts.json"
"""In a folder of drawn pictures: each prompt by the name of its picture's file."""


def grid_of(folders: Mapping[str, Path], count: int, path: Path) -> bool:
    """Write a sheet of the first prompts.

    Args:
        folders: Arm -> folder with its pictures and their prompts.
        count: Prompts, at most.
        path: PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    prompts: dict[str, str] | None = None
    images, captions = [], []
    for arm, folder in folders.items():
        if prompts is None:
            found = json.loads((folder / PROMPTS_FILE).read_text(encoding="utf-8"))
            prompts = dict(sorted(found.items())[:count])
        for name, prompt in prompts.items():
            images.append(open_image(folder / name))
            captions.append(f"{arm}: {prompt}")
    if not images or not prompts:
        return False
    save_png(contact_sheet(images, captions, SheetLayout(columns=len(prompts))), path)
    return True
