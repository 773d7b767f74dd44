"""What conversions have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade.checkpoints.files import finite_in
from cascade.errors import UserError
from cascade.text.encoder import TextEncoder


@dataclass(frozen=True)
class Written:
    """What a conversion wrote, and what it could not carry over."""

    files: tuple[Path, ...]
    notices: tuple[str, ...]


def check_new(out: Path) -> None:
    """Refuse to write over a file.

    Raises:
        UserError: It is there.
    """
    if out.exists():
        raise UserError(f"{out} is there already; name another file, or remove it first")


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
