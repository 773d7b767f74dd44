"""What a generated set is made with, and how far it is: the small files beside its shards."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_path, atomic_write_text
from cascade.errors import UserError
from train.data.beside import write_beside
from train.data.shards import shard_name
from train.data.write import add_member

SET_FILE = "generated.json"
TWIN = "a picture that came before"
"""Why the second of two pictures that are the same to the pixel is refused."""


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
    """Pictures that another shard has to the pixel; they are refused when the set is whole."""


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


def refuse_twins(out: Path, name: str, shards: int) -> int:
    """Leave out of a set all of whose shards are done what an earlier shard has to the pixel.

    Only the whole set tells which of two pictures is the first, whoever made which shard, and when.
    Processes that come to this at once write the same files.

    Args:
        out: Folder of the set.
        name: What its shards begin with.
        shards: How many it has.

    Returns:
        The pictures that were left out now.
    """
    targets = [shard_name(out, name, number) for number in range(shards)]
    if not all(map(is_done, targets)):
        return 0
    seen: set[str] = set()
    count = 0
    for target in targets:
        done = json.loads(done_file(target).read_text(encoding="utf-8"))
        # A shard that was made before keys were noted has none: its twins are counted alone.
        keys = dict(zip(done["digests"], done.get("keys", ()), strict=False))
        twins = [keys[digest] for digest in done["digests"] if digest in seen and digest in keys]
        seen.update(done["digests"])
        if twins:
            _leave_out(target, done, set(twins))
            count += len(twins)
    return count


def _leave_out(target: Path, done: dict[str, Any], twins: set[str]) -> None:
    """Write a shard again without some of its samples."""
    with tarfile.open(target) as old, atomic_path(target) as temporary:
        with tarfile.open(temporary, "w") as new:
            for member in old:
                file = old.extractfile(member)
                assert file is not None, "shards hold files alone"
                if member.name.partition(".")[0] not in twins:
                    add_member(new, member.name, file.read())
    kept = {
        digest: key
        for digest, key in zip(done["digests"], done["keys"], strict=True)
        if key not in twins
    }
    refused = dict(done["refused"])
    refused[TWIN] = sorted([*refused.get(TWIN, ()), *twins])
    write_beside(target)
    write_done(target, kept, refused)


def write_done(target: Path, kept: dict[str, str], refused: dict[str, list[str]]) -> None:
    """Vouch for a shard.

    Args:
        target: The shard, as it lies there.
        kept: Digest of each picture's pixels -> its sample's key.
        refused: Reason -> keys of the pictures that were left out.
    """
    done = {
        "bytes": target.stat().st_size,
        "samples": len(kept),
        "refused": refused,
        "digests": list(kept),
        "keys": list(kept.values()),
    }
    atomic_write_text(done_file(target), json.dumps(done, sort_keys=True) + "\n")


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
