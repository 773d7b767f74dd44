"""What is in a shard and where, without decoding a picture: read once, then kept.

An index holds, for each sample, the places of its members, the size of its picture, the lengths of
its captions and the numbers of its json, so that filters and buckets can be chosen afterwards.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cascade.checkpoints.files import atomic_path
from train.data.archive import DamagedTarError, Entry, entries_of
from train.data.members import (
    CAPTION_KEY,
    LATENT_KEYS,
    METADATA_KEY,
    is_read,
    picture_key,
    read_captions,
    read_metadata,
    scores_of,
    shape_of,
)
from train.data.pictures import BROKEN_PICTURE, fit_picture, read_head

_log = logging.getLogger(__name__)

INDEX_VERSION = 1
_LARGEST_MEMBER = 1 << 28
OK = ""
UNREADABLE_PICTURE = "a picture that can't be read"
"""The problem of a picture whose first bytes, or in a check all of them, can't be decoded."""


@dataclass
class ShardIndex:
    """The samples of one shard, in their order."""

    keys: list[str]
    kinds: list[str]
    """Extensions that occur; the columns of ``offsets`` and ``sizes``."""
    offsets: np.ndarray
    """Where each member's bytes begin, int64 ``(N, kinds)``; -1: the sample has none."""
    sizes: np.ndarray
    """Bytes of each member, int64 ``(N, kinds)``."""
    heights: np.ndarray
    """Of the upright picture, or of that which latents were made from; int32 ``(N,)``."""
    widths: np.ndarray
    problems: list[str]
    """Why a sample can't be used; empty if it can."""
    caption_counts: np.ndarray
    """Wordings of each sample, int32 ``(N,)``."""
    caption_lengths: np.ndarray
    """Characters of all wordings, sample by sample, int32."""
    score_names: list[str]
    scores: np.ndarray
    """Numbers of the json, float64 ``(N, score_names)``; not a number: the sample has none."""
    notes: list[str] = field(default_factory=list)
    """What is wrong with the shard, beside its samples."""
    remarks: dict[str, int] = field(default_factory=dict)
    """What was met and does no harm -> how often."""
    whole: bool = True
    """Whether all of the shard was looked at, as opposed to its first samples."""

    def __len__(self) -> int:
        """Return the number of samples, usable or not."""
        return len(self.keys)

    def extent(self, sample: int, kinds: list[str]) -> tuple[int, int]:
        """Return begin and end of the piece that holds a sample's members of these kinds."""
        columns = [self.kinds.index(kind) for kind in kinds]
        begins = self.offsets[sample, columns]
        ends = begins + self.sizes[sample, columns]
        return int(begins.min()), int(ends.max())

    def kinds_of(self, sample: int) -> list[str]:
        """Return the extensions that a sample has."""
        return [kind for kind, at in zip(self.kinds, self.offsets[sample], strict=True) if at >= 0]


