"""Sets of pictures to measure: a folder, webdataset shards, or arrays in memory.

A set gives its pictures by key, in the order of the keys, as square uint8 pictures of one size,
whatever it was made from; it holds none of them longer than a batch.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate.resize import Filter, resize, to_levels
from cascade.images import flatten, open_image
from cascade.text.picture_encoder import centre_square

Format = Literal["png", "jpeg", "webp", "any"]
_SUFFIXES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True)
class Entry:
    """Where one picture is."""

    key: str
    path: Path
    """Its file, or the archive that holds it."""
    member: tarfile.TarInfo | None = None
    """Its place in the archive."""
    index: int = -1
    """Its row of an array."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures by key."""

    where: str
    """The folder, or what messages call the set."""
    entries: tuple[Entry, ...]
    """By key."""
    size: int
    """Side that pictures are brought to, in pixels."""
    filter: Filter
    """Filter of the resize."""
    native_size: int | None = None
    """Side that every picture has before the resize, or an error; None: any, cut to a square."""
    array: Tensor | None = None
    """``(N, 3, H, W)`` uint8, of a set in memory."""

    @property
    def keys(self) -> list[str]:
        """The keys, in order."""
        return [entry.key for entry in self.entries]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.entries)

    def select(self, keys: Sequence[str]) -> PictureSet:
        """Return the pictures of some keys, in the set's order.

        Raises:
            UserError: If one is missing, naming the first.
        """
        wanted = set(keys)
        kept = tuple(entry for entry in self.entries if entry.key in wanted)
        if len(kept) < len(wanted):
            missing = sorted(wanted - {entry.key for entry in kept})
            raise UserError(
                f"{self.where}: {len(missing)} of {len(wanted)} pictures are missing, the first "
                f"is {missing[0]!r}; a picture's file is named by its prompt's key"
            )
        return PictureSet(self.where, kept, self.size, self.filter, self.native_size, self.array)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield ``(B, 3, size, size)`` uint8 batches, in the order of the keys.

        Raises:
            UserError: If a picture cannot be read, or has another size than the protocol says.
        """
        reader = _Reader()
        try:
            for start in range(0, len(self), batch_size):
                rows = [self._picture(e, reader) for e in self.entries[start : start + batch_size]]
                yield torch.stack(rows)
        finally:
            reader.close()

    def _picture(self, entry: Entry, reader: _Reader) -> Tensor:
        pixels = self.array[entry.index] if self.array is not None else reader.read(entry)
        height, width = pixels.shape[-2:]
        if self.native_size is not None and (height, width) != (self.native_size,) * 2:
            raise UserError(
                f"{self.where}: {entry.key} is {width}x{height} pixels, but the protocol measures "
                f"pictures of {self.native_size}x{self.native_size}"
            )
        square = centre_square(pixels[None])
        if square.shape[-1] == self.size:
            return square[0]
        return to_levels(resize(square.float(), self.size, self.filter))[0]


class Fingerprint:
    """A hash over the keys and pixels of a set, taken as they are measured."""

    def __init__(self) -> None:
        """Start without pictures."""
        self._digest = hashlib.sha256()

    def update(self, keys: Sequence[str], batch: Tensor) -> None:
        """Take ``(B, 3, H, W)`` uint8 pictures and their keys."""
        for key, picture in zip(keys, batch, strict=True):
            self._digest.update(f"{key} {tuple(picture.shape)}\n".encode())
            self._digest.update(picture.contiguous().numpy().tobytes())

    @property
    def digits(self) -> str:
        """12 hex digits."""
        return self._digest.hexdigest()[:12]


class _Reader:
    """Reads pictures; keeps the archive that it reads from open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._archive: tarfile.TarFile | None = None

    def read(self, entry: Entry) -> Tensor:
        """Return ``(3, H, W)`` uint8."""
        if entry.member is None:
            image = open_image(entry.path)
        else:
            image = self._from_archive(entry, entry.member)
        return torch.from_numpy(np.array(flatten(image))).permute(2, 0, 1).contiguous()

    def _from_archive(self, entry: Entry, member: tarfile.TarInfo) -> Image.Image:
        if self._path != entry.path or self._archive is None:
            self.close()
            self._archive, self._path = tarfile.open(entry.path), entry.path
        content = self._archive.extractfile(member)
        assert content is not None, "only files are listed"
        try:
            image = Image.open(io.BytesIO(content.read()))
            image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{entry.path}: {member.name}: not a readable picture") from error
        return image

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
        self._archive = self._path = None


