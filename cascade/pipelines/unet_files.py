"""The files of a U-Net's pipeline: which of them hold what, told by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.detect import Kind, Published
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import identify
from cascade.checkpoints.readers import PICKLE_SUFFIXES, Opened, open_weights, weights_in
from cascade.checkpoints.said import said_in
from cascade.config import from_dict
from cascade.errors import UserError
from cascade.pipelines.files_hash import (
    hash_of_files,
    sampled_hash,
    text_files,
    tokenizer_files,
)
from cascade.pipelines.unet_spec import UNET_SPEC_FILE, UNetSpec

SPEC_KEY = "cascade_pipeline"
"""Where a single file that was written here holds what ``pipeline.json`` holds in a folder."""
INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"


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


def written_in(opened: Opened) -> UNetSpec | None:
    """Return the settings in the metadata of a single file, if it was written here.

    Raises:
        UserError: If they are not valid.
    """
    if SPEC_KEY not in opened.file_metadata:
        return None
    values = said_in(opened.file_metadata, SPEC_KEY, opened.where)
    return from_dict(UNetSpec, values, f"{opened.where} (settings)")


def hash_of_parts(
    parts: Mapping[str, UNetPart], folder: Path, texts: Sequence[str], *, single: bool
) -> str:
    """Return 12 hex digits over all that a picture depends on; of large files a part is read.

    Args:
        parts: The networks; of a single file its text encoders too.
        folder: Where settings, tokenizers and a folder's text encoders lie.
        texts: Names of its text encoders.
        single: Whether the model is a single file.
    """
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        declared = json.dumps(part.opened.declared, sort_keys=True, default=str)
        digest.update(f"{name} {part.published.layout} {declared} ".encode())
        digest.update(f"{sampled_hash(part.path)}\n".encode())
    tokenizers = [folder / name.replace("text_encoder", "tokenizer") for name in texts]
    if single:
        there = [one if one.is_dir() else folder / "tokenizer" for one in tokenizers]
        beside = [path for one in there for path in tokenizer_files(one)]
    else:
        settings = (folder / name for name in (UNET_SPEC_FILE, INDEX_FILE, SCHEDULER_FILE))
        beside = [path for path in settings if path.is_file()]
        for name, tokens in zip(texts, tokenizers, strict=True):
            beside += text_files(folder / name, tokens)
    digest.update(hash_of_files(folder, beside, sampled_hash).encode())
    return digest.hexdigest()[:12]
