"""What a run was made with: one entry for each start of it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from cascade.checkpoints.files import atomic_write_text
from cascade.evaluate.provenance import commit, machine

ENVIRONMENT_FILE = "environment.json"
_PACKAGES = (
    *("torch", "lightning", "transformers", "safetensors", "webdataset", "numpy", "pillow"),
    *("torchdata", "tensorboard", "wandb", "torchao"),
)


def note_start(out: Path) -> None:
    """Append this start's commit, command, machine and packages to the run's list."""
    path = out / ENVIRONMENT_FILE
    starts: list[dict[str, Any]] = []
    if path.is_file():
        starts = json.loads(path.read_text(encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    starts.append(
        {
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": shlex.join(sys.argv),
            "machine": machine(device),
            "gpus": torch.cuda.device_count(),
            "packages": packages,
        }
    )
    atomic_write_text(path, json.dumps(starts, indent=1) + "\n")
