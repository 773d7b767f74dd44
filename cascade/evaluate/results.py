"""Figures with what they need to be believed: uncertainty, protocol, commit, machine, yardstick.

One line of ``results.jsonl`` is one figure and stands alone. Figures of unlike protocols are
refused in one table.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.evaluate.protocol import content_hash, differences, flat


@dataclass(frozen=True)
class Figure:
    """One number."""

    metric: str
    """Name that programs use: "frechet", "attribute_style"."""
    label: str
    """What people call it; names the network wherever it is not the published one."""
    value: float
    num_pictures: int
    """Pictures, or prompts asked, that it is made of."""
    num_reference: int = 0
    spread: float | None = None
    """A standard deviation; ``uncertainty`` says of what."""
    low: float | None = None
    high: float | None = None
    """Ends of a 95 % interval."""
    uncertainty: str = "none"
    """What spread or interval are."""
    real: float | None = None
    """The same figure of the reference pictures of the same keys. A model that has learned what the
    network that measures looks for may well get more."""
    yardstick: str | None = None
    """The network that measured."""
    yardstick_weights: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """The figures of one set of pictures."""

    model: str
    """What made the pictures."""
    figures: tuple[Figure, ...]
    protocol: Mapping[str, object]
    """Content of the protocol's hash."""
    protocol_name: str
    sampling: Mapping[str, Mapping[str, object]] | None
    """By the model's kind, "cascade" or "unet", how it made the pictures, what the protocol left to
    it among it; None: the pictures were given."""
    pictures: str
    """Fingerprint of the pictures."""
    commit: str
    machine: str
    at: str
    """When, in UTC."""

    @property
    def protocol_hash(self) -> str:
        """The protocol's hash."""
        return content_hash(self.protocol)

    def figure(self, metric: str) -> Figure:
        """Return a figure by its metric's name.

        Raises:
            KeyError: If there is none.
        """
        for figure in self.figures:
            if figure.metric == metric:
                return figure
        raise KeyError(metric)

    def rows(self) -> list[dict[str, Any]]:
        """Return a plain mapping for each figure, whole in itself."""
        common = {
            "model": self.model,
            "protocol_hash": self.protocol_hash,
            "protocol_name": self.protocol_name,
            "sampling": self.sampling,
            "pictures": self.pictures,
            "commit": self.commit,
            "machine": self.machine,
            "at": self.at,
        }
        return [
            {**dataclasses.asdict(figure), **common, "protocol": dict(self.protocol)}
            for figure in self.figures
        ]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to a file of results: all of them or none.

    One write, which other processes' lines do not get into; what a full disk cut short is taken
    back.

    Raises:
        ValueError: If a number is not finite, which JSON does not have.
    """
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    number = os.open(path, flags, 0o644)
    try:
        before = os.fstat(number).st_size
        # After a line that was cut off: what is whole must not be glued to it.
        data = (text if _ends_a_line(path) else f"\n{text}").encode()
        try:
            written = os.write(number, data)
            if written < len(data):
                raise OSError(28, "the disk is full", str(path))
            os.fsync(number)
        except OSError:
            os.ftruncate(number, before)
            raise
    finally:
        os.close(number)


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of results.

    Raises:
        UserError: If it is missing, empty, a line is broken, or one does not fit its own hash.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of results; check the path")
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no text; a file of results is named results.jsonl") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON; was the file cut off?") from error
        needed = ("metric", "label", "value", "model", "protocol", "protocol_hash")
        if not isinstance(row, dict) or any(name not in row for name in needed):
            raise UserError(f"{where}: not a result: {', '.join(needed)} are needed")
        value = row["value"]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: value is {value!r}; a figure is a finite number")
        if content_hash(row["protocol"]) != row["protocol_hash"]:
            raise UserError(f"{where}: its protocol was changed: the hash does not fit it")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no results in it")
    return rows


def check_alike(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Refuse rows of unlike protocols, and models that filled what theirs leaves open unlike.

    Args:
        rows: The results.
        names: Where each is from, for the message.

    Raises:
        UserError: Naming the first key that differs, both values, and how many more there are.
    """
    if not rows:
        return
    first: dict[str, tuple[object, str]] = {}
    same = rows[0]["protocol"].get("sampling") == "same"
    for row, name in zip(rows, names, strict=True) if same else ():
        for key, value in flat(row.get("sampling") or {}).items():
            value_before, name_before = first.setdefault(key, (value, name))
            if value != value_before:
                raise UserError(
                    f"{name_before} and {name}: {key} is {value_before} and {value}, which the "
                    "protocol leaves to the models; name it there, or say sampling: own"
                )
    for row, name in zip(rows[1:], names[1:], strict=True):
        if row["protocol_hash"] == rows[0]["protocol_hash"]:
            continue
        found = differences(rows[0]["protocol"], row["protocol"])
        more = [one.key for one in found[1:]]
        rest = f"; {len(more)} more: {', '.join(more[:5])}" if more else ""
        raise UserError(
            f"{names[0]} and {name}: results of unlike protocols ({rows[0]['protocol_hash']} and "
            f"{row['protocol_hash']}) do not share a table: {found[0]}{rest}"
        )


def comparison(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Return results of one protocol side by side: a row a figure, a column a model.

    Of a figure that was measured more than once for a model the last one counts.

    Args:
        rows: The results.
        names: Where each is from: two files' results of one model are two columns.

    Raises:
        UserError: If their protocols are not alike.
    """
    check_alike(rows, names)
    pairs = zip(rows, names, strict=True)
    models = list(dict.fromkeys((row["model"], name) for row, name in pairs))
    titles = [
        model if [one for one, _ in models].count(model) == 1 else f"{model} ({name})"
        for model, name in models
    ]
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row, name in zip(rows, names, strict=True):
        cells.setdefault(row["label"], {})[(row["model"], name)] = value_text(row)
    lines = [
        [label, *(found.get(model, "-") for model in models)] for label, found in cells.items()
    ]
    head = f"protocol {rows[0].get('protocol_name', '')} {rows[0]['protocol_hash']}"
    return f"{head}\n\n{markdown_table(['', *titles], lines)}"


def table(results: Results) -> str:
    """Return the figures of one set of pictures as a table."""
    lines = [
        [
            row["label"],
            value_text(row),
            "-" if row["real"] is None else number_text(row["real"]),
            f"{row['num_pictures']:,}",
            row["uncertainty"],
        ]
        for row in results.rows()
    ]
    notes = dict.fromkeys(note for figure in results.figures for note in figure.notes)
    head = f"protocol {results.protocol_name} {results.protocol_hash}; model {results.model}"
    columns = ["", "value", "of real pictures", "n", "uncertainty"]
    return "\n".join([head, "", markdown_table(columns, lines), *(f"note: {n}" for n in notes)])


def value_text(row: Mapping[str, Any]) -> str:
    """Return a figure's value with its spread or interval."""
    value, spread = row["value"], row.get("spread")
    low, high = row.get("low"), row.get("high")
    if low is not None and high is not None:
        return f"{number_text(value)} [{number_text(low)}, {number_text(high)}]"
    if spread is not None:
        return f"{number_text(value)} +- {number_text(spread)}"
    return number_text(value)


def number_text(value: float) -> str:
    """Return a number with four digits that count."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 8)}f}"


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table that reads well as text and as Markdown."""
    rows = [list(columns), *(list(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    drawn.insert(1, "| " + " | ".join("-" * max(3, width) for width in widths) + " |")
    return "\n".join(drawn)
