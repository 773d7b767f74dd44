"""Prompt lists: each prompt with its key, which names its picture, and what it is about.

A list comes from the protocol itself, from a file (``.txt``, ``.jsonl``, ``.tsv`` as Parti's,
COCO's ``captions_*.json``), or from the captions of webdataset shards. Its hash is over keys and
texts.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.evaluate.picture_sets import member_key

_TEXTS = ("prompt", "Prompt", "caption")
_KEYS = ("key", "id", "file")


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    key: str
    """Names its picture: ``key.png``."""
    text: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    """What it asks for, by name of the attribute: style, color, name."""

    @property
    def identity(self) -> str:
        """What it is about, the same for all wordings of one thing."""
        names = [name for name in ("set", "name", "style", "color", "kids")]
        if "name" not in self.attributes:
            return self.text
        return " | ".join(self.attributes.get(name, "") for name in names)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a prompt list.

    Args:
        path: A file, told by its suffix, or a folder of shards.

    Raises:
        UserError: If it is missing, of no known kind, broken or empty, or a key comes twice.
    """
    if path.is_dir():
        prompts = _from_shards(path)
    elif not path.is_file():
        raise UserError(f"{path}: no such prompt list; name a file, or a folder of .tar shards")
    else:
        readers = {".txt": _from_text, ".jsonl": _from_rows, ".tsv": _from_table, ".json": _coco}
        if path.suffix not in readers:
            raise UserError(f"{path}: a prompt list is one of {', '.join(readers)}")
        try:
            prompts = readers[path.suffix](path)
        except UnicodeDecodeError:
            raise UserError(f"{path}: not a text file in UTF-8") from None
    return checked(prompts, str(path))


def inline_prompts(texts: Sequence[str]) -> list[Prompt]:
    """Give texts their place in the list as keys."""
    return [Prompt(f"{index:05d}", text) for index, text in enumerate(texts)]


def checked(prompts: list[Prompt], where: str) -> list[Prompt]:
    """Return the prompts by key.

    Raises:
        UserError: If there are none, one is empty, or a key comes twice or is no file's name.
    """
    if not prompts:
        raise UserError(f"{where}: no prompts in it")
    seen: set[str] = set()
    for prompt in prompts:
        if not prompt.text:
            raise UserError(f"{where}: the prompt of {prompt.key!r} is empty")
        if prompt.key in seen:
            raise UserError(f"{where}: two prompts have the key {prompt.key!r}")
        if not prompt.key or prompt.key.startswith("/") or ".." in Path(prompt.key).parts:
            raise UserError(f"{where}: key {prompt.key!r} cannot name a picture's file")
        seen.add(prompt.key)
    return sorted(prompts, key=lambda prompt: prompt.key)


def draw(prompts: list[Prompt], count: int | None, seed: int, where: str) -> list[Prompt]:
    """Draw prompts by the rank of a hash of seed and key.

    The draw depends on neither the order nor what else is in the list.

    Raises:
        UserError: If there are fewer than ``count``.
    """
    if count is None:
        return prompts
    if len(prompts) < count:
        raise UserError(f"{where}: {len(prompts)} prompts, but the protocol asks {count}")
    ranked = sorted(prompts, key=lambda prompt: hash_of(f"{seed} {prompt.key}"))
    return sorted(ranked[:count], key=lambda prompt: prompt.key)


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 over keys and texts, in hex."""
    return hash_of("\n".join(json.dumps([p.key, p.text]) for p in prompts))


def attributes_hash(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 over keys and what the prompts ask for, in hex."""
    return hash_of(
        "\n".join(json.dumps([p.key, p.identity, sorted(p.attributes.items())]) for p in prompts)
    )


def hash_of(text: str) -> str:
    """Return the SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def seed_of(key: str, seed: int) -> int:
    """Return the seed of a prompt's picture: of its key, not of its place, batch or device."""
    return int(hash_of(f"{seed} {key}")[:8], 16) >> 1


def _from_text(path: Path) -> list[Prompt]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n"))
    return inline_prompts([line for line in lines if line and not line.startswith("#")])


def _from_rows(path: Path) -> list[Prompt]:
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON") from error
        prompts.append(_from_row(row, len(prompts), f"{path}: line {number}"))
    return prompts


def _from_table(path: Path) -> list[Prompt]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [_from_row(row, n, f"{path}: row {n + 1}") for n, row in enumerate(rows)]


def _from_row(row: Any, number: int, where: str) -> Prompt:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON object is needed")
    text = next((row[name] for name in _TEXTS if row.get(name)), None)
    if not isinstance(text, str):
        raise UserError(f"{where}: no prompt under {', '.join(_TEXTS)}")
    # An id of 0 is one: the others of its list would not be numbered by place either.
    keys = (str(row[name]) for name in _KEYS if row.get(name) not in (None, ""))
    key = next(keys, f"{number:05d}")
    if re.search(r"\.(png|jpe?g|webp)$", key, flags=re.I):
        key = key.rsplit(".", 1)[0]
    return Prompt(key, text.strip(), _attributes(row))


def _attributes(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row's plain values: what a prompt asks for is among them."""
    return {
        name: str(value)
        for name, value in row.items()
        if isinstance(value, (str, bool)) and name not in (*_TEXTS, *_KEYS)
    }


def _coco(path: Path) -> list[Prompt]:
    """Read COCO's captions: of each picture the one with the least id, under the picture's name."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {row["id"]: row["file_name"].rsplit(".", 1)[0] for row in content["images"]}
        rows = sorted(content["annotations"], key=lambda row: row["id"])
        first = {row["image_id"]: row["caption"].strip() for row in reversed(rows)}
        return [Prompt(names[image], caption) for image, caption in first.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not COCO's captions: 'images' with id and file_name and 'annotations' with "
            "id, image_id and caption are needed"
        ) from error


def _from_shards(folder: Path) -> list[Prompt]:
    paths = sorted(folder.rglob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no .tar shards in it or below")
    return [prompt for path in paths for prompt in _from_shard(path)]


def _from_shard(path: Path) -> list[Prompt]:
    texts: dict[str, str] = {}
    metadata: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                suffix = member.name.rsplit(".", 1)[-1]
                if suffix not in ("txt", "json") or not member.isfile():
                    continue
                file = archive.extractfile(member)
                content = b"" if file is None else file.read()
                key = member_key(member.name)
                if suffix == "json":
                    row = json.loads(content)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}: {member.name}: not a JSON object")
                    metadata[key] = row
                else:
                    texts[key] = content.decode().split("\n", 1)[0].strip()
    except (tarfile.TarError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable shard ({error})") from error
    prompts = []
    for key in sorted(texts | metadata):
        row = metadata.get(key, {})
        # Metadata names the caption that stands for the picture; a .txt may hold one wording.
        text = str(row.get("caption") or texts.get(key, ""))
        prompts.append(Prompt(key, text, _attributes(row)))
    return prompts
