"""Where pictures and captions to be written as shards come from.

- A folder or zip file with ``captions.jsonl``: rows with ``file``, and ``caption`` or ``captions``.
- A folder of pictures, each with a ``.txt`` beside it; every line of that is a wording.
- A ``.jsonl`` file like ``captions.jsonl``; its files lie beside it. ``file_name`` and ``text``, as
  Hugging Face's ``metadata.jsonl`` names them, will do.
- A ``.parquet`` file with the same columns, or with the picture itself in ``image``: bytes, or a
  struct with ``bytes`` and ``path``. It needs the package pyarrow.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from cascade.errors import UserError
from train.data.members import PICTURE_KEYS

Row = dict[str, Any]
_NAMES = {"file_name": "file", "text": "caption"}
_LISTED = "captions.jsonl"


class Source(Protocol):
    """Rows, each with ``file`` and ``caption`` or ``captions``, and the pictures they name."""

    def rows(self) -> Iterator[Row]:
        """Yield the rows."""

    def read(self, row: Row) -> bytes:
        """Return the picture of a row."""


def open_source(path: Path) -> Source:
    """Return the source that a path is.

    Raises:
        UserError: It is not there, or of no kind that is read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such folder or file; check --from")
    if path.is_dir():
        listed = (path / _LISTED).is_file()
        return FolderSource(path, path / _LISTED) if listed else PicturesSource(path)
    if path.suffix == ".jsonl":
        return FolderSource(path.parent, path)
    if path.suffix == ".parquet":
        return ParquetSource(path)
    return ZipSource(path)


class FolderSource:
    """Files beside a list of them."""

    def __init__(self, folder: Path, listed: Path) -> None:
        """Take the folder and the list."""
        self.folder = folder
        self.listed = listed

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the list."""
        try:
            text = self.listed.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.listed}: not a text file in UTF-8") from error
        yield from _listed_rows(text, self.listed.parent, self.listed.name)

    def read(self, row: Row) -> bytes:
        """Return the picture of a row."""
        return (self.folder / row["file"]).read_bytes()


class ZipSource:
    """A zip file with a list in it."""

    def __init__(self, path: Path) -> None:
        """Open the archive.

        Raises:
            UserError: It is none.
        """
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: not a whole zip file; download it again") from error

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the list."""
        try:
            text = self.archive.read(_LISTED).decode("utf-8-sig")
        except KeyError as error:
            raise UserError(f"{self.path}: no {_LISTED} in it") from error
        yield from _listed_rows(text, self.path, _LISTED)

    def read(self, row: Row) -> bytes:
        """Return the picture of a row."""
        return self.archive.read(row["file"])


class PicturesSource:
    """A folder of pictures, each with a text file."""

    def __init__(self, folder: Path) -> None:
        """Take the folder.

        Raises:
            UserError: There is no picture with a text in it.
        """
        self.folder = folder
        endings = {f".{name}" for name in PICTURE_KEYS}
        self.files = sorted(
            path
            for path in folder.rglob("*")
            # Names that begin with a dot are what systems leave behind, such as ._1.jpg.
            if path.suffix.lower() in endings and not path.name.startswith(".")
        )
        if not any(path.with_suffix(".txt").is_file() for path in self.files):
            raise UserError(
                f"{folder}: no {_LISTED} in it, and no picture with a .txt of its name beside it"
            )

    def rows(self) -> Iterator[Row]:
        """Yield a row for each picture; one without a text has no captions."""
        for path in self.files:
            text = path.with_suffix(".txt")
            lines = text.read_bytes().decode("utf-8", "replace") if text.is_file() else ""
            captions = [line.strip() for line in lines.splitlines() if line.strip()]
            row: Row = {"file": str(path.relative_to(self.folder))}
            yield {**row, "captions": captions} if captions else row

    def read(self, row: Row) -> bytes:
        """Return the picture of a row."""
        return (self.folder / row["file"]).read_bytes()


class ParquetSource:
    """A table of pictures or of their files."""

    _BATCH = 64

    def __init__(self, path: Path) -> None:
        """Open the table.

        Raises:
            UserError: It is none, or pyarrow is not there.
        """
        self.path = path
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError(f"{path}: needs the package pyarrow: pip install pyarrow") from error
        try:
            self.table = ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a whole parquet file; download it again") from error
        self._picture = b""

    def rows(self) -> Iterator[Row]:
        """Yield the rows; a picture within a row is taken out of it."""
        number = 0
        for batch in self.table.iter_batches(batch_size=self._BATCH):
            for raw in batch.to_pylist():
                row = _renamed(raw)
                image = row.pop("image", None)
                if isinstance(image, dict):
                    row.setdefault("file", image.get("path"))
                    image = image.get("bytes")
                self._picture = image or b""
                if not row.get("file"):
                    row["file"] = f"{number:09d}"
                yield row
                number += 1

    def read(self, row: Row) -> bytes:
        """Return the picture of the row that was yielded last."""
        return self._picture or (self.path.parent / row["file"]).read_bytes()


def _renamed(row: Row) -> Row:
    for other, name in _NAMES.items():
        if other in row and name not in row:
            row[name] = row.pop(other)
    return row


def _listed_rows(text: str, where: Path, name: str) -> Iterator[Row]:
    # Not splitlines(): JSON may hold other line separators, such as U+2028, as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: {name} line {number}: {error}") from error
        if not isinstance(row, dict) or not isinstance(_renamed(row).get("file"), str):
            raise UserError(f"{where}: {name} line {number}: an object with a 'file' is needed")
        yield row
