"""Safetensors files that are the same to the byte whenever their content is the same.

A file's hash says whose weights a cache, a lesson or a resumed run was made with. safetensors
writes metadata in an order that differs from call to call, so the same weights, written twice,
would pass for others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_LENGTH_BYTES = 8
"""The header's length, a little-endian number, before the header."""


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, their metadata by name.

    Args:
        tensors: Contiguous ones that share no memory.
        path: The file, which is written in place: give a temporary one.
        metadata: What else the file says.

    Raises:
        SafetensorError: It can't be written.
    """
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    if metadata is None or len(metadata) < 2:
        return
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        # The same words in another order; the spaces that pad them are safetensors' own way.
        if len(ordered) > length:
            raise ValueError(f"{path}: its header grew from {length} to {len(ordered)} bytes")
        file.seek(_LENGTH_BYTES)
        file.write(ordered.ljust(length))
