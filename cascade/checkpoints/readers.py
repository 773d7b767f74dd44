"""Opens files of weights that others wrote, without running any code of theirs.

safetensors (one file, or shards with an index), PyTorch's zip files (tensors only), and folders of
diffusers with a ``config.json``.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoints.files import strip_prefixes
from cascade.checkpoints.mapped import (
    MAX_HEADER_BYTES,
    MappedFile,
    Stored,
    StoredTensors,
    open_safetensors,
)
from cascade.checkpoints.single_file import PartName, is_single_file, parts_of
from cascade.errors import UserError

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin"}
CONFIG_FILE = "config.json"
_INDEX = re.compile(r".+\.safetensors\.index(\.[^.]+)?\.json")
_MAX_JSON_BYTES = 64 << 20
# Keys under which training scripts nest a network's tensors; averaged weights first.
_NESTED = ("ema_state_dict", "state_dict_ema", "state_dict", "effnet_state_dict")


@dataclass
class Opened:
    """Tensors of one network, memory-mapped when they are asked for."""

    where: str
    """The file, and the entry in it if there are several."""
    tensors: StoredTensors
    """By name, without the prefixes of wrappers."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the file says of itself."""
    declared: dict[str, Any] = field(default_factory=dict)
    """The ``config.json`` beside it."""
    part: PartName | None = None
    """Which part of a single file of SD or SDXL it is; None: the file is one network's."""
    prefix: str = ""
    """What the names of that part begin with in the file."""
    file_metadata: dict[str, str] = field(default_factory=dict)
    """What that single file says of itself as a whole."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {name: tuple(one.shape) for name, one in self.tensors.stored.items()}


def open_weights(path: str | Path) -> list[Opened]:
    """Open a file or a folder of weights.

    Args:
        path: A ``.safetensors`` file, an index of shards, a PyTorch file, or a diffusers folder.

    Returns:
        One entry a network: Würstchen's own Stage B file holds the compressor as well, a single
        file of SD or SDXL all that make a picture.

    Raises:
        UserError: If it is not there, is cut off, lies about its size, holds anything but tensors,
            or holds no tensor.
    """
    path = Path(path)
    if path.is_dir():
        opened = [_open_folder(path)]
    elif not path.is_file():
        raise UserError(f"{path}: no such file or folder; check the path")
    elif is_index(path):
        opened = [Opened(str(path), _open_shards(path), {}, _declared(path.parent))]
    elif path.suffix in PICKLE_SUFFIXES:
        opened = _open_pickle(path)
    else:
        file = open_safetensors(path)
        opened = [Opened(str(path), file.tensors, file.metadata, _declared(path.parent))]
    for one in opened:
        one.tensors = StoredTensors(strip_prefixes(one.tensors.stored))
        if not one.tensors:
            raise UserError(f"{one.where}: holds no tensor at all; export or download it again")
    return [part for one in opened for part in _parts(one)]


def _parts(opened: Opened) -> list[Opened]:
    """Take a single file of SD or SDXL apart; anything else is one part."""
    if not is_single_file(opened.tensors.stored):
        return [opened]
    return [
        Opened(
            f"{opened.where} ({part.name})",
            part.tensors,
            part.metadata,
            part.declared,
            part=part.name,
            prefix=part.prefix,
            file_metadata=opened.metadata,
        )
        for part in parts_of(opened.tensors.stored, opened.where, opened.metadata)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """Return a small JSON object.

    Raises:
        UserError: If it is too large, or no JSON object.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise UserError(f"{path}: too large for a JSON file of settings; refused")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def is_entry(path: Path) -> bool:
    """Return whether a file, by its name, is where weights are opened: no shard of an index."""
    if is_index(path) or path.suffix in PICKLE_SUFFIXES:
        return True
    return path.suffix == ".safetensors" and "-of-" not in path.name


def is_index(path: Path) -> bool:
    """Return whether a file, by its name, lists shards; a variant's mark may be in it."""
    return _INDEX.fullmatch(path.name) is not None


def weights_in(folder: Path) -> Path:
    """Return the weights file or index of a folder of one network.

    Of several variants the unmarked one wins, then the others in alphabetical order; safetensors
    win over PyTorch's files.

    Raises:
        UserError: If there is none.
    """
    entries = sorted(entry for entry in folder.iterdir() if entry.is_file())
    for suffix in (".json", ".safetensors", ".bin", ".pt"):
        found = [
            entry.name
            for entry in entries
            if entry.suffix == suffix
            and not (suffix == ".safetensors" and "-of-" in entry.name)
            and not (suffix == ".json" and not is_index(entry))
        ]
        if found:
            return folder / min(found, key=lambda name: (name.count("."), name))
    raise UserError(f"{folder}: no weights in it (.safetensors, or .bin); check the folder")


