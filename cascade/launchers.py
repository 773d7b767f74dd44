"""What a launcher told this process: which one of how many it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from cascade.errors import UserError

T = TypeVar("T")
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Variables of accelerate's and torch's launchers, and of SLURM. ``SLURM_NTASKS`` is not among
them: sbatch sets it for its script as well, which is one process whatever the job may start."""
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_STEPID"),
)
"""All by which a launcher tells a process that it is one of several. Whoever starts one process
that is to work alone leaves them out of its environment: :func:`alone`."""


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that is one of one, whatever started this one."""
    return {key: value for key, value in environment.items() if key not in RANK_VARIABLES}


def told_number(name: str, default: int | None = None) -> int:
    """Return a launcher's variable.

    Raises:
        UserError: It is no number, or missing where the launcher has set its fellows.
    """
    told = os.environ.get(name)
    if told is None and default is not None:
        return default
    if told is None or not told.isdecimal():
        is_ = "not set" if told is None else f"{told!r}"
        raise UserError(
            f"{name} is {is_}: torchrun, accelerate and srun set it, with a number, for each "
            "process; start with one of them, or unset its variables"
        )
    return int(told)


@dataclass(frozen=True)
class Part:
    """Which share of the work is this process's."""

    number: int = 0
    count: int = 1
    local: int = 0
    """Number of the process on its machine, and of its GPU."""

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.number < self.count:
            raise UserError(f"part {self.number}/{self.count}: parts are numbered from 0")

    @classmethod
    def of_environment(cls) -> Part:
        """Return what ``accelerate launch``, ``torchrun`` or ``srun`` told this process.

        Raises:
            UserError: What they told is no share.
        """
        for number, count, local in _LAUNCHERS:
            if os.environ.get(count, "1") == "1":
                continue
            # Without a number every process would take the first share, and nobody the others.
            return cls(told_number(number), told_number(count), told_number(local, 0))
        return cls()

    def of(self, whole: Sequence[T]) -> Sequence[T]:
        """Return this process's share of a list."""
        return whole[self.number :: self.count]

    def device(self, name: str) -> str:
        """Return the name of this process's device: of several GPUs its own."""
        if self.count == 1 or name not in ("auto", "cuda") or not torch.cuda.is_available():
            return name
        return f"cuda:{self.local % torch.cuda.device_count()}"
