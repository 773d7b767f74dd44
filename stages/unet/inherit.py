"""A student's first weights: its teacher's, tensor by tensor, with a report of each.

Reference: Kim et al., 2023, BK-SDM, arXiv:2305.15798, section 3.1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from stages.unet.compress import StudentPlan
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

_SHOWN = 5


@dataclass(frozen=True)
class InheritedTensor:
    """One of the student's tensors."""

    name: str
    """Its name in the student."""
    origin: str
    """Its name in the teacher."""
    shape: tuple[int, ...]
    """Its sides, which are the teacher's."""


@dataclass(frozen=True)
class LeftOutTensor:
    """One of the teacher's tensors that the student does without."""

    name: str
    """Its name in the teacher."""
    shape: tuple[int, ...]
    """Its sides."""


@dataclass(frozen=True)
class InheritanceReport:
    """Every tensor of a student and of its teacher, each once."""

    inherited: tuple[InheritedTensor, ...]
    """All of the student's, in its order."""
    left_out: tuple[LeftOutTensor, ...]
    """What is left of the teacher's, in its order."""

    @property
    def student_parameters(self) -> int:
        """Parameters of the student."""
        return sum(_numbers(one.shape) for one in self.inherited)

    @property
    def left_out_parameters(self) -> int:
        """Parameters of the teacher that the student does without."""
        return sum(_numbers(one.shape) for one in self.left_out)

    @property
    def teacher_parameters(self) -> int:
        """Parameters of the teacher."""
        return self.student_parameters + self.left_out_parameters

    def by_stage(self) -> dict[str, tuple[int, int]]:
        """Return the teacher's parameters and how many of them stay, by the teacher's stage.

        Stages are named as ``down_blocks.0``, ``mid_block`` and ``conv_in``, in the teacher's
        order.
        """
        before: dict[str, int] = {}
        after: dict[str, int] = {}
        for origin, shape in [(one.origin, one.shape) for one in self.inherited]:
            stage = stage_of(origin)
            before[stage] = before.get(stage, 0) + _numbers(shape)
            after[stage] = after.get(stage, 0) + _numbers(shape)
        for one in self.left_out:
            stage = stage_of(one.name)
            before[stage] = before.get(stage, 0) + _numbers(one.shape)
        return {stage: (before[stage], after.get(stage, 0)) for stage in sorted(before, key=_place)}


def inherit(
    teacher_state: Mapping[str, Tensor], plan: StudentPlan
) -> tuple[dict[str, Tensor], InheritanceReport]:
    """Give a student its teacher's weights; strict.

    Args:
        teacher_state: All of the teacher's tensors by their names in ``UNet``.
        plan: The student.

    Returns:
        All of the student's tensors, which are the teacher's own and not copies, and the report.

    Raises:
        ValueError: The tensors are not those of the plan's teacher, or the plan gives a tensor of
            the student none of the same shape, or one that another one has.
    """
    _check_teacher(teacher_state, plan.teacher)
    state: dict[str, Tensor] = {}
    inherited: list[InheritedTensor] = []
    for name, shape in _shapes(plan.student).items():
        origin = plan.teacher_name(name)
        if origin not in teacher_state:
            raise ValueError(f"{name} of the student would come from {origin}, which is not there")
        tensor = teacher_state[origin]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} of the student is {shape}, but {origin} of the teacher, which it would "
                f"come from, is {tuple(tensor.shape)}"
            )
        state[name] = tensor
        inherited.append(InheritedTensor(name, origin, shape))
    used = {one.origin for one in inherited}
    if len(used) != len(inherited):
        raise ValueError("two tensors of the student would come from one of the teacher")
    left_out = tuple(
        LeftOutTensor(name, tuple(tensor.shape))
        for name, tensor in teacher_state.items()
        if name not in used
    )
    return state, InheritanceReport(tuple(inherited), left_out)


def _check_teacher(state: Mapping[str, Tensor], config: UNetConfig) -> None:
    shapes = _shapes(config)
    for kind, names in (
        ("lacks", [name for name in shapes if name not in state]),
        ("has besides", [name for name in state if name not in shapes]),
        ("has in other shapes", [n for n in shapes if n in state and state[n].shape != shapes[n]]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ValueError(
                "these are not the weights of the plan's teacher: it "
                f"{kind} {', '.join(names[:_SHOWN])}{more}"
            )


@functools.lru_cache(maxsize=4)  # who measures many students of one teacher asks for it each time
def _shapes(config: UNetConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of a U-Net."""
    with torch.device("meta"):
        network = UNet(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    return MappingProxyType(shapes)


def stage_of(name: str) -> str:
    """Return the stage of a tensor or a module: ``down_blocks.0``, ``mid_block``, ``conv_in``."""
    first, second, *_ = (*name.split("."), "")
    return f"{first}.{second}" if first in ("down_blocks", "up_blocks") else first


def _place(stage: str) -> tuple[int, str]:
    """Return where a stage is in running order."""
    order = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks")
    kind = stage.split(".")[0]
    return (order.index(kind) if kind in order else len(order), stage)


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
