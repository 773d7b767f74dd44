"""Which samples of a shard a run trains on, in which shape, and why the others are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cascade.errors import UserError
from train.data.buckets import Buckets
from train.data.config import DataConfig, FilterConfig
from train.data.index import ShardIndex
from train.data.members import LATENT_KEYS, PICTURE_KEYS
from train.data.sources import shard_title

_SHOWN = 3
_JUDGED_FROM = 100
"""Samples of a whole set; of fewer, one broken picture is a large share."""
LEFT_OUT = -1
LOST_KINDS = ("broken", "filtered", "dropped")
"""Ways in which a sample is not trained on: it can't be used, a filter leaves it out, or its cached
latents have none of the run's shapes."""


def lost_kind(reason: str) -> str:
    """Return which of ``LOST_KINDS`` a reason for leaving a sample out is of."""
    if reason.startswith("filter: "):
        return "filtered"
    return "dropped" if reason.startswith("latents of ") else "broken"


def lost_line(lost: Mapping[str, int]) -> str:
    """Return the counts that are not zero, as words."""
    return ", ".join(f"{lost[kind]} {kind}" for kind in LOST_KINDS if lost.get(kind))


@dataclass(frozen=True)
class Selector:
    """The rule of a run: needs, filters and shapes."""

    filters: FilterConfig
    buckets: Buckets
    parts: tuple[str, ...] = ()
    """Cached parts that every sample must hold; none: a picture is needed."""

    @classmethod
    def of(cls, config: DataConfig, parts: tuple[str, ...] = ()) -> Selector:
        """Return the rule of a streamed run."""
        assert config.size is not None, "a streamed DataConfig has a size"
        return cls(config.filters, Buckets.of(config.size, config.buckets), parts)

    @property
    def needed(self) -> list[str]:
        """Extensions of the cached parts."""
        return [LATENT_KEYS[part] for part in self.parts]

    def choose(self, index: ShardIndex) -> tuple[np.ndarray, list[str]]:
        """Return each sample's shape, or -1 and the reason.

        Returns:
            Numbers of shapes, int16 ``(N,)``, and N reasons, empty for samples that are taken.
        """
        reasons = list(index.problems)
        for mask, reason in (*self._needs(index), *self._filters(index)):
            for sample in np.flatnonzero(mask):
                reasons[sample] = reasons[sample] or reason
        if self.parts:
            numbers = self.buckets.of_shapes(index.heights, index.widths)
            for sample in np.flatnonzero(numbers < 0):
                shape = f"{index.widths[sample]}x{index.heights[sample]}"
                reasons[sample] = reasons[sample] or f"latents of {shape}, which is none of ours"
        else:
            numbers = self.buckets.of_sizes(index.heights, index.widths)
        taken = np.array([not reason for reason in reasons], bool)
        return np.where(taken, numbers, LEFT_OUT).astype(np.int16), reasons

    def captions(self, captions: tuple[str, ...]) -> list[int]:
        """Return the numbers of the wordings that the filters leave."""
        least, most = self.filters.min_caption, self.filters.max_caption
        return [
            number
            for number, caption in enumerate(captions)
            if least <= len(caption) and (most is None or len(caption) <= most)
        ]

    def _needs(self, index: ShardIndex) -> list[tuple[np.ndarray, str]]:
        if self.parts:
            return [(~_has(index, (kind,)), f"no {kind}") for kind in self.needed]
        return [(~_has(index, PICTURE_KEYS), "no picture")]

    def _filters(self, index: ShardIndex) -> list[tuple[np.ndarray, str]]:
        filters, found = self.filters, []
        shorter = np.minimum(index.heights, index.widths)
        longer = np.maximum(index.heights, index.widths)
        if filters.min_size:
            found.append((shorter < filters.min_size, f"filter: min_size {filters.min_size}"))
        if filters.max_aspect is not None:
            wide = longer > filters.max_aspect * shorter
            found.append((wide, f"filter: max_aspect {filters.max_aspect:g}"))
        owner = np.repeat(np.arange(len(index)), index.caption_counts)
        fits = index.caption_lengths >= filters.min_caption
        if filters.max_caption is not None:
            fits &= index.caption_lengths <= filters.max_caption
        allowed = np.bincount(owner[fits], minlength=len(index))
        found.append((allowed == 0, "filter: caption length"))
        for name, bound in filters.min_scores.items():
            below = ~(_score(index, name) >= bound)
            found.append((below, f"filter: {name} below {bound:g} or not there"))
        for name, bound in filters.max_scores.items():
            above = ~(_score(index, name) <= bound)
            found.append((above, f"filter: {name} above {bound:g} or not there"))
        return found


