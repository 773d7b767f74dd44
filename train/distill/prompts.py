"""Where the prompts of a generated set come from: a text file, a table, or the captions of shards.

- ``.txt``: a prompt a line; empty lines and lines with a leading ``#`` are skipped.
- ``.jsonl``, ``.csv``, ``.parquet``: a row a prompt, in the column ``prompt``, ``caption`` or
  ``text``, or the one that is named. Parquet needs the package pyarrow.
- Shards (``.tar``, with a glob, a brace pattern or an address): every wording of every sample.

A prompt that comes again is taken once. A limited number are the first ones or, shuffled, some of
all: shards are often sorted by what they hold, and their first captions are then of one kind.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cascade.config import not_among
from cascade.errors import UserError
from train.data.archive import DamagedTarError, entries_of
from train.data.members import CAPTION_KEY, METADATA_KEY, read_captions, read_metadata
from train.data.sources import expand_shards, open_stream
from train.data.transport import shown

COLUMNS = ("prompt", "caption", "text")
"""Names of the column with the prompts; the first that is there."""


def of_shards(name: str) -> bool:
    """Return whether a name of prompts is a pattern of shards."""
    return name.endswith((".tar", ".tar.gz", ".tgz"))


def read_prompts(
    name: str, column: str | None = None, limit: int | None = None, shuffle: int | None = None
) -> list[str]:
    """Return distinct prompts.

    Args:
        name: A file, or a pattern of shards.
        column: Of a table; None: the first of ``COLUMNS`` that it has.
        limit: Most prompts; None: all.
        shuffle: Seed of their order, which is the same on every machine, and that of the others
            when prompts are added; None: as they stand, and what is beyond ``limit`` is not read.

    Raises:
        UserError: Nothing is there, nothing is in it, or it can't be read.
    """
    kind = Path(name).suffix.lower()
    readers: dict[str, Callable[[Path, str | None], Iterable[str]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    found: Iterable[str]
    if of_shards(name):
        found = _captions(name)
    else:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such file of prompts; check --prompts")
        found = readers.get(kind, _lines)(path, column)
    if column is not None and kind not in readers:
        raise UserError(f"--column {column}: {name} has none; .jsonl, .csv and .parquet have")
    prompts: dict[str, None] = {}
    for prompt in found:
        if shuffle is None and limit is not None and len(prompts) >= limit:
            break
        if prompt.strip():
            prompts[prompt.strip()] = None
    if not prompts:
        raise UserError(f"{name}: no prompt in it; check --prompts")
    if shuffle is None:
        return list(prompts)

    def place(prompt: str) -> bytes:
        return hashlib.sha256(f"{shuffle}\0{prompt}".encode()).digest()

    return sorted(prompts, key=place)[:limit]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error


def _lines(path: Path, column: str | None) -> Iterator[str]:
    # Only a line break ends a prompt, whatever Unicode calls a line, as in str.splitlines.
    for line in _text(path).split("\n"):
        if not line.strip().startswith("#"):
            yield line


def _jsonl(path: Path, column: str | None) -> Iterator[str]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: an object is needed, a row of the table")
        yield _cell(row, column, f"{path} line {number}")


def _csv(path: Path, column: str | None) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                yield _cell(row, column, f"{path} row {number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: not a table of comma-separated values: {error}") from error


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(f"{path}: needs the package pyarrow: pip install pyarrow") from error
    try:
        table = ParquetFile(path)
        names = table.schema_arrow.names
        chosen = _column(names, column, str(path))
        for batch in table.iter_batches(batch_size=1024, columns=[chosen]):
            for value in batch.column(0).to_pylist():
                yield _checked(value, f"{path}: column {chosen}")
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole parquet file; download it again") from error


def _cell(row: dict[str, Any], column: str | None, where: str) -> str:
    return _checked(row[_column([str(name) for name in row], column, where)], where)


def _checked(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: the prompt is {value!r}; text is needed")
    return value


def _column(names: list[str], column: str | None, where: str) -> str:
    if column is not None:
        if column in names:
            return column
        raise not_among(f"{where}: no column", column, names)
    for wanted in COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    there = ", ".join(names)
    raise UserError(f"{where}: none of the columns {', '.join(COLUMNS)}, but {there}; see --column")


def _captions(pattern: str) -> Iterator[str]:
    """Yield the wordings of shards; pictures are skipped over."""
    texts = (CAPTION_KEY, METADATA_KEY)
    for address in expand_shards(pattern):
        try:
            with open_stream(address) as stream:
                for entry in entries_of(stream, lambda kind: kind in texts):
                    text, row = (
                        entry.members[kind].read() if kind in entry.members else None
                        for kind in texts
                    )
                    try:
                        yield from read_captions(text, read_metadata(row))
                    except ValueError as error:
                        raise UserError(f"{shown(address)}/{entry.key}: {error}") from error
        except DamagedTarError as error:
            raise UserError(f"{shown(address)}: not a whole tar file: {error}") from error
