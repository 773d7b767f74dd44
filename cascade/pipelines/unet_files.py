"""The files of a U-Net's pipeline: which of them hold what, told by their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.detect import Kind, Published
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import identify
from cascade.checkpoints.readers import PICKLE_SUFFIXES, Opened, open_weights, weights_in
from cascade.errors import UserError


@dataclass(frozen=True)
class UNetPart:
    """One network of it."""

    opened: Opened
    published: Published
    path: Path
    """The file that is hashed."""


def open_one(path: Path, kind: Kind, where: str) -> UNetPart:
    """Open a network of a known kind: its file or folder, or a part of a single file."""
    found = []
    for opened in open_weights(path):
        if opened.part in (None, "unet" if kind == "unet" else "autoencoder"):
            found.append(
                UNetPart(opened, identify(opened), weights_in(path) if path.is_dir() else path)
            )
    for part in found:
        if part.published.kind == kind:
            return part
    held = found[0].published.kind if found else "nothing of the kind"
    raise UserError(f"{where}: no {kind} but {held}; check the path")


def named_file(files: ModelFiles) -> Path | None:
    """Return the single file that was named as the model."""
    if files.files is None or len(files.files) != 1:
        return None
    [path] = files.files
    return path if path.suffix == ".safetensors" or path.suffix in PICKLE_SUFFIXES else None


def single_files(folder: Path) -> list[Path]:
    """Return the files in a folder that hold a whole model; of pickles none is opened."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        if "-of-" not in path.name and any(one.part == "unet" for one in open_weights(path)):
            found.append(path)
    return found
