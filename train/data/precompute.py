"""Runs frozen networks over a data set once and keeps what they say.

Files of a cache folder, one for each part of ``CACHE_FILES``, each with the fingerprints of its
pictures and weights.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_path, read_metadata
from cascade.checkpoints.written_tensors import save_tensors
from cascade.errors import UserError
from cascade.pipelines.placement import pick_device
from train.data.cached import Pictures, load_pictures
from train.encode import MADE_BY, NO_NETWORK, FrozenEncoders, FrozenPaths

_log = logging.getLogger(__name__)


def precompute(
    shards: str,
    folder: Path,
    frozen: FrozenPaths,
    *,
    batch_size: int = 64,
    device: str = "cpu",
    reuse: Path | None = None,
) -> None:
    """Write the cache parts whose networks are named.

    Args:
        shards: Of the pictures.
        folder: Of the cache.
        frozen: The networks.
        batch_size: Pictures that run together.
        device: Where they run.
        reuse: Another cache's folder; its parts that were made from the same pictures with the
            same weights are linked, not made again.

    Raises:
        UserError: No network is named, one is missing, does not take these pictures or gives a
            value that is not finite.
    """
    if not any(getattr(frozen, name) for names in MADE_BY.values() for name in names):
        raise UserError(NO_NETWORK)
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least 1")
    target = pick_device(device)
    hashes = frozen.hashes()
    pictures = load_pictures(shards)
    folder.mkdir(parents=True, exist_ok=True)
    for part, weights in hashes.items():
        if reuse is not None and _reused(f"{part}.safetensors", reuse, folder, pictures, weights):
            continue
        encoders = FrozenEncoders(frozen.only(part), target)  # one at a time in memory
        metadata = {"pictures": pictures.fingerprint(), "weights": weights}
        if part == "text":
            captions = sorted({"", *(c for captions in pictures.captions for c in captions)})
            metadata["captions"] = json.dumps(captions)
            tensors = _encode_text(encoders, captions, batch_size * 4)
        else:
            metadata["pixels"] = pictures.pixels_hash
            tensors = _encode_pictures(encoders, pictures, batch_size)
        _write(folder / f"{part}.safetensors", metadata, tensors)


def _reused(name: str, reuse: Path, folder: Path, pictures: Pictures, weights: str) -> bool:
    """Link a part of another cache, if it is what would be made here."""
    there = reuse / name
    if not there.is_file():
        return False
    said = read_metadata(there)
    if (said.get("pictures"), said.get("weights")) != (pictures.fingerprint(), weights):
        return False
    if said.get("pixels", pictures.pixels_hash) != pictures.pixels_hash:
        return False
    with atomic_path(folder / name) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(there, temporary)
        except OSError:  # another disk
            shutil.copyfile(there, temporary)
    _log.info("%s: as in %s", folder / name, reuse)
    return True


def _encode_text(
    encoders: FrozenEncoders, captions: list[str], batch_size: int
) -> dict[str, Tensor]:
    return _joined(
        encoders.encode_captions(captions[first : first + batch_size])
        for first in range(0, len(captions), batch_size)
    )


def _encode_pictures(
    encoders: FrozenEncoders, pictures: Pictures, batch_size: int
) -> dict[str, Tensor]:
    device = encoders.device
    return _joined(
        encoders.encode_pixels(
            pictures.pixels[first : first + batch_size].to(device).float().div_(255.0)
        )
        for first in range(0, len(pictures), batch_size)
    )


def _joined(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for batch in batches:
        for name, tensor in batch.items():
            parts.setdefault(name, []).append(tensor.half().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _write(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} would hold values that are not finite; not written")
    started_s = time.monotonic()
    with atomic_path(path) as temporary:
        save_tensors({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _log.info("wrote %s: %s in %.1f s", path, shapes, time.monotonic() - started_s)