def _has(index: ShardIndex, kinds: tuple[str, ...]) -> np.ndarray:
    columns = [index.kinds.index(kind) for kind in kinds if kind in index.kinds]
    return np.asarray((index.offsets[:, columns] >= 0).any(axis=1))


def _score(index: ShardIndex, name: str) -> np.ndarray:
    if name not in index.score_names:
        return np.full(len(index), np.nan)
    return index.scores[:, index.score_names.index(name)]


def check_broken(broken: Counter[str], samples: int, max_share: float, where: str) -> None:
    """Refuse a whole set of which more than a share can't be used.

    Args:
        broken: Why -> how many.
        samples: Of the set.
        max_share: ``data.max_broken_share``.
        where: The shards.

    Raises:
        UserError: With the most frequent reason.
    """
    count = broken.total()
    if samples >= _JUDGED_FROM and count > max_share * samples:
        reason, most = broken.most_common(1)[0]
        raise UserError(
            f"{where}: {count} of {samples} samples can't be used ({most}: {reason}), more than "
            f"data.max_broken_share ({max_share:g}); look at the shards: python -m train.data check"
        )


@dataclass
class SetReport:
    """What a look through shards has found."""

    buckets: Buckets
    shards: int = 0
    samples: int = 0
    taken: int = 0
    captions: int = 0
    enlarged: int = 0
    """Pictures that are smaller than their shape."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why samples are left out -> how many."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Why samples are left out -> the first of them, ``SHARD/KEY``."""
    notes: list[str] = field(default_factory=list)
    """What is wrong with shards."""
    remarks: Counter[str] = field(default_factory=Counter)
    per_bucket: Counter[int] = field(default_factory=Counter)
    sides: list[np.ndarray] = field(default_factory=list)
    """Heights and widths of the pictures taken, (2, n) a shard."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Characters of the captions, a shard each."""
    whole: bool = True

    def add(self, address: str, index: ShardIndex, numbers: np.ndarray, reasons: list[str]) -> None:
        """Add a shard that a selector has chosen from."""
        self.shards += 1
        self.samples += len(index)
        self.whole &= index.whole
        taken = numbers >= 0
        self.taken += int(taken.sum())
        self.captions += int(index.caption_counts[taken].sum())
        self.per_bucket.update(numbers[taken].tolist())
        self.sides.append(np.stack([index.heights[taken], index.widths[taken]]))
        self.lengths.append(index.caption_lengths)
        shapes = np.array(self.buckets.shapes)[numbers[taken]].T.reshape(2, -1)
        self.enlarged += int((self.sides[-1] < shapes).any(axis=0).sum())
        self.notes += [f"{shard_title(address)}: {note}" for note in index.notes]
        self.remarks.update(index.remarks)
        for key, reason in zip(index.keys, reasons, strict=True):
            if reason:
                self.reasons[reason] += 1
                shown = self.examples.setdefault(reason, [])
                if len(shown) < _SHOWN:
                    shown.append(f"{shard_title(address)}/{key}")

    def require_any(self, where: str) -> None:
        """Refuse a set of which nothing is left.

        Raises:
            UserError: With the most frequent reasons.
        """
        if self.taken:
            return
        most = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
        notes = f"; {self.notes[0]}" if self.notes else ""
        raise UserError(
            f"{where}: nothing to train on: {self.samples} samples in {self.shards} shards, all "
            f"left out ({most or 'the shards are empty'}{notes}); change data.filters or the shards"
        )

    def require_mostly_whole(self, max_share: float, where: str) -> None:
        """Refuse a set of which too much is broken; what filters leave out is not.

        Raises:
            UserError: With the most frequent reason.
        """
        broken = Counter(
            {
                reason: count
                for reason, count in self.reasons.items()
                if lost_kind(reason) == "broken"
            }
        )
        check_broken(broken, self.samples, max_share, where)

    def lost(self) -> dict[str, int]:
        """Return how many samples are left out, by ``LOST_KINDS``."""
        found: Counter[str] = Counter()
        for reason, count in self.reasons.items():
            found[lost_kind(reason)] += count
        return dict(found)

    def summary(self) -> str:
        """Return one line."""
        parts = [f"{self.shards} shards: {self.taken} of {self.samples} samples"]
        for reason, count in self.reasons.most_common():
            more = "..." if count > _SHOWN else ""
            parts.append(f"{count} left out ({reason}: {', '.join(self.examples[reason])}{more})")
        return "; ".join([*parts, *self.notes])


def quartiles(values: list[Any]) -> str:
    """Return smallest, middle and largest of arrays."""
    joined = np.concatenate([np.ravel(v) for v in values]) if values else np.array([])
    if not len(joined):
        return "-"
    return f"{int(joined.min())} / {int(np.median(joined))} / {int(joined.max())}"