def open_set(
    folder: Path,
    size: int,
    filter: Filter,
    format: Format = "any",
    native_size: int | None = None,
) -> PictureSet:
    """List the pictures of a folder, or of the webdataset shards in it.

    A picture's key is its path in the folder without the suffix, or its key in the shard.

    Args:
        folder: The folder; everything below it counts.
        size: Side to bring pictures to.
        filter: Filter of the resize.
        format: The one format that its pictures may have.
        native_size: Side that pictures must have before the resize; None: any.

    Raises:
        UserError: No such folder, no pictures in it, pictures of another format, or two of a key.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures; check the path")
    shards = sorted(folder.rglob("*.tar"))
    entries = [e for path in shards for e in _in_shard(path)] if shards else _in_folder(folder)
    if not entries:
        raise UserError(f"{folder}: no pictures ({', '.join(_SUFFIXES)}) and no .tar shards in it")
    for entry in entries:
        name = entry.member.name if entry.member else entry.path.name
        found = _SUFFIXES[Path(name).suffix.lower()]
        if format not in ("any", found):
            raise UserError(
                f"{entry.path}: {name} is {found}, but the protocol measures {format}: the format "
                "changes the figures; write the pictures as the protocol says"
            )
    entries = sorted(entries, key=lambda entry: entry.key)
    for first, second in pairwise(entries):
        if first.key == second.key:
            raise UserError(f"{folder}: two pictures have the key {first.key!r}")
    return PictureSet(str(folder), tuple(entries), size, filter, native_size)


def _in_folder(folder: Path) -> list[Entry]:
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES]
    # Files such as "._1.jpg" are what some systems leave beside a file, not pictures.
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".")]
    return [Entry(path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths]


def _in_shard(path: Path) -> list[Entry]:
    return [
        Entry(member_key(member.name), path, member)
        for member in members_of(path)
        if f".{member.name.rsplit('.', 1)[-1].lower()}" in _SUFFIXES
    ]


def member_key(name: str) -> str:
    """Return the key of a shard's member: its name up to the first dot of its last part."""
    folder, _, last = name.rpartition("/")
    key = last.split(".", 1)[0]
    return f"{folder}/{key}" if folder else key


def members_of(path: Path) -> list[tarfile.TarInfo]:
    """Return the files of a shard.

    Raises:
        UserError: If it is no tar file.
    """
    try:
        with tarfile.open(path) as archive:
            return [member for member in archive if member.isfile()]
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a readable shard ({error})") from error


def in_memory(
    pixels: Tensor,
    size: int,
    filter: Filter,
    keys: Sequence[str] | None = None,
    native_size: int | None = None,
    where: str = "the pictures",
) -> PictureSet:
    """Make a set of pictures in memory.

    Args:
        pixels: ``(N, 3, H, W)``: uint8, or float in [0, 1], which is rounded to 8 bits as a file
            would.
        size: Side to bring pictures to.
        filter: Filter of the resize.
        keys: One for each picture; None numbers them.
        native_size: Side that pictures must have; None: any.
        where: What messages call the set.

    Raises:
        UserError: Another shape, values outside of [0, 1], not as many keys, or a key twice.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels):
        raise UserError(f"{where}: shape {tuple(pixels.shape)}; (N, 3, H, W) is needed")
    if pixels.dtype != torch.uint8:
        if not pixels.is_floating_point():
            raise UserError(f"{where}: {pixels.dtype}; uint8, or float in [0, 1], is needed")
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # not a number is neither
            raise UserError(f"{where}: values from {low:g} to {high:g}; float lies in [0, 1]")
        pixels = to_levels(pixels.float() * 255)
    names = [f"{index:06d}" for index in range(len(pixels))] if keys is None else list(keys)
    if len(names) != len(pixels) or len(set(names)) != len(names):
        raise UserError(
            f"{where}: {len(pixels)} pictures, {len(names)} keys, {len(set(names))} of them "
            "different; each picture needs a key of its own"
        )
    order = sorted(range(len(names)), key=names.__getitem__)
    entries = tuple(Entry(names[i], Path(where), index=i) for i in order)
    return PictureSet(where, entries, size, filter, native_size, pixels.cpu())
