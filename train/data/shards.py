"""Local shards to samples, one after the other: how a set that fits into memory is read."""

from __future__ import annotations

import io
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from torch import Tensor

from cascade.errors import UserError
from train.data.members import (
    CAPTION_KEY,
    METADATA_KEY,
    picture_key,
    read_captions,
    read_metadata,
)
from train.data.pictures import BROKEN_PICTURE, decode_picture
from train.data.sources import expand_shards, scheme_of
from train.data.transport import shown

_log = logging.getLogger(__name__)

_SHOWN = 3
_TAR_END = 1024  # bytes: two blocks of zeros end an archive


@dataclass(frozen=True)
class Sample:
    """A picture with its captions."""

    key: str
    pixels: Tensor  # uint8 (3, H, W)
    captions: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass
class ReadReport:
    """What a pass over shards met."""

    read: int = 0
    corrupt: list[str] = field(default_factory=list)
    """Keys of samples whose picture or metadata could not be decoded."""
    without_caption: list[str] = field(default_factory=list)
    without_picture: list[str] = field(default_factory=list)

    @property
    def broken(self) -> Counter[str]:
        """Why samples could not be used -> how many."""
        lists = {
            "corrupt": self.corrupt,
            "no caption": self.without_caption,
            "no picture": self.without_picture,
        }
        return Counter({reason: len(keys) for reason, keys in lists.items() if keys})

    def summary(self) -> str:
        """Return one line."""
        parts = [f"{self.read} pictures read"]
        for name in ("corrupt", "without_caption", "without_picture"):
            keys = getattr(self, name)
            if keys:
                more = "..." if len(keys) > _SHOWN else ""
                shown = ", ".join(keys[:_SHOWN])
                parts.append(f"{len(keys)} skipped ({name.replace('_', ' ')}: {shown}{more})")
        return "; ".join(parts)


class ShardReader:
    """Iterates over the samples of shards, in their order, once per iteration.

    A sample that can't be read is skipped, counted in ``report``, and named when the pass ends; a
    shard that can't be read stops the pass.
    """

    def __init__(self, shards: str) -> None:
        """Take a glob or brace pattern.

        Raises:
            UserError: No shard matches, or one is not a file.
        """
        self.files = expand_shards(shards)
        for file in self.files:
            if scheme_of(file) is not None:
                raise UserError(
                    f"{shown(file)}: a set in memory is read from files; use data.mode exact or "
                    "resampled, or copy the shards here"
                )
        self.report = ReadReport()

    def __iter__(self) -> Iterator[Sample]:
        """Yield samples.

        Raises:
            UserError: A shard is no whole tar file.
        """
        self.report = ReadReport()
        for file in self.files:
            yield from self._shard(file)
        level = logging.INFO if self.report.read and not self.report.corrupt else logging.WARNING
        _log.log(level, "%d shards: %s", len(self.files), self.report.summary())

    def _shard(self, file: str) -> Iterator[Sample]:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList([file]), wds.tarfile_to_samples(handler=wds.reraise_exception)
        )
        _require_end(file)
        try:
            for members in pipeline:
                sample = self._decode(members)
                if sample is not None:
                    self.report.read += 1
                    yield sample
        except (tarfile.TarError, EOFError) as error:
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise UserError(
                f"{file}: not a whole tar file ({reason}); write or download it again"
            ) from error
        except ValueError as error:  # webdataset: one key has two members of one kind
            reason = str(error.args[0]) if error.args else type(error).__name__
            raise UserError(f"{file}: {reason}; write it again with distinct keys") from error

    def _decode(self, members: dict[str, Any]) -> Sample | None:
        key = members["__key__"]
        kind = picture_key(members)
        if kind is None:
            self.report.without_picture.append(key)
            return None
        try:
            pixels = decode_picture(members[kind])
            metadata = read_metadata(members.get(METADATA_KEY))
            captions = read_captions(members.get(CAPTION_KEY), metadata)
        except BROKEN_PICTURE:
            self.report.corrupt.append(key)
            return None
        if not captions:
            self.report.without_caption.append(key)
            return None
        return Sample(key, pixels, captions, metadata)


def _require_end(file: str) -> None:
    """Refuse a tar file that was cut: Python's reader takes some cuts for the archive's end."""
    if not file.endswith(".tar"):
        return  # a compressed one says so itself
    with open(file, "rb") as shard:
        size = shard.seek(0, io.SEEK_END)
        shard.seek(max(0, size - _TAR_END))
        if size < _TAR_END or any(shard.read()):
            raise UserError(
                f"{file}: not a whole tar file (its end is missing); write or download it again"
            )


def on_background(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Return an RGB picture; what was transparent shows ``color``."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        background = Image.new("RGBA", layered.size, (*color, 255))
        background.alpha_composite(layered)
        return background.convert("RGB")
    return image.convert("RGB")


def shard_name(folder: Path, name: str, number: int) -> Path:
    """Return the path of shard ``number`` of a set."""
    return folder / f"{name}-{number:06d}.tar"
