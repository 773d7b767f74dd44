"""The ``data`` section of a run: which pictures it trains on, and how they are served.

Three modes. ``memory`` reads a small set whole, with or without a cache folder beside it. The
other two stream from shards of any number, and every batch of theirs is a function of the seed and
the step alone, so a run that was killed goes on with the batch that it would have seen:

- ``exact``: every sample once an epoch. The shards are indexed once (tar headers, picture headers,
  captions), samples and not shards are dealt out to ranks and workers.
- ``resampled``: endless; each worker draws shards with replacement. For sets too large to index,
  and for ``pipe:`` commands, which can only be read from their beginning.

``mix`` adds further sets, such as a teacher's pictures beside real ones.

A streamed set of pictures can have sizes of its own; shards that ``python -m train.data precompute
--shards-out`` wrote hold latents instead. Which of the two they are is read from the shards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class FilterConfig:
    """What a sample needs to be trained on; what is left out is counted by reason."""

    min_size: int = 0
    """Least shorter side of the picture file in pixels."""
    max_aspect: float | None = None
    """Largest ratio of the longer to the shorter side."""
    min_caption: int = 1
    """Least characters of a caption; shorter wordings are left out, and samples without any
    other."""
    max_caption: int | None = None
    """Most characters of a caption."""
    min_scores: dict[str, float] = field(default_factory=dict)
    """Least value of numbers in the sample's json, such as ``{aesthetic: 5.0}``."""
    max_scores: dict[str, float] = field(default_factory=dict)
    """Largest value of numbers in the sample's json, such as ``{pwatermark: 0.8}``."""

    def __post_init__(self) -> None:
        """Refuse bounds that nothing can meet."""
        if self.min_size < 0 or self.min_caption < 1:
            raise ValueError(
                f"min_size is {self.min_size} and min_caption {self.min_caption}; at least 0 and 1"
            )
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect is {self.max_aspect}; longer to shorter is at least 1")
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(
                f"max_caption is {self.max_caption} but min_caption is {self.min_caption}"
            )

    def bounds(self) -> dict[str, float]:
        """Return the bounds that can leave a sample out: name, as on the command line -> value."""
        found: dict[str, float | None] = {
            "min_size": self.min_size or None,
            "max_aspect": self.max_aspect,
            "min_caption": self.min_caption,
            "max_caption": self.max_caption,
        }
        for name in ("min_scores", "max_scores"):
            found |= {f"{name}.{score}": v for score, v in getattr(self, name).items()}
        return {name: value for name, value in found.items() if value is not None}

    def weaker_than(self, other: FilterConfig) -> list[str]:
        """Return the bounds of another filter that let through less than these, as its words."""
        ours = self.bounds()
        return [
            f"{name} {value:g}"
            for name, value in other.bounds().items()
            if name not in ours
            or (ours[name] < value if name.startswith("min_") else ours[name] > value)
        ]


def filter_differences(ours: FilterConfig, theirs: FilterConfig) -> str:
    """Return which bounds differ, as one line; empty if none does."""
    here, there = ours.bounds(), theirs.bounds()
    return "; ".join(
        f"filters.{name} is {here.get(name, 'not set')} here and {there.get(name, 'not set')} there"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    )


@dataclass(frozen=True)
class BucketConfig:
    """Shapes of about one area; a picture is cropped to the shape nearest its own ratio."""

    step: int = 64
    """Sides are multiples of this many pixels."""
    max_aspect: float = 2.0
    """Largest ratio of the longer to the shorter side of a shape."""
    shapes: tuple[tuple[int, int], ...] = ()
    """Widths and heights of the shapes beside the square, of any area; none: all of about the
    square's area that ``step`` and ``max_aspect`` allow."""

    def __post_init__(self) -> None:
        """Refuse shapes that can't be."""
        if self.step < 1 or self.max_aspect < 1:
            raise ValueError(
                f"step is {self.step} and max_aspect {self.max_aspect}; both are at least 1"
            )
        for width, height in self.shapes:
            if min(width, height) < 8:
                raise ValueError(f"shapes has {width}x{height}; sides are at least 8 pixels")


@dataclass(frozen=True)
class MixConfig:
    """A further set, such as a teacher's pictures."""

    name: str
    """What it is called in the log and the ledger."""
    shards: str
    """Its shards, as in ``data.shards``."""
    weight: float
    """How often a row is drawn from it; the weight of ``data.shards`` is 1."""
    folder: str | None = None
    """Its cache, of a set in memory."""
    filters: FilterConfig | None = None
    """What its samples need; null: as ``data.filters`` has it."""

    def __post_init__(self) -> None:
        """Refuse what is never drawn."""
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; it must be positive")