@dataclass
class _Row:
    """One sample on its way into the index."""

    key: str
    places: dict[str, tuple[int, int]]
    size: tuple[int, int] = (0, 0)
    lengths: tuple[int, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    problem: str = OK


def index_of(stream: BinaryIO, most: int | None = None, *, decode: bool = False) -> ShardIndex:
    """Look through a shard.

    Args:
        stream: A file, or a stream that can't seek.
        most: Look at its first so many samples only.
        decode: Decode every picture, where otherwise its first bytes are believed.
    """
    rows: list[_Row] = []
    seen: set[str] = set()
    nameless: list[str] = []
    notes: list[str] = []
    remarks: Counter[str] = Counter()
    whole = True
    try:
        for entry in entries_of(stream, is_read, nameless):
            if most is not None and len(rows) >= most:
                whole = False
                break
            rows.append(_row(entry, remarks, decode=decode))
            if entry.key in seen:
                rows[-1].problem = "a key that came before"
            seen.add(entry.key)
    except DamagedTarError as error:
        notes.append(f"not a whole tar file: {error}")
    if nameless:
        remarks["members without a key"] += len(nameless)
    return _packed(rows, notes, dict(remarks), whole)


def _row(entry: Entry, remarks: Counter[str], *, decode: bool) -> _Row:
    row = _Row(entry.key, {kind: (m.offset, m.size) for kind, m in entry.members.items()})
    for kind in entry.members:
        if not is_read(kind):
            remarks[f"{kind} members, never opened"] += 1
    if entry.doubled:
        row.problem = "two members of one kind"
        return row
    too_large = [kind for kind, m in entry.members.items() if m.size > _LARGEST_MEMBER]
    if any(is_read(kind) for kind in too_large):
        row.problem = f"a {too_large[0]} of more than {_LARGEST_MEMBER >> 20} MiB"
        return row
    picture, latents = picture_key(entry.members), set(LATENT_KEYS.values()) & set(entry.members)
    try:
        metadata = _metadata(entry)
        if picture is not None:
            data = entry.members[picture].read()
            try:
                head = read_head(data, picture)
                if decode:
                    fit_picture(data, (8, 8))
            except BROKEN_PICTURE as error:
                row.problem = "an empty picture" if not data else _broken(error)
                return row
            row.size = (head.height, head.width)
            if not head.expected_name:
                remarks["pictures of another format than their name's, read all the same"] += 1
        elif latents:
            row.size = shape_of(metadata)
        else:
            row.problem = "no picture"
            return row
        row.scores = scores_of(metadata)
        text = entry.members[CAPTION_KEY].read() if CAPTION_KEY in entry.members else None
        captions = read_captions(text, metadata)
    except DamagedTarError:
        row.problem = "cut off"
    except (UnicodeDecodeError, ValueError) as error:
        word = "a caption that is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        row.problem = str(word)[:80]
    else:
        row.lengths = tuple(len(caption) for caption in captions)
        row.problem = OK if captions else "no caption"
    return row


def _metadata(entry: Entry) -> dict[str, Any]:
    member = entry.members.get(METADATA_KEY)
    try:
        return read_metadata(member.read() if member is not None else None)
    except DamagedTarError:
        raise
    except ValueError as error:
        raise ValueError("json that can't be read") from error


def _broken(error: BaseException) -> str:
    if "DecompressionBomb" in type(error).__name__:
        return "a picture of too many pixels"
    if "animated" in str(error):
        return "an animated picture"
    return UNREADABLE_PICTURE


def _packed(rows: list[_Row], notes: list[str], remarks: dict[str, int], whole: bool) -> ShardIndex:
    kinds = sorted({kind for row in rows for kind in row.places})
    names = sorted({name for row in rows for name in row.scores})
    places = np.array(
        [[row.places.get(kind, (-1, 0)) for kind in kinds] for row in rows], np.int64
    ).reshape(len(rows), len(kinds), 2)
    scores = [[row.scores.get(name, np.nan) for name in names] for row in rows]
    return ShardIndex(
        keys=[row.key for row in rows],
        kinds=kinds,
        offsets=places[..., 0],
        sizes=places[..., 1],
        heights=np.array([row.size[0] for row in rows], np.int32),
        widths=np.array([row.size[1] for row in rows], np.int32),
        problems=[row.problem for row in rows],
        caption_counts=np.array([len(row.lengths) for row in rows], np.int32),
        caption_lengths=np.array([n for row in rows for n in row.lengths], np.int32),
        score_names=names,
        scores=np.array(scores, np.float64).reshape(len(rows), len(names)),
        notes=notes,
        remarks=remarks,
        whole=whole,
    )


_ARRAYS = ("offsets", "sizes", "heights", "widths", "caption_counts", "caption_lengths", "scores")
_TEXTS = ("keys", "kinds", "problems", "score_names", "notes", "remarks", "whole")


def save_index(index: ShardIndex, path: Path, facts: Mapping[str, object] | None = None) -> None:
    """Write an index; it appears whole, and the same index is the same bytes.

    Args:
        index: Of a shard.
        path: Its file.
        facts: What is to be kept with it of the shard's own file.
    """
    texts = json.dumps({name: getattr(index, name) for name in _TEXTS})
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    # Lone surrogates stand for bytes of names that are not UTF-8; JSON escapes them.
    arrays["texts"] = np.frombuffer(texts.encode("ascii"), np.uint8)
    arrays["facts"] = np.frombuffer(json.dumps(dict(facts or {})).encode("ascii"), np.uint8)
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            # As numpy.savez does it, but without the time of day.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def load_index(
    file: Path | BinaryIO, where: object = None, facts: dict[str, object] | None = None
) -> ShardIndex | None:
    """Read an index; None if there is none, or none that can be read.

    Args:
        file: Its path, or itself.
        where: What it is called in messages; None: its path.
        facts: Is filled with what was kept with it.
    """
    try:
        with np.load(file, allow_pickle=False) as arrays:
            texts = json.loads(arrays["texts"].tobytes())
            index = ShardIndex(**texts, **{name: arrays[name] for name in _ARRAYS})
            if facts is not None:
                facts.update(json.loads(arrays["facts"].tobytes()))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if not isinstance(error, FileNotFoundError):
            _log.warning("%s: not a readable index, made again", where or file)
        return None
    return index
