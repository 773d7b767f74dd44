"""Where figures come from: command, commit, machine, weights."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.checkpoints.hub import ModelFiles
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


def commit() -> str:
    """Return the commit of this source, marked when tracked files were changed after it."""
    try:
        revision, changes = (_git("rev-parse", "HEAD"), _git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return revision[:12] + (" with uncommitted changes" if changes else "")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    result = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def machine(device: torch.device) -> str:
    """Return the processor, the GPU if ``device`` is one, and the versions that matter."""
    where = f"{_processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where += f", {torch.cuda.get_device_name(device)}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{where}, {sys.platform}, {versions}"


def _processor() -> str:
    """Return the processor's name; Linux says more in a file than through ``platform``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
