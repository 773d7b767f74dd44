"""Places of samples -> one batch: read, decode, crop, draw a caption, replace what is broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cascade.errors import UserError
from train.data.activity import Activity
from train.data.buckets import Shape
from train.data.cached import CachedBatch, group_of
from train.data.config import DataConfig
from train.data.index import ShardIndex
from train.data.members import (
    CAPTION_KEY,
    METADATA_KEY,
    picture_key,
    read_array,
    read_captions,
    read_metadata,
)
from train.data.pictures import BROKEN_PICTURE, fit_picture
from train.data.select import Selector
from train.draws import derived_seed

_TRIES = 30
_READERS = 8


class Shard(Protocol):
    """A shard whose index is known and whose pieces can be read."""

    title: str
    index: ShardIndex
    far: bool
    """Whether reading waits for a network, so that pieces are better read side by side."""

    def read(self, offset: int, length: int) -> bytes:
        """Return a piece."""


@dataclass(frozen=True)
class Ref:
    """One sample of a shard."""

    shard: Shard
    sample: int

    @property
    def name(self) -> str:
        """Return ``SHARD/KEY``."""
        return f"{self.shard.title}/{self.shard.index.keys[self.sample]}"


@dataclass
class Served:
    """A batch, and what had to be replaced in it."""

    batch: CachedBatch
    broken: list[str] = field(default_factory=list)
    """``SHARD/KEY: reason`` of samples that could not be used."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Other samples that were come upon and not taken, by ``train.data.select.LOST_KINDS``."""

    def pin_memory(self) -> Served:
        """Let a CUDA device copy the batch beside its work; torch pins nothing of a dataclass."""
        self.batch = self.batch.pin_memory()
        return self


@dataclass
class _Item:
    name: str
    caption: str
    group: int
    parts: dict[str, Tensor]
    original_size: tuple[int, int]
    crop: tuple[int, int]


