"""Pictures with captions to shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import random
import re
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from cascade.checkpoints.files import atomic_path
from cascade.errors import UserError
from train.data.beside import index_path, write_beside
from train.data.members import clean_captions
from train.data.pictures import BROKEN_PICTURE
from train.data.shards import on_background, shard_name
from train.data.write_sources import Source, open_source

_log = logging.getLogger(__name__)

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "light blue": (190, 220, 245),
    "light pink": (250, 205, 215),
    "light green": (200, 235, 200),
    "light yellow": (252, 244, 190),
    "light gray": (215, 215, 215),
    "lavender": (220, 208, 245),
    "peach": (255, 218, 190),
    "mint": (190, 240, 220),
}
"""Plain colours for the pictures with alpha, by the words that name them in a caption."""


@dataclass(frozen=True)
class WriteOptions:
    """What ``python -m train.data write`` does."""

    source: Path
    """Folder, zip, jsonl or parquet file; :mod:`train.data.write_sources` says which."""
    out: Path
    """Folder for the shards."""
    name: str | None = None
    """Shards are called ``NAME-000000.tar``; None: the source's name."""
    split: str | None = None
    """Take only rows of this split; None: all rows."""
    size: int | None = None
    """Side of the square that pictures are shrunk and cropped to; None: as they are."""
    background_variants: float = 0.0
    """Share of the pictures with alpha that get a second copy on a named plain colour."""
    shard_size: int = 1000
    """Pictures a shard."""
    seed: int = 0
    """Seeds which pictures get a coloured copy, and the colours."""
    force: bool = False
    """Overwrite shards of the same name."""

    def __post_init__(self) -> None:
        """Refuse values that can't work."""
        if self.size is not None and not 8 <= self.size <= 8192:
            raise UserError(f"--size {self.size}: choose a side between 8 and 8192")
        if not 0.0 <= self.background_variants <= 1.0:
            raise UserError(f"--background-variants {self.background_variants}: a share in [0, 1]")
        if self.shard_size < 1:
            raise UserError(f"--shard-size {self.shard_size}: at least 1")


@dataclass(frozen=True)
class WriteReport:
    """What was written."""

    written: int
    shards: int
    broken: tuple[str, ...]


def write_shards(options: WriteOptions) -> WriteReport:
    """Write shards with members ``KEY.png``, ``KEY.txt``, ``KEY.json``, and their indexes.

    They appear, and those that they replace go, when all of them are written.

    Raises:
        UserError: No captions, no row of the split, shards that are there already.
    """
    source = open_source(options.source)
    if not any(options.split in (None, row.get("split")) for row in source.rows()):
        where = "captions.jsonl" if options.source.is_dir() else options.source.name
        raise UserError(f"{options.source}: no row of split {options.split!r} in {where}")
    name = options.name or options.source.stem
    options.out.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(re.escape(name) + r"-\d{6}\.tar")  # not those of a set NAME-more
    there = sorted(path for path in options.out.iterdir() if numbered.fullmatch(path.name))
    if there and not options.force:
        raise UserError(f"{there[0]}: is there already; choose another --out or add --force")
    with tempfile.TemporaryDirectory(prefix=f".{name[:32]}.", dir=options.out) as temporary:
        report = _write_all(source, options, Path(temporary), name)
        for old in there:
            index_path(old).unlink(missing_ok=True)
            old.unlink()
        for path in sorted(Path(temporary).iterdir()):
            path.replace(options.out / path.name)
    _log.info("wrote %d shards with %d pictures to %s", report.shards, report.written, options.out)
    return report


