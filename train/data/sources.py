"""Where shards are: files, http(s), s3 and gs addresses, and the output of commands.

One shard can be read from its beginning (:func:`open_stream`), in pieces (:class:`PieceReader`) or
be brought here whole (:func:`fetched`). Addresses are shown without passwords and queries, which
carry the keys of signed addresses.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import shutil
import tempfile
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

from cascade.errors import UserError, describe_os_error
from train.data.transport import (
    PIPE,
    Command,
    Download,
    NoPiecesError,
    SourceError,
    request,
    request_piece,
    retried,
    shown,
)

_HTTP = ("http://", "https://")
_FSSPEC = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
"""Scheme -> the package that fsspec needs for it."""
_GZIP = b"\x1f\x8b"
_BLOCK = 1 << 20


def expand_shards(pattern: str) -> list[str]:
    """Return the shards that a glob or a brace pattern (``{000..003}``) names.

    Files and s3/gs objects are globbed and sorted; http addresses and commands are taken as they
    are. Several patterns are joined by ``::``.

    Raises:
        UserError: None is there, or one is named twice.
    """
    found: list[str] = []
    for one in pattern.split("::"):
        for part in _expand_braces(one):
            found.extend(_globbed(part))
    if not found:
        raise UserError(f"{pattern}: no shard matches; check the path or write them first")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise UserError(f"{pattern}: names {shown(twice)} twice; name each shard once")
    return found


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        expanded
        for number in range(int(first), int(last) + 1)
        for expanded in _expand_braces(
            f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        )
    ]


def _globbed(part: str) -> list[str]:
    if part.startswith((PIPE, *_HTTP)):
        return [part]
    scheme = scheme_of(part)
    if scheme is None:
        return sorted(glob(part))
    if not any(letter in part for letter in "*?["):
        return [part]
    return sorted(f"{scheme}://{name.lstrip('/')}" for name in _filesystem(part).glob(part))


def scheme_of(address: str) -> str | None:
    """Return ``http``, ``s3``, ``pipe`` and so on, or None for a file.

    Raises:
        UserError: A scheme that is not read here.
    """
    if address.startswith(PIPE):
        return "pipe"
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    if match is None:
        return None
    scheme = match[1].lower()
    if scheme in ("http", "https") or scheme in _FSSPEC:
        return scheme
    raise UserError(
        f"{shown(address)}: addresses of kind {scheme}:// are not read; use a path, http(s)://, "
        "s3://, gs:// or pipe:"
    )


def check_allowed(addresses: list[str], *, allow_pipe: bool, in_pieces: bool) -> None:
    """Refuse commands that nobody allowed, and what can't be read in pieces, before any work.

    Raises:
        UserError: Naming the first of them.
    """
    for address in addresses:
        if scheme_of(address) != "pipe":
            continue
        if not allow_pipe:
            raise UserError(
                f"{address}: would run a command; if it is yours, set data.allow_pipe to true "
                "(--allow-pipe)"
            )
        if in_pieces:
            raise UserError(
                f"{address}: a command's output can only be read from its beginning; use "
                "data.mode resampled"
            )


def stamp(address: str) -> str:
    """Return what changes when a shard does: size and time, or the server's word for it.

    Raises:
        SourceError: It is not there.
    """
    scheme = scheme_of(address)
    if scheme is None:
        return retried(address, lambda: _file_stamp(address))
    if scheme in ("http", "https"):
        with retried(address, lambda: request(address, method="HEAD")) as answer:
            headers = answer.headers
            known = [headers.get(name, "") for name in ("Content-Length", "ETag", "Last-Modified")]
        return "/".join(known)
    details = retried(address, lambda: _filesystem(address).info(address))
    names = ("size", "ETag", "etag", "LastModified", "updated", "mtime")
    return "/".join(str(details.get(name, "")) for name in names)


def _file_stamp(address: str) -> str:
    status = os.stat(address)
    return f"{status.st_size}/{status.st_mtime_ns}"


def size_of(address: str) -> int | None:
    """Return a shard's bytes; None if its server does not say.

    Raises:
        SourceError: It is not there.
    """
    scheme = scheme_of(address)
    if scheme is None:
        return retried(address, lambda: os.stat(address).st_size)
    if scheme in ("http", "https"):
        with retried(address, lambda: request(address, method="HEAD")) as answer:
            length = answer.headers.get("Content-Length")
    else:
        length = retried(address, lambda: _filesystem(address).info(address)).get("size")
    return None if length is None else int(length)


def read_if_there(address: str) -> bytes | None:
    """Return a small file that need not be there, or None.

    Raises:
        SourceError: It may be there but can't be read.
    """
    try:
        with open_stream(address) as file:
            return file.read()
    except SourceError as error:
        if isinstance(error.__cause__, FileNotFoundError) or "HTTP 404" in str(error):
            return None
        raise


def open_stream(address: str, *, allow_pipe: bool = False) -> BinaryIO:
    """Open a shard to be read from its beginning.

    Raises:
        SourceError: It is not there.
        UserError: A command that nobody allowed.
    """
    scheme = scheme_of(address)
    if scheme is None:
        return retried(address, lambda: open(address, "rb"))
    if scheme == "pipe":
        check_allowed([address], allow_pipe=allow_pipe, in_pieces=False)
        return cast(BinaryIO, io.BufferedReader(Command(address), _BLOCK))
    if scheme in ("http", "https"):
        return cast(BinaryIO, io.BufferedReader(Download(address), _BLOCK))
    return cast(BinaryIO, retried(address, lambda: _filesystem(address).open(address, "rb")))


def fetched(address: str, *, allow_pipe: bool = False) -> BinaryIO:
    """Return a whole shard as a file here, unpacked if it is a gzip file.

    A shard from elsewhere lies in a nameless temporary file: nothing is left behind even by a
    process that is killed.

    Raises:
        SourceError: It can't be brought here.
    """
    file = open_stream(address, allow_pipe=allow_pipe)
    try:
        if scheme_of(address) is not None:
            file = _copied(file, file)
        packed = file.read(2) == _GZIP
        file.seek(0)
        return _copied(gzip.GzipFile(fileobj=file), file) if packed else file
    except OSError as error:
        reason = describe_os_error(error) or str(error)
        raise SourceError(f"{shown(address)}: {reason}") from error


def _copied(stream: Any, opened: BinaryIO) -> BinaryIO:
    """Copy what a stream gives to a nameless file; ``opened`` is closed."""
    kept = tempfile.TemporaryFile(prefix="cascade-shard-")
    try:
        with opened:
            shutil.copyfileobj(stream, kept, _BLOCK)
    except EOFError:
        pass  # a gzip file that was cut: the reader of the tar file will say so
    except BaseException:
        kept.close()
        raise
    kept.seek(0)
    return cast(BinaryIO, kept)


class PieceReader:
    """Reads pieces of shards; keeps the last few files open."""

    def __init__(self, max_open: int = 16) -> None:
        """Keep at most ``max_open`` files open."""
        self.max_open = max_open
        self._files: dict[str, BinaryIO] = {}

    def read(self, address: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset``.

        Raises:
            SourceError: They are not there.
        """
        scheme = scheme_of(address)
        if scheme is None:
            data = os.pread(self._file(address).fileno(), length, offset)
        elif scheme in ("http", "https"):
            data = retried(address, lambda: request_piece(address, offset, length))
        else:
            files = _filesystem(address)
            end = offset + length
            # By name: s3fs has a version between the path and them.
            data = retried(address, lambda: files.cat_file(address, start=offset, end=end))
        if len(data) != length:
            raise SourceError(
                f"{shown(address)}: ends before byte {offset + length}; it has changed since it "
                "was indexed, start the command again"
            )
        return data

    def _file(self, address: str) -> BinaryIO:
        file = self._files.pop(address, None)
        if file is None:
            file = open_stream(address)
            while len(self._files) >= self.max_open:
                self._files.pop(next(iter(self._files))).close()
        self._files[address] = file  # the newest is last
        return file

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()


