"""Resumable checkpoints on disk: each is there whole or not at all, and the newest few are kept."""

from __future__ import annotations

import errno
import logging
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError
from train.clock import PhaseClock
from train.rank_errors import RankErrors

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
REHEARSAL = "rehearsal.ckpt"
"""Name of the checkpoint that is written before the first step, and removed."""
_NAME = re.compile(r"step=(\d+)\.ckpt")
_SPARE_BYTES = 64 * 2**20
"""Left free on the disk beside a checkpoint: logs and exports need some as well."""


class RunCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place, read back, then renamed.

    Older ones are removed only when the new one is there and whole.
    """

    def __init__(
        self, keep: int, clock: PhaseClock | None = None, errors: RankErrors | None = None
    ) -> None:
        """Take how many to keep (of one alone, damage is the run's end), and the run's clock."""
        super().__init__()
        self.keep = keep
        self.errors = RankErrors() if errors is None else errors
        self.clock = PhaseClock() if clock is None else clock

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint``.

        Raises:
            UserError: The folder can't be written to, or the disk is full or was about to be; what
                was there stays.
        """
        with self.clock.within("checkpoint"), self.errors.kept():
            self._save(checkpoint, Path(path))

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Before the oldest goes there is one more than are kept: a rehearsal asks for all of them,
        # at the least: an optimizer's moments come with the first step.
        _check_space(path, checkpoint, self.keep + 1 if path.name == REHEARSAL else 1)
        with atomic_path(path) as temporary:
            torch.save(checkpoint, temporary)
            damage = find_damage(temporary)
            if damage is not None:
                raise UserError(f"{path}: what was written reads back otherwise ({damage})")
        for old in list(checkpoints_in(path.parent))[self.keep :]:
            old.unlink(missing_ok=True)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; 8-bit states can't be read with Lightning's function of places.

        Whatever Lightning asks for, no code in the file is run.
        """
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Leave removing to ``save_checkpoint``."""


def checkpoint_path(out: Path, global_step: int) -> Path:
    """Return where a run keeps the checkpoint of a step, as Lightning counts steps."""
    return out / CHECKPOINTS / f"step={global_step}.ckpt"


def checkpoints_in(folder: Path) -> Iterator[Path]:
    """Yield a folder's checkpoints, the newest first."""
    steps = {
        path: int(match[1])
        for path in folder.glob("step=*.ckpt")
        if (match := _NAME.fullmatch(path.name)) is not None
    }
    yield from sorted(steps, key=lambda path: -steps[path])


def find_damage(path: Path) -> str | None:
    """Read a checkpoint whole; return what is wrong with it, None if nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "it holds no values that torch has saved"
        if wrong is not None:
            return f"{wrong} has another checksum"
        # Checksums do not cover the archive's own directory, which torch reads by its own rules.
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except MemoryError:
        raise
    except pickle.UnpicklingError:
        # Its checksum was right: it holds what this process can't read yet, such as the states of
        # an optimizer whose package is imported later. Whoever loads it says so.
        return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's begin, which damage names
            raise
        return str(error)
    except Exception as error:  # whatever a damaged name, number or pickle makes of the readers
        first = (str(error) or type(error).__name__).splitlines()[0]
        return first[:200]
    return None


def newest_checkpoint(out: Path, *, tidy: bool = True) -> Path | None:
    """Return the newest whole checkpoint of a run, None if it has none at all.

    Args:
        out: The run's folder.
        tidy: Rename a damaged one and tell of it, remove what a killed process left half-written;
            for the first rank alone.

    Raises:
        UserError: All that are there, or were there, are damaged.
        OSError: One can't be read, which says nothing of its content.
    """
    folder = out / CHECKPOINTS
    if tidy:
        for left in folder.glob(".step=*.tmp"):
            left.unlink(missing_ok=True)
    damaged = sorted(folder.glob("step=*.damaged"))
    for path in checkpoints_in(folder):
        try:
            damage = find_damage(path)
        except FileNotFoundError:  # the first rank has renamed it
            continue
        if damage is None:
            return path
        damaged.append(path.with_suffix(".damaged"))
        if tidy:
            path.rename(damaged[-1])
            _log.warning("%s is damaged (%s): looking at the one before", path, damage)
    if damaged:
        names = sorted({one.name for one in damaged})
        raise UserError(
            f"{folder}: no whole checkpoint is left (damaged: {', '.join(names)}); restore one, or "
            "start anew in another run.out (init_from takes exported weights over)"
        )
    return None


def checkpoint_global_step(path: Path) -> int:
    """Return Lightning's step count of a checkpoint without reading its tensors.

    Raises:
        UserError: The file holds something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return int(content["global_step"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: no checkpoint of a run; move it away") from error


def _stored_in(tensor: Tensor) -> list[Tensor]:
    """Return what holds a tensor's bytes: itself, or the parts of one in 8 bits."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def _check_space(path: Path, checkpoint: dict[str, Any], copies: int) -> None:
    leaves = [one for one in tree_leaves(checkpoint) if isinstance(one, Tensor)]
    tensors = [part for one in leaves for part in _stored_in(one)]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    needed = copies * sum(storages.values()) + _SPARE_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(
            f"{path}: {needed / 1e6:,.0f} MB must be free ({copies} checkpoint(s), and "
            f"{_SPARE_BYTES / 1e6:,.0f} MB for logs and exports), and the disk has "
            f"{free / 1e6:,.0f} MB left; free some, then go on with --resume: earlier checkpoints, "
            "if any, are untouched"
        )
