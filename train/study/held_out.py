"""The pictures and captions that a report is measured on, split by what training has seen of them.

A caption's identity is what it is about: set, name, style, and what else its picture was described
with. Wordings and photos of one thing share it, so that one cannot pose as a wrong answer for
another.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cascade.errors import UserError
from train.data.shards import Sample, ShardReader

SEEN = "train"
HELD_OUT = ("test_combo", "test_concept", "test")
SPLITS = (SEEN, *HELD_OUT)

_IDENTITY_FIELDS = ("set", "name", "style", "color", "kids")


@dataclass(frozen=True)
class Entry:
    """A captioned picture of a split."""

    key: str
    caption: str
    identity: str


@dataclass(frozen=True)
class Split:
    """The captions of a split, and the pictures of it that were kept."""

    name: str
    entries: tuple[Entry, ...]
    """All pictures of the split, by key."""
    asked: tuple[int, ...]
    """Indices of the entries whose prompts are asked, in random order."""
    pixels: dict[str, Tensor] = field(repr=False)
    """``(3, H, W)`` uint8 by key: of the asked entries, and of all entries of a held-out split."""


def read_folder(folder: Path) -> Iterator[Sample]:
    """Read all shards in a folder and below, one sample after the other.

    Raises:
        UserError: If there are none, or one cannot be read.
    """
    folders = sorted({path.parent for path in folder.rglob("*.tar")})
    if not folders:
        raise UserError(f"{folder}: no .tar shards in it or below; write them with train.data")
    for one in folders:
        yield from ShardReader(f"{glob.escape(str(one))}/*.tar")


def read_splits(samples: Iterable[Sample], num_prompts: int, seed: int) -> dict[str, Split]:
    """Read every sample once and draw the prompts that are asked of each split.

    The draw ranks keys by a hash of seed and key, so it depends neither on the order in which
    shards are read nor on what else is in them, and only the pictures that are needed stay in
    memory.

    Args:
        samples: Samples whose metadata names their split.
        num_prompts: Prompts asked of each split; all of them if there are fewer.
        seed: Chooses the prompts.

    Returns:
        Splits by name, in the order of :data:`SPLITS`; those without a sample are left out.

    Raises:
        UserError: If no sample names one of the splits, or pictures differ in size.
    """
    entries: dict[str, list[Entry]] = {name: [] for name in SPLITS}
    pixels: dict[str, dict[str, Tensor]] = {name: {} for name in SPLITS}
    for sample in samples:
        split = str(sample.metadata.get("split", ""))
        # Copies on coloured grounds are left out: only training has them.
        if split not in entries or "background" in sample.metadata:
            continue
        caption = str(sample.metadata.get("caption") or sample.captions[0])
        entries[split].append(Entry(sample.key, caption, identity_of(sample)))
        pixels[split][sample.key] = sample.pixels
        if split == SEEN and len(pixels[split]) >= 2 * num_prompts + 64:
            _keep_first(pixels[split], num_prompts, seed)
    if not any(entries.values()):
        raise UserError(f"the shards hold no picture of a split named {', '.join(SPLITS)}")
    _keep_first(pixels[SEEN], num_prompts, seed)
    return {
        name: _split(name, entries[name], pixels[name], num_prompts, seed)
        for name in SPLITS
        if entries[name]
    }


def identity_of(sample: Sample) -> str:
    """Return what a sample is about, the same for all wordings and photos of one thing."""
    if "name" not in sample.metadata:
        return str(sample.metadata.get("caption") or sample.captions[0])
    return " | ".join(str(sample.metadata.get(name, "")) for name in _IDENTITY_FIELDS)


def _split(
    name: str, entries: list[Entry], pixels: dict[str, Tensor], num_prompts: int, seed: int
) -> Split:
    entries = sorted(entries, key=lambda entry: entry.key)
    order = sorted(range(len(entries)), key=lambda i: _draw(entries[i].key, seed))
    sizes = {tuple(picture.shape) for picture in pixels.values()}
    if len(sizes) > 1:
        raise UserError(f"split {name} holds pictures of different sizes: {sorted(sizes)}")
    return Split(name, tuple(entries), tuple(order[:num_prompts]), pixels)


def _keep_first(pixels: dict[str, Tensor], count: int, seed: int) -> None:
    """Drop all pictures but the first ``count`` of the draw."""
    for key in sorted(pixels, key=lambda key: _draw(key, seed))[count:]:
        del pixels[key]


def _draw(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {key}".encode()).digest()
