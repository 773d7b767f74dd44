"""Resumable checkpoints on disk: each is there whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place and then renamed."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``.

        Raises:
            UserError: The folder can't be written to, or the disk is full.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)


def newest_checkpoint(out: Path) -> Path:
    """Return where a run keeps its newest resumable checkpoint."""
    return out / "checkpoints" / "last.ckpt"


def checkpoint_global_step(path: Path) -> int:
    """Return Lightning's step count of a checkpoint without reading its tensors.

    Raises:
        UserError: The file is broken.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
        hint = f"replace it with {others[-1]}" if others else "start anew in another run.out"
        raise UserError(f"{path}: not a whole checkpoint; {hint}") from error
