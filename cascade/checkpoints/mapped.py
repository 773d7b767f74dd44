"""Tensors in files, memory-mapped one by one when they are asked for.

A tensor that is used as it is in the file takes no memory but the file's own pages. The pages of
one that was only the source of a copy (another number format, another device, a join) are given
back as soon as the last reference to it goes, so that a conversion never holds a file twice.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import platform
import struct
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.errors import UserError

MAX_HEADER_BYTES = 64 << 20
_OF_PYTORCH = (b"PK\x03\x04", b"\x80\x02")
"""What PyTorch's files begin with: a zip, and the bare pickle before it."""
_LINUX_NORESERVE = {"x86_64": 0x4000, "aarch64": 0x4000}
"""Linux's MAP_NORESERVE by machine, which Python names only from 3.13 on."""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """A tensor that is not read yet."""

    shape: torch.Size
    dtype: torch.dtype
    """Number format to read it in, which may differ from the file's."""
    source: Callable[[], Tensor]
    """Returns it as it is in the file."""
    device: str | torch.device = "cpu"
    """Where to read it to."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the tensor."""
        return self.source().to(self.device, self.dtype)


class StoredTensors(Mapping[str, Tensor]):
    """Named tensors, each read whenever it is asked for; ``stored`` tells sizes without reading."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Name the tensors."""
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:
        """Tell whether there is one of this name, reading none."""
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the file's order."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.stored)

    def moved(self, device: str | torch.device, dtype: torch.dtype | None) -> StoredTensors:
        """Return the same, each brought to a device and number format as it is read.

        Args:
            device: Where the tensors go.
            dtype: Number format of the floating-point ones; None keeps each one's own.
        """
        moved = {}
        for name, one in self.stored.items():
            target = dtype if dtype is not None and one.dtype.is_floating_point else one.dtype
            moved[name] = replace(one, device=device, dtype=target)
        return StoredTensors(moved)

    def joined(self, names: Sequence[str]) -> Tensor:
        """Read tensors into one, along the first axis, with no copy of any of them beside it.

        Raises:
            ValueError: If they differ in more than their height.
        """
        parts = [self.stored[name] for name in names]
        first = parts[0]
        alike = all(one.shape[1:] == first.shape[1:] and one.shape for one in parts)
        if not alike or any(one.dtype != first.dtype for one in parts):
            raise ValueError(f"{', '.join(names)} do not fit together")
        rows = sum(one.shape[0] for one in parts)
        device = torch.device(first.device)
        joined = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=device)
        for one, target in zip(parts, joined.split([one.shape[0] for one in parts]), strict=True):
            target.copy_(one.source())
        return joined


class MappedFile:
    """A file mapped as a whole, privately: what is written to its tensors never reaches it.

    The system is asked to set no memory aside for pages that may never be written to, where it can:
    a file may then be larger than all memory and swap. Where even so no writable map is granted
    (strict overcommit, a limit on data), the file is mapped to be read, and tensors are copies.

    Tensors on the same bytes share them: of a network that is changed in place and another one
    from the same ``MappedFile``, the second has the changes. Open the file again for another one.
    """

    def __init__(self, path: Path) -> None:
        """Map the file; no page of it is read yet."""
        with open(path, "rb") as file:
            try:
                self._map = _map_privately(file.fileno())
                self._writable = True
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self._writable = False
        self._holders: dict[object, tuple[int, int]] = {}

    def __getitem__(self, part: slice) -> bytes:
        """Return a copy of some bytes."""
        return self._map[part]

    def stored(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Stored:
        """Return the tensor whose values begin at the byte ``start``."""
        return Stored(shape, dtype, partial(self._tensor, start, shape, dtype))

    def _tensor(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if shape.numel() == 0:
            return torch.empty(shape, dtype=dtype)
        stop = start + shape.numel() * dtype.itemsize
        # torch computes on aligned numbers alone, and writing to a map to be read is a crash.
        if start % dtype.itemsize or not self._writable:
            with memoryview(self._map) as whole, whole[start:stop] as part:
                copy = bytearray(part)
            self._let_go(None, start, stop)
            return torch.frombuffer(copy, dtype=dtype).view(shape)
        view = memoryview(self._map)[start:stop]
        # torch keeps the view as long as any tensor on these values lives.
        holder = object()
        self._holders[holder] = (start, stop)
        weakref.finalize(view, self._let_go, holder, start, stop).atexit = False
        return torch.frombuffer(view, dtype=dtype).view(shape)

    def _let_go(self, holder: object, start: int, stop: int) -> None:
        """Give a tensor's pages back, if no other tensor is on them.

        Another one could have been written to, and dropping its pages would undo that.
        """
        self._holders.pop(holder, None)
        shared = any(start < end and begin < stop for begin, end in self._holders.values())
        first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
        if not shared and first < last and hasattr(mmap, "MADV_DONTNEED"):
            length = (last - first) * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, length)


def _map_privately(descriptor: int) -> mmap.mmap:
    """Map a file so that what is written stays here; without a reserve of memory if possible."""
    noreserve = getattr(mmap, "MAP_NORESERVE", None)
    if noreserve is None and sys.platform == "linux":
        noreserve = _LINUX_NORESERVE.get(platform.machine())
    if noreserve is None:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | noreserve
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file, of which only the header is read."""

    metadata: dict[str, str]
    tensors: StoredTensors


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open a safetensors file.

    Args:
        path: An existing file.

    Raises:
        UserError: If it is cut off, lies about its size or its tensors' places, or holds a number
            format that torch has none for.
    """
    length = _header_length(path)
    try:
        # Checks what the header says: places in the file, without holes, as large as the shapes.
        # For numpy, since for torch it would map the whole file writable, with memory set aside.
        with safe_open(path, framework="np"):
            pass
        file = MappedFile(path)
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); download or export it again"
        ) from error
    except (OSError, RuntimeError) as error:  # a map larger than the system grants
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: can't be mapped into memory ({reason})") from error
    header = json.loads(file[8 : 8 + length])
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{path}: {name} is in {entry['dtype']}, a format not known here")
        begin, end = entry["data_offsets"]
        shape = torch.Size(entry["shape"])
        assert end - begin == math.prod(shape) * dtype.itemsize, f"{path}: {name}"
        tensors[name] = file.stored(8 + length + begin, shape, dtype)
    return SafetensorsFile(dict(metadata), StoredTensors(tensors))


def _header_length(path: Path) -> int:
    """Return the header's length; refuse a claim of more than the file before it is allocated."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
    header: int | None = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header + 8 > size or header > MAX_HEADER_BYTES:
        if start.startswith(_OF_PYTORCH):
            raise UserError(
                f"{path}: a PyTorch file (a pickle) by the name of safetensors; export it as "
                "safetensors where it was made"
            )
        claim = "is too short" if header is None else f"claims a header of {header} bytes"
        raise UserError(
            f"{path}: not a whole safetensors file (it {claim} and has {size} bytes); "
            "download or export it again"
        )
    return header
