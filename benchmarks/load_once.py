"""One loader in one fresh process: ``python -m benchmarks.load_once files FOLDER WARM_UP_FOLDER``.

Prints its figures as JSON. ``benchmarks/load.py`` runs it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from cascade.evaluate.process_memory import measure, reset_peak

FOLDERS = ("prior_lite", "decoder_lite", "vqgan")
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Figures:
    """What one loading took."""

    load_s: float
    """Seconds until the loader returned."""
    ready_s: float
    """Seconds until every page of every weight had been read as well."""
    cpu_s: float
    """Seconds of a processor until then, of this process and of the system for it."""
    before_bytes: int
    """Resident memory before, all imports done."""
    peak_bytes: int
    anonymous_bytes: int
    mapped_bytes: int
    weight_bytes: int


def loader_of(name: str) -> Callable[[Path], list[nn.Module]]:
    """Return a function from a folder to its networks, all imports done.

    Args:
        name: "files" is this project on the authors' single files, "folders" this project on
            diffusers' folders, "diffusers" diffusers on its folders.

    Raises:
        ValueError: If there is no such loader.
    """
    if name in ("files", "folders"):
        from cascade.checkpoints.load import load_any

        def load_here(folder: Path) -> list[nn.Module]:
            paths = [folder / part for part in FOLDERS]
            if name == "files":
                paths = [folder / f"{part}.safetensors" for part in FOLDERS]
            return [net for path in paths for _, net in load_any(path, dtype=torch.bfloat16)]

        return load_here
    if name == "diffusers":
        from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet
        from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

        classes = (StableCascadeUNet, StableCascadeUNet, PaellaVQModel)

        def load_there(folder: Path) -> list[nn.Module]:
            return [
                network.from_pretrained(folder / part, torch_dtype=torch.bfloat16)
                for network, part in zip(classes, FOLDERS, strict=True)
            ]

        return load_there
    raise ValueError(f"{name!r} is no loader; use 'files', 'folders' or 'diffusers'")


def read_all(networks: Sequence[nn.Module]) -> int:
    """Read a number of every page of every weight, and return the bytes of all weights."""
    total = 0
    for network in networks:
        for tensor in network.state_dict().values():
            assert not tensor.is_meta
            values = tensor.flatten()
            values[:: _PAGE_BYTES // tensor.element_size()].sum()
            values[-1].item()
            total += tensor.numel() * tensor.element_size()
    return total


def run(name: str, folder: Path, warm_up: Path) -> Figures:
    """Load the networks of ``folder``, after those of ``warm_up``, a small model.

    The small model has the loader import and initialise what it does on its first call.
    """
    load = loader_of(name)
    read_all(load(warm_up))
    reset_peak()
    before = measure()
    start, cpu_start = time.perf_counter(), time.process_time()
    networks = load(folder)
    load_s = time.perf_counter() - start
    weight_bytes = read_all(networks)
    ready_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    after = measure()
    return Figures(
        load_s=load_s,
        ready_s=ready_s,
        cpu_s=cpu_s,
        before_bytes=before.resident,
        peak_bytes=after.peak,
        anonymous_bytes=after.anonymous,
        mapped_bytes=after.mapped,
        weight_bytes=weight_bytes,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))))