@dataclass(frozen=True)
class DataConfig:
    """Which pictures a run trains on, and how they are served."""

    shards: str
    """Shards to read: a glob or a brace pattern. A stream takes http(s), s3 and gs addresses too,
    and ``pipe:COMMAND`` where ``allow_pipe`` is set and the mode is resampled."""
    batch_size: int
    """Pictures a step and device."""
    folder: str | None = None
    """Folder of cached latents and text states of a set in memory, as ``python -m train.data
    precompute --out`` wrote it."""
    seed: int = 0
    """Seeds the order of the pictures, the choice among their captions and random crops."""
    mode: Literal["memory", "exact", "resampled"] = "memory"
    """Whole set in memory, a stream with every sample once an epoch, or an endless stream."""
    workers: int = 0
    """Processes that read and decode beside the training one. In exact mode the batches do not
    depend on it; in resampled mode another number is another series of batches."""
    size: int | None = None
    """Side in pixels of a streamed square; with ``buckets``, the root of their area."""
    buckets: BucketConfig | None = None
    """Shapes beside the square; null: the square alone."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture is kept where its shape is another."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """What a streamed sample needs."""
    shuffle_shards: int = 16
    """Exact mode: shards whose samples are shuffled together; reading stays within so many."""
    block_shards: int = 2
    """Resampled mode: shards that a worker draws and shuffles together."""
    max_broken_share: float = 0.1
    """Share of unreadable samples, among the first thousand or more, at which a run stops."""
    allow_pipe: bool = False
    """Let ``pipe:COMMAND`` in ``shards`` run its command in a shell."""
    mix: tuple[MixConfig, ...] = ()
    """Further sets, from which rows of every batch are drawn by weight, each in its own order."""
    index_folder: str | None = None
    """Where indexes of shards are kept; null: ``cascade/index`` in the user's cache folder."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; at least 1 is needed")
        for name in ("shuffle_shards", "block_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; 0 reads in the training process")
        if not 0 < self.max_broken_share <= 1:
            raise ValueError(f"max_broken_share is {self.max_broken_share}; it lies in (0, 1]")
        self._check_mode()
        self._check_mix()
        if self.size is not None and self.size < 8:
            raise ValueError(f"size is {self.size}; at least 8 pixels")
        if self.buckets is not None and self.size is not None and self.size % self.buckets.step:
            raise ValueError(
                f"size is {self.size} and buckets.step {self.buckets.step}; the square must be one "
                "of the shapes, so size must be a multiple of step"
            )

    def sets(self) -> list[DataConfig]:
        """Return the configuration of each set by itself, the run's own first."""
        alone = replace(self, mix=())
        return [alone] + [
            replace(
                alone, shards=one.shards, folder=one.folder, filters=one.filters or self.filters
            )
            for one in self.mix
        ]

    def _check_mix(self) -> None:
        """Refuse sets that can't be drawn from by weight."""
        if self.mix and self.mode == "exact" and self.buckets is not None:
            raise ValueError(
                "mix and buckets are set and mode is exact, where each step has one shape and each "
                "set its own epochs: the weights would not hold; set mode to resampled, or leave "
                "out buckets"
            )
        names = ["own", *(one.name for one in self.mix)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"mix has the name {twice[0]!r} twice ('own' is data.shards)")
        _ = self.sets() if self.mix else ()

    def _check_mode(self) -> None:
        """An option of the other modes must not look as if it did something."""
        if self.mode == "memory":
            streamed = {
                "workers": self.workers,
                "size": self.size,
                "buckets": self.buckets,
                "allow_pipe": self.allow_pipe,
                "filters": self.filters != FilterConfig(),
            }
            given = [name for name, value in streamed.items() if value]
            if given:
                raise ValueError(
                    f"{given[0]} is set but mode is memory, which takes the pictures as they are; "
                    "set mode to exact or resampled"
                )
        elif self.folder is not None:
            raise ValueError(
                f"folder is set but mode is {self.mode}: a stream reads cached latents from "
                "shards, made with: python -m train.data precompute --shards-out"
            )
        elif self.size is None:
            raise ValueError(f"size is not set; mode {self.mode} needs it")