class BatchMaker:
    """Makes batches under a run's rule."""

    def __init__(self, config: DataConfig, selector: Selector, activity: Activity) -> None:
        """Take the run's configuration and rule, and where to say what is being read."""
        self.config = config
        self.selector = selector
        self.activity = activity

    def make(
        self, refs: Sequence[Ref], shape: Shape, spare: Callable[[int], Ref], place: int
    ) -> Served:
        """Read a batch.

        Args:
            refs: Its samples.
            shape: Height and width that pictures are cropped to.
            spare: Gives the n-th sample to take in place of one that is broken.
            place: The first sample's place in the endless series of all ranks' samples. A sample's
                place seeds its draws, so that any split into ranks draws the same.

        Raises:
            UserError: A shard can't be read, or no sample in place of a broken one.
        """
        served = Served(CachedBatch([], torch.zeros(0)))
        items: list[_Item] = []
        num_spares = 0
        for number, (ref, data) in enumerate(zip(refs, self._bytes_of(refs), strict=True), place):
            draw = derived_seed("captions", self.config.seed, number) / 2**63
            crops = None
            if self.config.crop == "random":
                seed = derived_seed("crops", self.config.seed, number)
                crops = torch.Generator().manual_seed(seed)
            item = self._tried(ref, data, shape, draw, crops, served.broken)
            while item is None:
                if num_spares >= _TRIES:
                    raise UserError(
                        f"{len(served.broken)} samples of one batch can't be read, the last is "
                        f"{served.broken[-1]}; look at the shards: python -m train.data check"
                    )
                other = spare(num_spares)
                num_spares += 1
                [data] = self._bytes_of([other])
                item = self._tried(other, data, shape, draw, crops, served.broken)
            items.append(item)
        served.batch = _collated(items)
        return served

    def _bytes_of(self, refs: Sequence[Ref]) -> Iterable[dict[str, bytes]]:
        if any(ref.shard.far for ref in refs) and len(refs) > 1:
            with ThreadPoolExecutor(_READERS) as pool:
                return list(pool.map(self._bytes, refs))
        return map(self._bytes, refs)

    def _bytes(self, ref: Ref) -> dict[str, bytes]:
        """Read the members that the run needs, in one piece: they lie beside each other."""
        index, sample = ref.shard.index, ref.sample
        there = index.kinds_of(sample)
        kinds = [kind for kind in (CAPTION_KEY, METADATA_KEY) if kind in there]
        picture = picture_key(there)
        kinds += self.selector.needed if self.selector.parts else [picture] if picture else []
        begin, end = index.extent(sample, kinds)
        self.activity.say(f"reading {ref.name}")
        piece = ref.shard.read(begin, end - begin)
        found = {}
        for kind in kinds:
            column = index.kinds.index(kind)
            at = int(index.offsets[sample, column]) - begin
            found[kind] = piece[at : at + int(index.sizes[sample, column])]
        return found

    def _tried(
        self,
        ref: Ref,
        data: dict[str, bytes],
        shape: Shape,
        draw: float,
        crops: torch.Generator | None,
        broken: list[str],
    ) -> _Item | None:
        try:
            return self._item(ref, data, shape, draw, crops)
        except BROKEN_PICTURE as error:
            broken.append(f"{ref.name}: {' '.join(str(error).split())[:120]}")
            return None

    def _item(
        self,
        ref: Ref,
        data: dict[str, bytes],
        shape: Shape,
        draw: float,
        crops: torch.Generator | None,
    ) -> _Item:
        metadata = read_metadata(data.get(METADATA_KEY))
        captions = read_captions(data.get(CAPTION_KEY), metadata)
        allowed = self.selector.captions(captions)
        if not allowed:
            raise ValueError("no caption; the shard has changed since it was indexed")
        row = allowed[int(draw * len(allowed))]
        group = group_of(captions)
        if self.selector.parts:
            parts = {part: self._part(part, data, row) for part in self.selector.parts}
            original = _pair(metadata.get("original_size"), shape)
            crop = _pair(metadata.get("crop"), (0, 0))
            return _Item(ref.name, captions[row], group, parts, original, crop)
        picture = picture_key(data)
        if picture is None:
            raise ValueError("no picture; the shard has changed since it was indexed")
        fitted = fit_picture(data[picture], shape, crops)
        parts = {"pixels": fitted.pixels}
        return _Item(ref.name, captions[row], group, parts, fitted.original_size, fitted.crop)

    def _part(self, part: str, data: dict[str, bytes], row: int) -> Tensor:
        kind = self.selector.needed[self.selector.parts.index(part)]
        array = read_array(data[kind])
        if array.dtype.kind != "f":
            raise ValueError(f"{kind} holds {array.dtype}, not floating-point numbers")
        if part.startswith("text_"):
            if row >= len(array):
                raise ValueError(f"{kind} has {len(array)} rows but there are more captions")
            array = array[row]
        tensor = torch.from_numpy(np.ascontiguousarray(array)).float()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{kind} holds values that are not finite")
        return tensor


def _pair(value: object, default: tuple[int, int]) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return default


def _collated(items: list[_Item]) -> CachedBatch:
    batch = CachedBatch(
        captions=[item.caption for item in items],
        groups=torch.tensor([item.group for item in items]),
        keys=[item.name for item in items],
        original_sizes=torch.tensor([item.original_size for item in items]),
        crops=torch.tensor([item.crop for item in items]),
    )
    for part in items[0].parts:
        tensors = [item.parts[part] for item in items]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            sizes = sorted({tuple(tensor.shape) for tensor in tensors})
            raise UserError(
                f"{items[0].name} and others of its batch: {part} of {len(sizes)} sizes "
                f"({sizes[:2]}); make the cache again in an empty folder"
            )
        stacked = torch.stack(tensors)
        setattr(batch, part, stacked.float().div_(255.0) if part == "pixels" else stacked)
    return batch
