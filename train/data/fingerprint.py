"""What a cache of latents in shards was made with, kept beside the shards.

``cache.json`` and ``null_text.safetensors`` lie in the folder of the shards, wherever that is. A
folder without them holds pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cascade.checkpoints.files import atomic_write_bytes, atomic_write_text
from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from train.data.config import BucketConfig, DataConfig, FilterConfig
from train.data.sources import read_if_there, sibling
from train.data.transport import shown

CACHE_FILE = "cache.json"
NULL_FILE = "null_text.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Fingerprint:
    """All that the numbers in a cache depend on, beside the pictures."""

    weights: dict[str, str]
    """Part, as in ``train.data.cached.CACHE_FILES`` -> hash of the weights that made it."""
    size: int
    """Side in pixels of the square, or the root of the shapes' area."""
    buckets: BucketConfig | None = None
    """Shapes beside the square."""
    crop: Literal["center"] = "center"
    """Which part of a picture was kept."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format of the arrays."""
    widths: dict[str, int] = field(default_factory=dict)
    """Part of a batch -> its last dimension, for those that a network's configuration names."""


@dataclass(frozen=True)
class CacheFile:
    """What ``cache.json`` says."""

    fingerprint: Fingerprint
    shards: int
    """Shards that the whole cache has."""
    filters: FilterConfig | None = None
    """What a sample needed to be written; null: made before that was noted."""
    format: int = _FORMAT
    """Of the shards themselves."""


def differences(ours: Fingerprint, theirs: Fingerprint) -> str:
    """Return what two fingerprints do not agree on, as one line; empty if they do."""
    pairs = zip(to_dict(ours).items(), to_dict(theirs).values(), strict=True)
    return "; ".join(
        f"{name} is {here} here and {there} there" for (name, here), there in pairs if here != there
    )


def write_cache_files(
    folder: Path, described: CacheFile, null_text: tuple[Tensor, Tensor] | None
) -> None:
    """Write what a cache is made with."""
    if null_text is not None:
        tensors = {"text_hidden": null_text[0], "text_pooled": null_text[1]}
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        atomic_write_bytes(folder / NULL_FILE, data)
    text = json.dumps(to_dict(described), indent=2, sort_keys=True)
    atomic_write_text(folder / CACHE_FILE, text + "\n")


def read_cache_file(address: str) -> CacheFile | None:
    """Return what a cache was made with; None if there is none.

    Args:
        address: Of its ``cache.json``.

    Raises:
        UserError: There is one that can't be read.
    """
    data = read_if_there(address)
    if data is None:
        return None
    try:
        values = json.loads(data)
    except ValueError as error:
        raise UserError(f"{shown(address)}: not readable; make the cache again") from error
    if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
        raise UserError(f"{shown(address)}: of another version of this program; make it again")
    return from_dict(CacheFile, values, shown(address))


@dataclass(frozen=True)
class CacheFound:
    """The cache that a run's shards are."""

    fingerprint: Fingerprint
    null_text: tuple[Tensor, Tensor] | None
    """Hidden (L, D) and pooled (P,) states of the empty prompt."""
    num_shards: int
    """Shards that the whole cache has."""
    filters: tuple[FilterConfig, ...] = ()
    """What samples needed to be written, of each of its folders that says so."""


def find_cache(shards: list[str]) -> CacheFound | None:
    """Return what shards were made with; None if they hold pictures.

    Raises:
        UserError: Some do and others do not, or they were made in different ways.
    """
    files = {sibling(shard, CACHE_FILE) for shard in shards}
    found = {file: read_cache_file(file) if file is not None else None for file in files}
    made = [cache for cache in found.values() if cache is not None]
    if not made:
        return None
    lacking = [shard for shard in shards if found[sibling(shard, CACHE_FILE)] is None]
    if lacking:
        raise UserError(
            f"{shown(lacking[0])}: has no {CACHE_FILE} beside it, but other shards have one; train "
            "on pictures or on a cache, not on both"
        )
    first = made[0].fingerprint
    for other in made[1:]:
        if differing := differences(first, other.fingerprint):
            raise UserError(f"data.shards: caches that do not fit each other: {differing}")
    null_text = None
    if "text" in first.weights:
        address = sibling(shards[0], NULL_FILE)
        data = read_if_there(address) if address is not None else None
        if data is None:
            raise UserError(f"{shown(str(address))}: not there; make the cache again")
        try:
            tensors = load(data)
            null_text = (tensors["text_hidden"], tensors["text_pooled"])
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{shown(str(address))}: damaged ({error}); make it again") from error
    filters = tuple(cache.filters for cache in made if cache.filters is not None)
    return CacheFound(first, null_text, sum(cache.shards for cache in made), filters)


def check_fits(found: Fingerprint, config: DataConfig, hashes: Mapping[str, str]) -> None:
    """Refuse a cache that was not made as a run needs it.

    Args:
        found: Of the cache.
        config: The run's data.
        hashes: Part -> hash of the weights that the run names.

    Raises:
        UserError: Naming what differs.
    """
    where, again = "data.shards", "precompute it again, or change the run"
    for part, weights in hashes.items():
        if part not in found.weights:
            there = ", ".join(found.weights)
            raise UserError(f"{where}: the cache holds {there}, but this run needs {part}; {again}")
        if found.weights[part] != weights:
            raise UserError(
                f"{where}: the cache's {part} was made with weights {found.weights[part]}, but "
                f"this run has {weights}; {again}"
            )
    assert config.size is not None, "a streamed DataConfig has a size"
    wanted = dataclasses.replace(found, size=config.size, buckets=config.buckets)
    differing = differences(wanted, found)
    if config.crop != found.crop:
        differing = f"crop is {config.crop} here and {found.crop} there"
    if config.filters.min_size or config.filters.max_aspect is not None:
        raise UserError(
            f"{where}: a cache's pictures have been cropped: data.filters.min_size and max_aspect "
            "are given when it is made"
        )
    if differing:
        raise UserError(f"{where}: the cache does not fit: {differing}; {again}")


def samples_left_out(found: CacheFound, filters: FilterConfig) -> str:
    """Return the bounds by which a cache leaves out samples that a run would take, as one line.

    A cache's own filters act before a run's: what they left out was never written, however little
    the run asks. Empty if the run's are as strict.
    """
    weaker = dict.fromkeys(name for made in found.filters for name in filters.weaker_than(made))
    return ", ".join(weaker)
