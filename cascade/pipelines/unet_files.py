"""The files of a U-Net's pipeline: which of them hold what, told by their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.checkpoints.detect import Kind, Published
from cascade.checkpoints.files import CLASS_KEY
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import build, identify
from cascade.checkpoints.part_files import find_network
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
from cascade.text.encoder import TextConfig, TextEncoder, load_tokenizer

SPEC_KEY = "cascade_pipeline"
"""Where a single file that was written here holds what ``pipeline.json`` holds in a folder."""
INDEX_FILE = "model_index.json"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
_SD_PAD = "!"
"""What OpenCLIP's towers were padded with, whose token is 0."""


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


def other_unet(named: Path) -> UNetPart:
    """Open a U-Net to run in place of a model's own: its file, its folder, or its model's.

    Raises:
        UserError: There is none, or there are several.
    """
    found = find_network(named, "unet")
    return UNetPart(found.opened, found.published, found.path)


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


def refuse_lost_settings(folder: Path, unet: UNetPart | None) -> None:
    """Refuse what was written for Cascade alone, in a folder that has no settings of any kind.

    Raises:
        UserError: Naming the file that is missing.
    """
    if unet is None or CLASS_KEY not in unet.opened.metadata or unet.opened.declared:
        return
    raise UserError(
        f"{folder / UNET_SPEC_FILE}: not there, and it says how this U-Net is sampled and what "
        "text it reads; copy it from where the model comes from"
    )


def text_of_single(
    part: UNetPart,
    folder: Path,
    tokens: str,
    config: TextConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    written_here: bool,
) -> TextEncoder:
    """Load a text encoder of a single file.

    Args:
        part: The encoder.
        folder: Where the file lies, and tokenizers beside it.
        tokens: Name of the tokenizer's folder; else "tokenizer" is taken.
        config: Which states are read.
        device: Where the weights go.
        dtype: Their number format; None is the file's own.
        written_here: Whether the file has its own tokenizers beside it.

    Raises:
        UserError: If there is no tokenizer, or it does not fit.
    """
    where = part.path
    model = build(part.opened, part.published, device=device, dtype=dtype)
    home = next((one for one in (folder / tokens, folder / "tokenizer") if one.is_dir()), None)
    if home is None:
        raise UserError(
            f"{where}: single files hold no tokenizer; put one beside it, as with `hf "
            f"download openai/clip-vit-large-patch14 vocab.json merges.txt --local-dir "
            f"{folder / 'tokenizer'}`"
        )
    tokenizer = load_tokenizer(home)
    is_open_clip = part.published.config.activation == "gelu"
    if is_open_clip and not written_here and _SD_PAD in tokenizer.get_vocab():
        tokenizer.pad_token = _SD_PAD
    try:
        return TextEncoder(tokenizer, model, config)
    except UserError as error:
        raise UserError(f"{home}: {error}") from error


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
