"""What conversions have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoints.files import CLASS_KEY, CONFIG_KEY, atomic_path, finite_in
from cascade.checkpoints.written_tensors import save_tensors
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.text.encoder import TextEncoder


@dataclass(frozen=True)
class Written:
    """What a conversion wrote, and what it could not carry over."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]

    def moved(self, before: Path, after: Path, notices: Sequence[str] = ()) -> Written:
        """Return it with its folder's new place, and further notices ahead of its own."""
        files = tuple(after / path.relative_to(before) for path in self.files)
        return Written(files, (*notices, *self.notices))


def check_new(out: Path) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: It is there.
    """
    if out.exists():
        raise UserError(f"{out} is there already; name another file, or remove it first")


def save_state(
    path: Path,
    network: Any,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    notes: Mapping[str, str],
) -> None:
    """Write a network's weights by published names.

    Args:
        path: The file, which appears when it is whole.
        network: One of ours, whose class and sizes tell our readers what shapes do not.
        state: Its weights by those names.
        dtype: Number format to write.
        notes: What else the file says of it.

    Raises:
        UserError: If a number is not finite in that format.
    """
    name = type(network).__name__
    tensors = {
        key: finite_in(value, dtype, f"{name}, {key}").contiguous().clone()
        for key, value in state.items()
    }
    own = {CLASS_KEY: name, CONFIG_KEY: json.dumps(to_dict(network.config))}
    with atomic_path(path) as temporary:
        save_tensors(tensors, temporary, {**notes, "format": "pt", **own})


def write_text(encoder: TextEncoder, folder: Path, tokens: Path, dtype: torch.dtype) -> None:
    """Write a text encoder and its tokenizer as transformers does.

    Args:
        encoder: The encoder, whose weights are in float32.
        folder: Folder of its weights.
        tokens: Folder of its tokenizer.
        dtype: Number format to write.

    Raises:
        UserError: If a number is not finite in that format.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # this command prints what it wrote, and no more
    model: Any = encoder.model
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype)
    for key, value in model.state_dict().items():
        finite_in(value, dtype, f"{folder.name}, {key}")
    model.save_pretrained(folder, safe_serialization=True)
    model.to(torch.float32)
    encoder.tokenizer.save_pretrained(tokens)
