"""The index that lies beside each shard that we write: ``NAME-000000.index.npz``.

It holds what :mod:`train.data.index` finds, and the shard's size, number of samples and sha256. A
run that finds it need not look through the shard. It is trusted only if the shard is that of which
it was made, as far as its size, its first and last member and the end after that tell; ``check
--all`` reads the whole shard and compares the checksum.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cascade.errors import UserError
from train.data.index import INDEX_VERSION, ShardIndex, index_of, load_index, save_index
from train.data.sources import (
    PieceReader,
    open_stream,
    read_if_there,
    scheme_of,
    shard_title,
    sibling,
    size_of,
)
from train.data.transport import SourceError, shown

_log = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.npz"
_HEADER = 512
_END = 2 * _HEADER
"""Zeros after the last member of a tar file."""
_NAME = 100
_SIZE = slice(124, 136)
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Beside:
    """The index beside a shard, and what it says of the shard's file."""

    address: str
    """Of the shard."""
    index: ShardIndex
    num_bytes: int
    sha256: str

    def why_not_trusted(self, pieces: PieceReader) -> str | None:
        """Return why the shard is not the file that was indexed; None if it seems to be.

        Raises:
            SourceError: The shard can't be read.
        """
        size = size_of(self.address)
        if size not in (None, self.num_bytes):  # None: the server does not say
            return f"it is of a shard of {self.num_bytes} bytes, this one has {size}"
        if not len(self.index):
            return "it holds no sample"
        # Shards are filled up to 10 KiB: another of the same size is likely, but hardly one whose
        # last member begins and ends at the same places.
        last = len(self.index) - 1
        for sample in sorted({0, last}):
            begin, end = self.index.extent(sample, self.index.kinds_of(sample))
            first, after = begin - _HEADER, -(-end // _HEADER) * _HEADER
            stop = after + _END if sample == last else begin
            if not 0 <= first < stop <= self.num_bytes:
                return "its members do not lie within the shard"
            piece = pieces.read(self.address, first, stop - first)
            if not self._begins_with(sample, piece):
                return f"sample {sample + 1} of the shard is not {self.index.keys[sample]}"
            if sample == last and any(piece[after - first :]):
                return f"the shard has more than its {len(self.index)} samples"
        return None

    def _begins_with(self, sample: int, header: bytes) -> bool:
        """Return whether a member's header is that of the first member of a sample."""
        offsets = self.index.offsets[sample]
        column = int(np.where(offsets >= 0, offsets, offsets.max() + 1).argmin())
        said = header[_SIZE].rstrip(b"\0 ")
        if not said.isdigit() or int(said, 8) != int(self.index.sizes[sample, column]):
            return False
        name = f"{self.index.keys[sample]}.{self.index.kinds[column]}"
        # Of other names a tar file keeps a shortened form there.
        plain = name.isascii() and len(name) <= _NAME
        return not plain or header[:_NAME].rstrip(b"\0").decode("ascii", "replace") == name

    def require_whole(self) -> None:
        """Read the whole shard and compare its checksum.

        Raises:
            UserError: It is another.
        """
        with open_stream(self.address) as file:
            found = _sha256(file)
        if found != self.sha256:
            raise UserError(
                f"{shown(self.address)}: its sha256 is {found[:12]}..., but "
                f"{self.sha256[:12]}... when it was written; copy or write it again, or, if it was "
                f"changed on purpose, delete {shard_title(self.address)}{INDEX_SUFFIX}"
            )


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := file.read(_BLOCK):
        digest.update(data)
    return digest.hexdigest()


def write_beside(shard: Path) -> Path:
    """Index a shard that was just written, beside it; return the index's path."""
    with shard.open("rb") as file:
        index = index_of(file)
        file.seek(0)
        sha256 = _sha256(file)
    facts = {
        "version": INDEX_VERSION,
        "bytes": shard.stat().st_size,
        "samples": len(index),
        "sha256": sha256,
    }
    path = index_path(shard)
    save_index(index, path, facts)
    return path


def index_path(shard: Path) -> Path:
    """Return where the index of a shard in a folder lies."""
    return shard.with_name(shard_title(str(shard)) + INDEX_SUFFIX)


def find_beside(address: str) -> Beside | None:
    """Return the index beside a shard; None if there is none, or none that can be read."""
    if scheme_of(address) == "pipe":
        return None
    place = sibling(address, shard_title(address) + INDEX_SUFFIX)
    assert place is not None, "only a command has nothing beside it"
    try:
        data = read_if_there(place)
    except SourceError:
        return None  # a server that gives the shards alone: an index is a help, not a need
    if data is None:
        return None
    facts: dict[str, object] = {}
    index = load_index(io.BytesIO(data), shown(place), facts)
    if index is None:
        return None
    known = facts.get("version") == INDEX_VERSION and facts.get("samples") == len(index)
    if not known or not is_consistent(index):
        _log.warning("%s: not trusted: of another version, or not whole", shown(place))
        return None
    return Beside(address, index, int(str(facts["bytes"])), str(facts["sha256"]))


def trusted_beside(address: str) -> ShardIndex | None:
    """Return the index beside a shard if it is the shard's; say so in a line if it is not.

    Raises:
        SourceError: The shard can't be read.
    """
    found = find_beside(address)
    if found is None:
        return None
    pieces = PieceReader()
    try:
        reason = found.why_not_trusted(pieces)
    finally:
        pieces.close()
    if reason is None:
        return found.index
    _log.warning(
        "%s: the index beside it is not trusted: %s; the shard is looked through",
        shown(address),
        reason,
    )
    return None


def is_consistent(index: ShardIndex) -> bool:
    """Return whether the arrays of an index fit each other."""
    count, kinds = len(index.keys), len(index.kinds)
    per_sample = (index.heights, index.widths, index.caption_counts)
    return (
        index.offsets.shape == index.sizes.shape == (count, kinds)
        and all(array.shape == (count,) for array in per_sample)
        and len(index.problems) == count
        and index.scores.shape == (count, len(index.score_names))
        and index.caption_lengths.shape == (int(index.caption_counts.sum()),)
        and bool(np.all((index.offsets >= 0).any(axis=1)))
    )
