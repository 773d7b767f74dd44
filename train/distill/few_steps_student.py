"""A student of step distillation made of its teacher: told the guidance scale, smooth in time.

The published time embedding has waves of up to 10000 radians. What a network makes of them is noise
of little size, but its slope in time is then that noise and not what the network knows. Of a
student the slope is what counts, so its time is embedded by slow waves alone, and the maps that
read the embedding are fitted to what the teacher's said, as closely as slow waves can.

Reference: Chen et al., 2025, arXiv:2503.09641, section 3.2, which trains such an embedding instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from stages.embeddings import time_embedding
from stages.layers import TimestepBlock
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC, StageCConfig

Sizes = StageBConfig | StageCConfig

_GRID = 2001
_RIDGE = 1e-4


def student_config(teacher: Sizes, *, told_guidance: bool, time_unit: float) -> Sizes:
    """Return the sizes of a teacher's student.

    Args:
        teacher: The teacher's.
        told_guidance: Whether the student is told a guidance scale.
        time_unit: Unit of its time; 1 is the teacher's embedding as published.
    """
    others = tuple(name for name in teacher.time_conds if name != "cfg")
    time_conds = (*others, "cfg") if told_guidance else others
    if isinstance(teacher, StageCConfig):
        return replace(teacher, time_conds=time_conds, time_unit=time_unit, dropout=0.0)
    none = (0.0,) * len(teacher.dropout)
    return replace(teacher, time_conds=time_conds, time_unit=time_unit, dropout=none)


def copy_teacher(teacher: StageB | StageC, student: StageB | StageC) -> float:
    """Give a student its teacher's weights; a scale that the teacher is not told changes nothing.

    Args:
        teacher: On the CPU.
        student: Of ``student_config``; its weights are written over.

    Returns:
        How far the fitted time modulations are off: root mean square over that of the teacher's
        own, 0 where both embed the time alike.
    """
    state = {name: value.float() for name, value in teacher.state_dict().items()}
    own = student.state_dict()
    added = {name: torch.zeros_like(own[name]) for name in own if name not in state}
    student.load_state_dict({name: value for name, value in state.items() if name in own} | added)
    old, new = teacher.config, student.config
    if old.time_unit == new.time_unit:
        return 0.0
    missed = total = 0.0
    for name, block in teacher.named_modules():
        if isinstance(block, TimestepBlock):
            fitted = cast(TimestepBlock, student.get_submodule(name))
            error, size = _fit(block.mapper, fitted.mapper, old.time_unit, new.time_unit)
            missed, total = missed + error, total + size
    return (missed / total) ** 0.5 if total else 0.0


def _fit(old: nn.Linear, new: nn.Linear, old_unit: float, new_unit: float) -> tuple[float, float]:
    """Fit a map of the new embedding to that of the old one over all times; return squared sums."""
    times = torch.linspace(0.0, 1.0, _GRID, dtype=torch.float64)

    def waves(unit: float) -> Tensor:
        embedded = time_embedding(times * unit, old.in_features)
        return torch.cat([embedded, torch.ones(_GRID, 1, dtype=torch.float64)], dim=1)

    weights = torch.cat([old.weight, old.bias[:, None]], dim=1).double().detach()
    wanted = waves(old_unit) @ weights.T  # (grid, 2 C)
    basis = waves(new_unit)
    gram = basis.T @ basis / _GRID + _RIDGE * torch.eye(basis.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(gram, basis.T @ wanted / _GRID)  # (waves + 1, 2 C)
    with torch.no_grad():
        new.weight.copy_(solved[:-1].T)
        new.bias.copy_(solved[-1])
    missed = (basis @ solved - wanted).square().sum()
    return float(missed), float(wanted.square().sum())
