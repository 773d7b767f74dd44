"""What a generated set is made with, and how far it is: the small files beside its shards."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_write_text
from cascade.errors import UserError

SET_FILE = "generated.json"


def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Return nested settings by dotted names, so that one that differs can be named."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def claim(out: Path, described: dict[str, Any]) -> None:
    """Make a folder a set's, or refuse one that is another's.

    Args:
        out: The folder.
        described: What is kept in ``generated.json``; its ``settings`` must agree.

    Raises:
        UserError: Naming the settings that differ.
    """
    path = out / SET_FILE
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
            names = list(earlier)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not readable; choose another --out") from error
        now = json.loads(json.dumps(described["settings"]))
        differing = [
            f"{name} is {now.get(name)!r} here and {earlier.get(name)!r} there"
            for name in dict.fromkeys([*now, *names])
            if now.get(name) != earlier.get(name)
        ]
        if differing:
            raise UserError(
                f"{out}: holds a set made with other settings: {'; '.join(differing)}; choose "
                "another --out"
            )
        return
    if any(out.glob("*.tar")):
        raise UserError(f"{out}: holds shards but no {SET_FILE}; choose another --out")
    atomic_write_text(path, json.dumps(described, indent=1, sort_keys=True) + "\n")


@dataclass(frozen=True)
class SetState:
    """How far a set is."""

    shards: int
    samples: int
    refused: Counter[str]
    duplicates: int
    """Pictures that another shard has to the pixel; those of one shard are refused."""


def state_of(out: Path, name: str) -> SetState:
    """Read what is done of a set."""
    shards = samples = 0
    refused: Counter[str] = Counter()
    digests: Counter[str] = Counter()
    for path in sorted(out.glob(f"{name}-*.tar")):
        if not is_done(path):
            continue
        done = json.loads(done_file(path).read_text(encoding="utf-8"))
        shards += 1
        samples += done["samples"]
        digests.update(done["digests"])
        refused.update({reason: len(keys) for reason, keys in done["refused"].items()})
    return SetState(shards, samples, refused, digests.total() - len(digests))


def is_done(target: Path) -> bool:
    """Return whether a shard is there and whole."""
    try:
        done = json.loads(done_file(target).read_text(encoding="utf-8"))
        return bool(done["bytes"] == target.stat().st_size)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def done_file(target: Path) -> Path:
    """Return the file that vouches for a shard."""
    return target.with_name(f"{target.stem}.done.json")
