"""Where figures come from: command, commit, machine, weights."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.checkpoints.hub import ModelFiles
from cascade.evaluate.provenance import commit, machine
from cascade.pipelines.spec import model_hash
from cascade.pipelines.unet_parts import is_unet, open_unet_source


@dataclass(frozen=True)
class Provenance:
    """What one needs to get the same figures again."""

    command: str
    seed: int
    commit: str
    machine: str
    weights: str
    """Hash over the names and contents of the model's files."""
    dtype: str
    """Number format that the stages ran in."""


def describe_run(
    module: str,
    argv: Sequence[str],
    seed: int,
    model: Path,
    device: torch.device,
    dtype: torch.dtype,
    unet: Path | None = None,
) -> Provenance:
    """Collect the provenance of a run of ``python -m module argv``.

    ``unet`` ran in place of the model's own.
    """
    is_cascade = not is_unet(ModelFiles((model,)))
    return Provenance(
        command=f"python -m {module} {shlex.join([_portable(word) for word in argv])}".rstrip(),
        seed=seed,
        commit=commit(),
        machine=machine(device),
        weights=model_hash(model) if is_cascade else open_unet_source(model, unet).weights_hash,
        dtype=str(dtype).removeprefix("torch."),
    )


def _portable(word: str) -> str:
    """Write an absolute path relative to the working folder, or by its last name if outside."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else f"PATH_TO/{path.name}"
