"""How a training was started: plainly, by torchrun, or by SLURM's ``srun``."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from cascade.errors import UserError
from train.settings import RunConfig


class SlurmStep(SLURMEnvironment):
    """The place that ``srun`` gave this process.

    Lightning's own asks for ``--ntasks-per-node`` by name and sends the job to the queue again by
    itself, from checkpoints of its own kind. Here the tasks are counted by what ``srun`` tells of
    the step, and the same command goes on with the run whoever starts it.
    """

    def __init__(self) -> None:
        """Leave queues to the job's script."""
        super().__init__(auto_requeue=False)

    def world_size(self) -> int:
        """Return the tasks of the step; those of the job may be more."""
        return _step_tasks()

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Nothing is left to check: :func:`check_processes` has counted."""

    @staticmethod
    def _validate_srun_variables() -> None:
        """``SLURM_NTASKS_PER_NODE`` is not needed to know one's place."""


def check_processes(run: RunConfig) -> None:
    """Compare the processes that a launcher has started with what the run asks for.

    Raises:
        UserError: They are more or fewer than the run's devices; several machines, but the one
            process of a SLURM script that ``srun`` has not started.
    """
    asked = run.devices * run.num_nodes
    counts = f"run.devices is {run.devices} and run.num_nodes {run.num_nodes}"
    if "WORLD_SIZE" in os.environ:  # of torchrun, or of Lightning for those that it starts
        if int(os.environ["WORLD_SIZE"]) != asked:
            raise UserError(
                f"{os.environ['WORLD_SIZE']} processes were started but {counts}; set them to "
                "what torchrun has (--nproc_per_node, --nnodes)"
            )
        return
    tasks = _step_tasks()
    if tasks > 1 and tasks != asked:
        raise UserError(
            f"srun has started {tasks} tasks but {counts}; set them to what the job has "
            "(--ntasks-per-node, --nodes), a task a device"
        )
    if tasks > 1 and not os.environ.get("SLURM_PROCID", "").isdecimal():
        raise UserError(
            f"SLURM_STEP_NUM_TASKS is {tasks} but SLURM_PROCID is not set: srun sets both; start "
            "with it, or unset SLURM_STEP_NUM_TASKS"
        )
    if tasks == 1 and run.num_nodes > 1 and "SLURM_JOB_ID" in os.environ:
        raise UserError(
            f"{counts}, but this is the only process of its SLURM step: it would wait for the "
            "others; start with srun, a task a device (--ntasks-per-node, --nodes)"
        )


def global_rank() -> int:
    """Return the rank that a launcher has given this process; 0 where there is none."""
    names = ["RANK", "LOCAL_RANK"]  # the last is what Lightning gives to those that it starts
    if _step_tasks() > 1:
        names.insert(1, "SLURM_PROCID")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def cluster_environment() -> ClusterEnvironment | None:
    """Return where Lightning finds its place, or None if it sees that for itself.

    It takes every process of a SLURM job for one that ``srun`` has started, and waits for the
    others; the job's script, or a shell in it, is one process whatever the job asked for.
    """
    if TorchElasticEnvironment.detect() or "SLURM_JOB_ID" not in os.environ:
        return None
    return SlurmStep() if _step_tasks() > 1 else LightningEnvironment()


def _step_tasks() -> int:
    """Return how many tasks ``srun`` has started; 1 without it."""
    told = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    return int(told) if told.isdecimal() else 1
