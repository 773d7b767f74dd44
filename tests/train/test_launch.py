"""Under SLURM: tasks of ``srun``, the script of a job, and what does not fit together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from cascade.errors import UserError
from cascade.launchers import RANK_VARIABLES
from train.launch import SlurmStep, check_processes, cluster_environment, global_rank
from train.settings import RunConfig

ROOT = Path(__file__).parents[2]
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "cascade",
    "SLURM_NTASKS": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "localhost",
}
"""What sbatch --ntasks=2 sets for its script."""


def task(number: int, of: int = 2) -> dict[str, str]:
    """What srun adds for one of its tasks."""
    return {
        "SLURM_STEP_NUM_TASKS": str(of),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_NODEID": "0",
    }


@pytest.fixture(autouse=True)
def outside_of_any_job(monkeypatch) -> None:
    for name in {*RANK_VARIABLES, *JOB}:
        # Set first, so that what code under test writes into the environment is taken back too.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def put(monkeypatch, *environments: dict[str, str]) -> None:
    for environment in environments:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)


def start(run, environment: dict[str, str], *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "train", run.kind, "--config", str(run.config)]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.mark.slow
def test_two_tasks_of_srun_train_as_one_run(make_run) -> None:
    run = make_run("stage_c", data={"batch_size": 2})
    port = {"MASTER_PORT": free_port()}
    both = [
        start(run, {**JOB, **task(number), **port}, "--run.devices", 2, "--run.max_steps", 3)
        for number in range(2)
    ]
    said = [one.communicate(timeout=300)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    rows = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == 3 * 2 * 2
    assert rows[-1]["device_seconds"] == pytest.approx(2 * sum(rows[-1]["seconds"].values()))


@pytest.mark.slow
def test_a_jobs_script_starts_its_processes_itself(make_run) -> None:
    """sbatch tells its script of all tasks: nobody may wait for those that srun never started."""
    run = make_run("stage_c", data={"batch_size": 2})
    environment = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    done = start(run, environment, "--run.devices", 2, "--run.max_steps", 3)
    said = done.communicate(timeout=300)[1]
    assert done.returncode == 0, said
    rows = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == 3 * 2 * 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no SIGUSR1")
def test_the_announced_end_of_a_job_saves_all(make_run) -> None:
    run = make_run("stage_c")
    one = start(run, {**JOB, "SLURM_NTASKS": "1"}, "--run.max_steps", 100_000)
    try:
        begun_s = time.monotonic()
        while not list((run.out / "logs").glob("**/metrics.csv")):
            assert one.poll() is None and time.monotonic() - begun_s < 120
            time.sleep(0.2)
        one.send_signal(signal.SIGUSR1)
        said = one.communicate(timeout=120)[1]
    finally:
        one.kill()
    assert one.returncode == 0, said
    assert "stopped by SIGUSR1: all is saved, the same command with --resume goes on" in said
    assert list((run.out / "checkpoints").iterdir())
    assert not (run.out / "done").exists()


def test_places(monkeypatch) -> None:
    assert cluster_environment() is None and global_rank() == 0
    put(monkeypatch, JOB, {"SLURM_PROCID": "0"})
    assert isinstance(cluster_environment(), LightningEnvironment), "srun has started nothing"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert global_rank() == 1, "of a script's own processes, all of which see its number"
    monkeypatch.delenv("LOCAL_RANK")
    put(monkeypatch, task(5, of=8))
    place = cluster_environment()
    assert isinstance(place, SlurmStep) and global_rank() == 5
    assert (place.world_size(), place.global_rank(), place.local_rank()) == (8, 5, 5)
    assert not place.auto_requeue
    put(monkeypatch, {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    put(monkeypatch, {"TORCHELASTIC_RUN_ID": "one"})
    assert cluster_environment() is None and global_rank() == 1, "torchrun inside of a job"


def test_a_second_machine_that_was_started_by_hand_is_not_the_first(monkeypatch) -> None:
    put(monkeypatch, {"NODE_RANK": "1", "MASTER_ADDR": "first"})
    assert global_rank() > 0
    put(monkeypatch, {"NODE_RANK": "0"})
    assert global_rank() == 0
    put(monkeypatch, {"LOCAL_RANK": "1"})
    assert global_rank() == 1


def test_a_step_meets_on_its_own_machine_and_port(monkeypatch) -> None:
    put(monkeypatch, JOB, task(0), {"SLURM_NODELIST": "node[1-2]", "SLURM_STEP_NODELIST": "node2"})
    ports = set()
    for step in ("0", "1"):
        put(monkeypatch, {"SLURM_STEP_ID": step})
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        place = SlurmStep()
        assert place.main_address == "node2"
        assert 15_000 <= place.main_port < 25_000
        ports.add(place.main_port)
    assert len(ports) == 2
    put(monkeypatch, {"MASTER_ADDR": "chosen", "MASTER_PORT": "12345"})
    assert (SlurmStep().main_address, SlurmStep().main_port) == ("chosen", 12345)


@pytest.mark.parametrize(
    ("environment", "run", "message"),
    [
        (task(0, of=4), {"devices": 2}, "srun has started 4 tasks on 1 machine.* run.devi"),
        ({"SLURM_PROCID": "0"}, {"num_nodes": 2}, "the only process of its SLURM step: .* start w"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, {"devices": 2}, "SLURM_PROCID is not set: torchrun, acc"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, {}, "SLURM_STEP_NUM_TASKS is 'two': torchrun, acc"),
        (
            {**task(0), "SLURM_STEP_NUM_NODES": "1"},
            {"num_nodes": 2},
            r"srun has started 2 tasks on 1 machine\(s\) but run.devices is 1 and run.num_nodes 2",
        ),
        (task(1), {"num_nodes": 2}, "srun has started 2 tasks on 2 machine"),
        ({"WORLD_SIZE": "3"}, {"devices": 2}, "3 processes were started but run.devices is 2 and"),
        (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            {"num_nodes": 2},
            "2 processes were started, 2 of them here, but run.devices is 1 and run.num_nodes 2",
        ),
        ({"WORLD_SIZE": "two"}, {}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, {}, "WORLD_SIZE is ''"),
    ],
)
def test_processes_that_do_not_fit_are_refused(environment, run, message, monkeypatch) -> None:
    put(monkeypatch, JOB, environment)
    with pytest.raises(UserError, match=message):
        check_processes(RunConfig(out="x", max_steps=1, **run))


def test_processes_that_fit(monkeypatch) -> None:
    put(monkeypatch, JOB)
    check_processes(RunConfig(out="x", max_steps=1, devices=8))  # it starts them itself
    put(monkeypatch, task(1))
    check_processes(RunConfig(out="x", max_steps=1, devices=2))
