"""A run that is killed at random moments, again and again, ends as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KILLS = 20
STEPS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server and SIGKILL"),
]


def train(config: str, arguments: list[str]) -> None:
    """Run the command in a process of its own, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    from train.__main__ import main

    main(["stage_c", "--config", config, *arguments])


def steps_logged(out: Path) -> dict[int, list[str]]:
    """Step -> its losses, over all starts of a run."""
    import csv

    losses: dict[int, list[str]] = {}
    for path in out.glob("logs/version_*/metrics.csv"):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if row.get("loss") and row.get("step"):  # the last row may be cut
                losses.setdefault(int(row["step"]), []).append(row["loss"])
    return losses


def wait_for_a_step(out: Path, process: BaseProcess) -> None:
    """Return when a start of the run has made a step, or has ended."""
    before = len(list(out.glob("logs/version_*/metrics.csv")))
    while process.is_alive() and len(list(out.glob("logs/version_*/metrics.csv"))) == before:
        process.join(0.01)


def test_twenty_kills_at_random_moments_change_no_loss(make_run) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.runs"])
    sections = {"model": {"dropout": 0.2}, "optim": {"name": "muon"}}
    run_settings = {"max_steps": STEPS, "checkpoint_every_steps": 2, "threads": 1}
    whole = make_run("stage_c", "whole", run=run_settings, **sections)
    killed = make_run("stage_c", "killed", run=run_settings, **sections)

    def start(run) -> BaseProcess:
        process = processes.Process(target=train, args=(str(run.config), ["--resume"]))
        process.start()
        return process

    warm = processes.Process(target=time.sleep, args=(0.0,))  # the fork server imports, once
    warm.start()
    warm.join()
    begun_s = time.monotonic()
    process = start(whole)
    process.join()
    assert process.exitcode == 0
    one_run_s = time.monotonic() - begun_s
    draws = random.Random(0)
    hit = 0
    for _ in range(KILLS):
        process = start(killed)
        if draws.random() < 0.8:  # else: while it starts
            wait_for_a_step(killed.out, process)
        process.join(draws.uniform(0, 0.05) * one_run_s)
        hit += process.is_alive()
        process.kill()
        process.join()
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert hit > KILLS // 2, "the kills must hit the run, or nothing was tested"
    expected, found = steps_logged(whole.out), steps_logged(killed.out)
    assert set(expected) == set(range(STEPS)) and max(found) == STEPS - 1
    for step, losses in found.items():
        assert set(losses) == set(expected[step]), step
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (whole, killed))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert (killed.out / "done").is_file()