def why_whole_alone(shards: str) -> str | None:
    """Return what keeps shards from being indexed and read in pieces; None if nothing does.

    Of shards that no command gives, the first one speaks for all.

    Args:
        shards: A glob or brace pattern.

    Raises:
        UserError: No shard matches.
    """
    addresses = expand_shards(shards)
    if any(scheme_of(address) == "pipe" for address in addresses):
        return "the output of a command can only be read from its beginning"
    pieces = PieceReader()
    try:
        begin = pieces.read(addresses[0], 0, len(_GZIP))
    except NoPiecesError:
        return "their server gives no pieces of files"
    except SourceError:
        return None  # who opens them says what is wrong
    finally:
        pieces.close()
    return "they are packed" if begin == _GZIP else None


def _filesystem(address: str) -> Any:
    import fsspec

    scheme = address.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        package = _FSSPEC[scheme]
        raise UserError(
            f"{shown(address)}: {scheme}:// needs the package {package}: pip install {package}"
        ) from error


def shard_title(address: str) -> str:
    """Return a shard's short name: its file's, without folders and ``.tar``."""
    name = shown(address).rstrip("/").rpartition("/")[2]
    return re.sub(r"\.(tar|tgz)(\.gz)?$", "", name) or name


def sibling(address: str, name: str) -> str | None:
    """Return the address of ``name`` in the folder of a shard; None for a command."""
    scheme = scheme_of(address)
    if scheme is None:
        return str(Path(address).with_name(name))
    if scheme == "pipe":
        return None
    parts = urlsplit(address)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))
