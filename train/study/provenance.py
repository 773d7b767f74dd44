"""Where figures come from: command, commit, machine, weights, files."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cascade.checkpoints.files import file_hash
from cascade.checkpoints.hub import ModelFiles
from cascade.evaluate.provenance import commit, machine
from cascade.pipelines.spec import model_hash
from cascade.pipelines.unet_parts import is_unet, open_unet_source
from train.environment import ENVIRONMENT_FILE
from train.study.settings import StudyConfig


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


def trained_by(runs: Iterable[Path]) -> list[dict[str, str]]:
    """Return the commits and machines that runs were trained with, of all their starts."""
    found: dict[tuple[str, str], None] = {}
    for run in runs:
        file = run / ENVIRONMENT_FILE
        if file.is_file():
            starts = json.loads(file.read_text(encoding="utf-8"))
            found |= dict.fromkeys((start["commit"], start["machine"]) for start in starts)
    return [{"commit": commit, "machine": machine} for commit, machine in sorted(found)]


def inputs_of(config: StudyConfig) -> dict[str, str]:
    """Return the files that a study reads and does not make, with the first digits of their hash.

    They are the configurations, recipes and protocols that it names, and the weights that arms are
    given. Shards are not among them: caches and reference pictures have fingerprints of their own.
    """
    named: list[object] = [config.judge.protocol]
    for arm in config.arms:
        named += [arm.model.config, *arm.model.set.values(), *arm.given]
        for step in arm.steps:
            named += [step.config, *step.set.values()]
    judge = config.judge
    folders = [judge.real, judge.prompts, judge.features, judge.clip]
    named += [*folders, judge.lpips]
    found = {}
    for path in sorted({one for one in named if isinstance(one, str)}):
        if Path(path).is_file():
            found[path] = file_hash(path)
        elif path in folders and Path(path).is_dir():
            found[path] = _listing_hash(Path(path))
    return found


def _listing_hash(folder: Path) -> str:
    """Return a hash over the names and sizes of a folder's files, which may be many."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def _portable(word: str) -> str:
    """Write an absolute path relative to the working folder, or by its last name if outside."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else f"PATH_TO/{path.name}"
