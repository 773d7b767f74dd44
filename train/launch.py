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
from cascade.launchers import told_number
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

    @property
    def main_address(self) -> str:
        """Return the step's first machine, where its rank 0 is; Lightning's is that of the job."""
        nodes = os.environ.get("SLURM_STEP_NODELIST")
        if nodes is not None and "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = self.resolve_root_node_address(nodes)
        return str(super().main_address)

    @property
    def main_port(self) -> int:
        """Return a port of the step's own: two steps of a job may share a machine."""
        if "MASTER_PORT" not in os.environ:
            told = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
            job, step = (int(one) if one.isdecimal() else 0 for one in told)
            os.environ["MASTER_PORT"] = str(15_000 + (job + 1_009 * step) % 10_000)
        return int(super().main_port)

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
        started, here = told_number("WORLD_SIZE"), told_number("LOCAL_WORLD_SIZE", run.devices)
        if (started, here) != (asked, run.devices):
            where = "" if here == run.devices else f", {here} of them here,"
            raise UserError(
                f"{started} processes were started{where} but {counts}; set them to what torchrun "
                "has (--nproc_per_node, --nnodes)"
            )
        return
    tasks = _step_tasks()
    if tasks > 1:
        nodes = told_number("SLURM_STEP_NUM_NODES", run.num_nodes)
        told_number("SLURM_PROCID")
        if (tasks, nodes) != (asked, run.num_nodes) or told_number("SLURM_LOCALID") >= run.devices:
            raise UserError(
                f"srun has started {tasks} tasks on {nodes} machine(s) but {counts}; set them to "
                "what the step has (--ntasks-per-node, --nodes), a task a device"
            )
    if tasks == 1 and run.num_nodes > 1 and "SLURM_JOB_ID" in os.environ:
        raise UserError(
            f"{counts}, but this is the only process of its SLURM step: it would wait for the "
            "others; start with srun, a task a device (--ntasks-per-node, --nodes)"
        )


def global_rank() -> int:
    """Return the rank that a launcher has given this process; 0 where there is none.

    Of a machine where a run of several was started by hand, as Lightning takes it (``NODE_RANK``),
    it is only told that it is not the first.
    """
    if "RANK" in os.environ:
        return told_number("RANK")
    if _step_tasks() > 1:
        return told_number("SLURM_PROCID")
    # LOCAL_RANK is what Lightning gives to those that it starts.
    places = [told_number(name, 0) for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")]
    return next((place for place in places if place > 0), 0)


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
    return told_number("SLURM_STEP_NUM_TASKS", 1)