def _write_all(source: Source, options: WriteOptions, out: Path, name: str) -> WriteReport:
    broken: list[str] = []
    keys = _Keys()
    written = shards = 0
    pending: list[tuple[str, bytes, dict[str, Any]]] = []
    for row in source.rows():
        if options.split not in (None, row.get("split")):
            continue
        try:
            pending.extend(_variants(keys, row, source.read(row), options))
        except (*BROKEN_PICTURE, KeyError, zipfile.BadZipFile, zlib.error) as error:
            broken.append(f"{row.get('file', '(no file)')}: {error}")
        while len(pending) >= options.shard_size:
            chunk, pending = pending[: options.shard_size], pending[options.shard_size :]
            _write_shard(shard_name(out, name, shards), chunk)
            written, shards = written + len(chunk), shards + 1
    if pending:
        _write_shard(shard_name(out, name, shards), pending)
        written, shards = written + len(pending), shards + 1
    for line in broken:
        _log.warning("skipped %s", line)
    if not written:
        raise UserError(f"{options.source}: not one picture could be read")
    return WriteReport(written, shards, tuple(broken))


class _Keys:
    """Gives each picture a key of its own, from its file's name."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.files: set[str] = set()

    def of(self, row: dict[str, Any]) -> str:
        """Return the key; a name that another folder has taken gets its folder's name before it.

        Raises:
            ValueError: The file was listed before.
        """
        path = Path(row["file"])
        if row["file"] in self.files:
            raise ValueError("listed twice")
        self.files.add(row["file"])
        # A dot would end the key in a shard, a slash makes it a folder.
        names = (
            "_".join(parts).replace(".", "_").replace("/", "_")
            for parts in ([path.stem], path.with_suffix("").parts)
        )
        return self.reserve(*names)

    def reserve(self, *names: str) -> str:
        """Return the first name that is free; if none is, the last with a number."""
        numbered = (f"{names[-1]}_{number}" for number in itertools.count(2))
        key = next(one for one in itertools.chain(names, numbered) if one not in self.taken)
        self.taken.add(key)
        return key


def _variants(
    keys: _Keys, row: dict[str, Any], data: bytes, options: WriteOptions
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (key, PNG, metadata) of a picture, and perhaps of its coloured copy."""
    key = keys.of(row)
    captions = list(clean_captions(row.get("captions") or [row.get("caption") or ""]))
    if not captions:
        raise ValueError("without a caption")
    with Image.open(io.BytesIO(data)) as opened:
        image = ImageOps.exif_transpose(opened)
        yield key, *_member(image, (255, 255, 255), {**row, "captions": captions}, options)
        # The choice depends on the key, not on the order: adding pictures changes no other's.
        digest = hashlib.sha256(f"{options.seed}:{key}".encode()).hexdigest()
        choice = random.Random(digest)
        has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        if has_alpha and choice.random() < options.background_variants:
            words = choice.choice(sorted(BACKGROUNDS))
            colored = {
                **row,
                "captions": [f"{text} on a {words} background" for text in captions],
                "background": words,
            }
            yield keys.reserve(f"{key}_bg"), *_member(image, BACKGROUNDS[words], colored, options)


def _member(
    image: Image.Image, color: tuple[int, int, int], row: dict[str, Any], options: WriteOptions
) -> tuple[bytes, dict[str, Any]]:
    # Composited before the resize: colours under transparent pixels never bleed into the edges.
    picture = on_background(image, color)
    crop = (0, 0, picture.width, picture.height)
    if options.size is not None:
        picture, crop = square(picture, options.size)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    extra = {"original_width": image.width, "original_height": image.height, "crop": list(crop)}
    return buffer.getvalue(), {**row, **extra}


def square(image: Image.Image, size: int) -> tuple[Image.Image, tuple[int, int, int, int]]:
    """Cut the centre square and resize it.

    Returns:
        The picture and the crop's box (left, top, right, bottom) in the original's pixels.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box), box


def _write_shard(path: Path, samples: list[tuple[str, bytes, dict[str, Any]]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for key, picture, row in samples:
            add_member(tar, f"{key}.png", picture)
            add_member(tar, f"{key}.txt", row["captions"][0].encode())
            add_member(tar, f"{key}.json", json.dumps(row, sort_keys=True, default=str).encode())
    write_beside(path)
    _log.info("%s: %d pictures", path.name, len(samples))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file; it has no time, so that the same members are the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