def _open_folder(folder: Path) -> Opened:
    path = weights_in(folder)
    declared = _declared(folder)
    if is_index(path):
        return Opened(str(path), _open_shards(path), {}, declared)
    if path.suffix in PICKLE_SUFFIXES:
        entries = _open_pickle(path)
        if len(entries) != 1:
            raise UserError(f"{path}: holds {len(entries)} networks; name the file itself")
        return Opened(entries[0].where, entries[0].tensors, {}, declared)
    file = open_safetensors(path)
    return Opened(str(path), file.tensors, file.metadata, declared)


def _declared(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return read_json(path) if path.is_file() else {}


def _open_shards(index: Path) -> StoredTensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise UserError(f"{index}: no weight_map in it; download it again")
    folder = index.parent.resolve()
    tensors: dict[str, Stored] = {}
    for name in sorted({str(value) for value in weight_map.values()}):
        # A plain name beside the index; hub caches link it to a blob elsewhere, so only the name
        # is looked at.
        if os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: names {name!r}, outside its own folder; refused")
        shard = folder / name
        if not shard.is_file():
            raise UserError(f"{index}: names {name}, which is not there; download it again")
        tensors.update(open_safetensors(shard).tensors.stored)
    missing = [key for key in weight_map if key not in tensors]
    if missing:
        raise UserError(f"{index}: {len(missing)} tensors in no shard: {', '.join(missing[:5])}")
    return StoredTensors(tensors)


def _open_pickle(path: Path) -> list[Opened]:
    _check_zip(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it holds more than tensors and could run code when opened; "
            "convert it to safetensors where it was made"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: not a readable PyTorch file ({reason})") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not named tensors")
    found: dict[str, Mapping[Any, Any]] = {}
    for name in _NESTED:
        network = "compressor" if name.startswith("effnet") else "network"
        if network not in found and isinstance(content.get(name), Mapping):
            found[network] = content[name]
    if not found:
        found = {"network": content}
    opened = []
    for network, state in found.items():
        tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        where = str(path) if len(found) == 1 else f"{path} ({network})"
        opened.append(Opened(where, _stored(path, tensors)))
    return opened


def _stored(path: Path, tensors: Mapping[str, Tensor]) -> StoredTensors:
    """Map the tensors of a PyTorch file one by one, in place of torch's one map of all of it.

    torch maps the file at an address that it does not tell, which is found by holding the
    addresses of its tensors against the places of the archive's entries. Where that leaves a
    doubt, torch's own tensors are used.
    """
    for name, one in tensors.items():
        odd = one.layout is not torch.strided or one.is_quantized or one.is_meta
        if odd or one.is_complex():
            raise UserError(f"{path}: {name} is no plain tensor; save its values as floating point")
    places = _entry_places(path)
    addresses = {one.untyped_storage().data_ptr() for one in tensors.values() if one.numel()}
    bases = {min(addresses) - place for place in places} if addresses else set()
    fitting = [
        base
        for base in bases
        if base % mmap.PAGESIZE == 0 and all(address - base in places for address in addresses)
    ]
    file = MappedFile(path) if len(fitting) == 1 else None
    stored = {}
    for name, one in tensors.items():
        if file is not None and one.numel() and one.is_contiguous():
            stored[name] = file.stored(one.data_ptr() - fitting[0], one.shape, one.dtype)
        else:
            stored[name] = Stored(one.shape, one.dtype, partial(_same, one))
    return StoredTensors(stored)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _entry_places(path: Path) -> set[int]:
    """Return where in a zip file of stored entries each one's content begins."""
    places = set()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            # The entry's own header, which precedes it: 30 bytes, its name, and an extra field
            # of another length than the one that the archive's directory has.
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            places.add(entry.header_offset + 30 + name + extra)
    return places


def _check_zip(path: Path) -> None:
    """Refuse what is not PyTorch's zip of stored, uncompressed entries: a zip bomb, above all."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise UserError(
            f"{path}: not a PyTorch file of 2020 or later, or cut off; download it again"
        ) from error
    packed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or math.fsum(entry.file_size for entry in entries) > size:
        raise UserError(f"{path}: refused: it unpacks to more than it holds")
    pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if any(entry.file_size > MAX_HEADER_BYTES for entry in pickles):
        raise UserError(f"{path}: refused: its list of tensors is too large")
