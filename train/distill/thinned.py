"""A student of Stage B that begins with every n-th block of a larger one's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from cascade.errors import UserError
from stages.stage_b import StageBConfig

_BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Thinned:
    """The weights that a student takes over."""

    state: dict[str, Tensor]
    """Student's key -> teacher's tensor."""
    left: tuple[str, ...]
    """The student's keys that keep their own first values."""

    @property
    def summary(self) -> str:
        """Say how much was taken."""
        taken = sum(tensor.numel() for tensor in self.state.values())
        first = f", the first of which is {self.left[0]}" if self.left else ""
        return (
            f"took {len(self.state)} tensors ({taken:,} values) from the teacher; "
            f"{len(self.left)} of the student's begin anew{first}"
        )


def spread_blocks(student: int, teacher: int) -> tuple[int, ...]:
    """Return which of a level's ``teacher`` blocks each of ``student`` blocks begins with.

    The first and the last are among them; the first of a level on the way up is the one that reads
    the skip. A student with more blocks has the further ones to itself.
    """
    if student >= teacher or student == 1:
        return tuple(range(min(student, teacher)))
    return tuple(round(index * (teacher - 1) / (student - 1)) for index in range(student))


def thinned(
    own: Mapping[str, Tensor],
    student: StageBConfig,
    weights: Mapping[str, Tensor],
    teacher: StageBConfig,
) -> Thinned:
    """Choose what a student takes over: tensors of the same shape, of the blocks that it keeps.

    Args:
        own: The student's state.
        student: Its sizes.
        weights: The teacher's state.
        teacher: Its sizes.

    Raises:
        UserError: They have other numbers of levels, or nothing fits.
    """
    levels = (len(student.hidden_channels), len(teacher.hidden_channels))
    if levels[0] != levels[1]:
        raise UserError(
            f"teacher.init: the student has {levels[0]} levels and the teacher {levels[1]}; give "
            "it as many, or set teacher.init false"
        )
    spread = {
        way: [
            spread_blocks(ours, theirs)
            for ours, theirs in zip(getattr(student, way), getattr(teacher, way), strict=True)
        ]
        for way in ("down_blocks", "up_blocks")
    }
    state: dict[str, Tensor] = {}
    left = []
    for key, value in own.items():
        source: str | None = key
        if match := _BLOCK.fullmatch(key):
            way, level, block = match[1], int(match[2]), int(match[3])
            chosen = spread[way][level]
            source = f"{way}.{level}.{chosen[block]}.{match[4]}" if block < len(chosen) else None
        if source is not None and source in weights and weights[source].shape == value.shape:
            state[key] = weights[source]
        else:
            left.append(key)
    if not state:
        raise UserError(
            "teacher.init: no tensor of the student has the shape of the teacher's; set "
            "teacher.init false"
        )
    return Thinned(state, tuple(left))
