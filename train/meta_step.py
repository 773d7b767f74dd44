"""A training step on tensors without content: how many operations it takes, and nothing else.

It is the system's own ``training_step`` and its backward pass. So a step can be counted before
anything is trained, and one whose networks are compiled, whose operations torch does not see.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cascade.evaluate.flops import FlopCounter
from train.data.cached import CachedBatch

_NEVER = 10**12
_COPIED = ("_modules", "_parameters", "_buffers")


class _Trainer:
    """As much of a trainer as a step asks for."""

    accumulate_grad_batches = 1
    global_rank = 0
    world_size = 1
    strategy = None

    def __init__(self, step: int) -> None:
        self.global_step = step


class _NoOptimizer:
    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def step_on_meta(system: Any, batch: Any, step: int) -> float:
    """Return the operations of a step's forward and backward pass; the optimizer's are not in it.

    Args:
        system: On the meta device, of nobody else's: it learns nothing and logs nothing any more.
        batch: On the meta device.
        step: Which step it is, for terms of a loss that come in later.
    """
    object.__setattr__(system, "_trainer", _Trainer(step))
    # What is logged of a step now and then are values, which it has none of.
    run = dataclasses.replace(system.config.run, log_every_steps=_NEVER)
    system.config = dataclasses.replace(system.config, run=run)
    for name in ("log", "log_dict"):
        object.__setattr__(system, name, lambda *_, **__: None)
    if getattr(system, "adaptive", None) is not None:
        system.adaptive = None  # looks values up by their noise, and multiplies nothing
    with FlopCounter() as counter:
        if system.automatic_optimization:
            system.training_step(batch, 0).backward()
        else:
            object.__setattr__(system, "optimizers", lambda: [_NoOptimizer(), _NoOptimizer()])
            object.__setattr__(system, "lr_schedulers", lambda: [])
            object.__setattr__(system, "manual_backward", lambda loss: loss.backward())
            object.__setattr__(system, "clip", lambda optimizer: None)
            system.training_step(batch, 0)
    return counter.total


def count_beside(system: LightningModule, batch: CachedBatch, step: int) -> float | None:
    """Return the operations of a step of a system at work, which notices nothing of it.

    Args:
        system: It stays as it is; its networks may be compiled.
        batch: What the step is given.
        step: Which step it is.

    Returns:
        None where that can't be told: of weights that are cut over devices, and of a system that
        asks a teacher, which is no part of it.

    Raises:
        RuntimeError: The step depends on values.
    """
    if getattr(system, "teacher", None) is not None:
        return None
    tensors = [*system.parameters(), *system.buffers()]
    if any(isinstance(one, DTensor) for one in tensors):
        return None
    # A copy in which every tensor is an empty one; compiled code is no part of a copy.
    memo: dict[int, Any] = {id(one): _empty(one) for one in tensors}
    # What else the system holds, such as the trainer, is no part of one either.
    memo |= {id(value): value for name, value in vars(system).items() if name not in _COPIED}
    on_meta = copy.deepcopy(system, memo)
    empty = copy.copy(batch)
    for field in dataclasses.fields(batch):
        if isinstance(value := getattr(batch, field.name), Tensor):
            setattr(empty, field.name, _empty(value))
    return step_on_meta(on_meta, empty, step)


def _empty(one: Tensor) -> Tensor:
    empty = torch.empty_like(one, device="meta")
    if isinstance(one, nn.Parameter):
        return nn.Parameter(empty, requires_grad=one.requires_grad)
    return empty
