"""A tar file's members in their order, with where their bytes lie, from a file or from a stream.

Python's own reader takes some truncated archives for whole ones and does not tell where a member of
a stream began; an index needs both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_LARGEST_HEADER = 1 << 20
_SKIP = 1 << 20
_KEY = re.compile(r"^((?:.*/|)[^./][^./]*)\.([^/]+)$")
"""``folder/KEY.EXTENSION``: the extension begins at the name's first dot, as in webdataset."""


class DamagedTarError(ValueError):
    """The archive ends too early, or is none; what came before is whole."""


@dataclass
class Member:
    """A regular file of an archive."""

    name: str
    offset: int
    """Where its bytes begin in the archive."""
    size: int
    _source: _Source
    _kept: bytes | None = None

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            DamagedTarError: The archive ends within.
        """
        if self._kept is not None:
            return self._kept
        self._source.go_to(self.offset)
        return self._source.take(self.size, f"member {self.name}")

    def keep(self) -> None:
        """Read a stream's member now: later it can't be gone back to."""
        if not self._source.seekable:
            self._kept = self.read()


@dataclass
class Entry:
    """The members of one sample: those that follow each other under one key."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    """Extension in lower case -> member."""
    doubled: bool = False
    """Whether an extension came twice; the first is kept."""


class _Source:
    """A stream with a position; going forward reads and forgets where it can't seek."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.position = 0
        self.seekable = stream.seekable()

    def take(self, count: int, what: str) -> bytes:
        """Return exactly ``count`` bytes."""
        data = self.stream.read(count)
        self.position += len(data)
        if len(data) < count:
            raise DamagedTarError(f"it ends within {what}, at byte {self.position}")
        return data

    def go_to(self, position: int) -> None:
        """Go to a position; in a stream, one that is not behind."""
        if self.seekable:
            self.stream.seek(position)
            self.position = position
            return
        assert position >= self.position, "a stream's member was asked for twice"
        while self.position < position:
            skipped = self.stream.read(min(_SKIP, position - self.position))
            if not skipped:
                raise DamagedTarError(f"it ends at byte {self.position}, within a member")
            self.position += len(skipped)


def members_of(stream: BinaryIO) -> Iterator[Member]:
    """Yield an archive's regular files.

    Raises:
        DamagedTarError: It is cut or no tar file; all members before have been yielded.
    """
    source = _Source(stream)
    end = stream.seek(0, 2) if source.seekable else None
    position, long_name = 0, None
    while True:
        source.go_to(position)
        header = source.take(_BLOCK, "a header" if position else "its first header")
        if not any(header):
            return
        kind, size = header[156:157], _checked_size(header, position)
        begin = position + _BLOCK
        position = begin + -(-size // _BLOCK) * _BLOCK
        if kind in (b"x", b"L"):
            if size > _LARGEST_HEADER:
                raise DamagedTarError(f"a name of {size} bytes at byte {begin}")
            data = source.take(size, "a long name")
            long_name = _pax_path(data) if kind == b"x" else _text(data)
            continue
        if kind in _REGULAR:
            if end is not None and begin + size > end:
                raise DamagedTarError(f"it ends within member {long_name or _name(header)}")
            yield Member(long_name or _name(header), begin, size, source)
        long_name = None


def entries_of(
    stream: BinaryIO, wanted: Callable[[str], bool], nameless: list[str] | None = None
) -> Iterator[Entry]:
    """Yield an archive's samples; all members' places, and the bytes of those that are wanted.

    Args:
        stream: A file, or a stream that can't seek.
        wanted: Says of an extension whether its member's bytes will be read.
        nameless: Takes the names of members that have no key.

    Raises:
        DamagedTarError: As for :func:`members_of`.
    """
    entry: Entry | None = None
    try:
        for member in members_of(stream):
            split = split_name(member.name)
            if split is None:
                if nameless is not None:
                    nameless.append(member.name)
                continue
            key, extension = split
            if entry is not None and entry.key != key:
                yield entry
                entry = None
            entry = entry or Entry(key)
            if extension in entry.members:
                entry.doubled = True
                continue
            if wanted(extension):
                member.keep()
            entry.members[extension] = member
    except DamagedTarError:
        if entry is not None:
            yield entry  # what it lacks is reported as any other sample's lack
        raise
    if entry is not None:
        yield entry


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into the sample's key and the extension; None if it has no such."""
    name = name.removeprefix("./")
    match = _KEY.match(name)
    if match is None or match[1].rpartition("/")[2].startswith("__"):
        return None
    return match[1], match[2].lower()


def _checked_size(header: bytes, position: int) -> int:
    """Return the size that a header names, after its checksum."""
    try:
        checksum = int(header[148:156].strip(b" \0") or b"-1", 8)
        field_bytes = header[124:136]
        if field_bytes[0] & 0x80:  # GNU's way to write what octal digits have no room for
            size = int.from_bytes(field_bytes[1:], "big")
        else:
            size = int(field_bytes.strip(b" \0") or b"0", 8)
    except ValueError:
        checksum, size = -1, -1
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" ") or size < 0:
        what = "it is no tar file" if not position else f"no header at byte {position}"
        raise DamagedTarError(what)
    return size


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax_path(data: bytes) -> str | None:
    """Return the path of an extended header; its records are ``LENGTH KEY=VALUE`` and a newline."""
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise DamagedTarError("an extended header that can't be read")
        record = data[len(length) + 1 : int(length)]
        if record.startswith(b"path="):
            return record[5:].rstrip(b"\n").decode("utf-8", "surrogateescape")
        data = data[int(length) :]
    return None
