"""A run that is killed at random moments, again and again, ends as one that was left alone."""

from __future__ import annotations

import contextlib
import json
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

from train.data.cached import CachedBatch

KILLS = 20
STEPS = 60
STREAM_KILLS = 3
STREAM_STEPS = 31  # of two samples: one epoch of the 62 in uneven_latents

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a fork server and SIGKILL"),
]


def train(config: str, arguments: list[str]) -> None:
    """Run the command in a process of its own, quietly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    from train.__main__ import main
    from train.systems.stage_c import StageCSystem

    learn = StageCSystem.training_step

    def noted(self: StageCSystem, batch: CachedBatch, number: int) -> torch.Tensor:
        with open(Path(config).with_suffix(".seen"), "a") as file:
            file.write(f"{json.dumps([self.global_step, batch.keys])}\n")
        return learn(self, batch, number)

    StageCSystem.training_step = noted
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


def samples_seen(config: Path) -> dict[int, list[str]]:
    """Step -> its samples, over all starts of a run, of which each must have made it of the same.

    A start that was killed amid a line leaves half of one.
    """
    seen: dict[int, list[str]] = {}
    for line in config.with_suffix(".seen").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            step, keys = json.loads(line)
            assert seen.setdefault(step, keys) == keys, step
    return seen


def kill_again_and_again(whole, killed, kills: int) -> None:
    """Make one run in one go, and the other in many; require the same losses and weights."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train.runs"])

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
    for _ in range(kills):
        process = start(killed)
        if draws.random() < 0.8:  # else: while it starts
            wait_for_a_step(killed.out, process)
        process.join(draws.uniform(0, 1 / kills) * one_run_s)
        hit += process.is_alive()
        process.kill()
        process.join()
    process = start(killed)
    process.join()
    assert process.exitcode == 0
    assert hit > kills // 2, "the kills must hit the run, or nothing was tested"
    expected, found = steps_logged(whole.out), steps_logged(killed.out)
    steps = len(expected)
    assert set(expected) == set(range(steps)) and max(found) == steps - 1
    for step, losses in found.items():
        assert set(losses) == set(expected[step]), step
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (whole, killed))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert (killed.out / "done").is_file()


def test_twenty_kills_at_random_moments_change_no_loss(make_run) -> None:
    sections = {"model": {"dropout": 0.2}, "optim": {"name": "muon"}}
    run_settings = {"max_steps": STEPS, "checkpoint_every_steps": 2, "threads": 1}
    whole = make_run("stage_c", "whole", run=run_settings, **sections)
    killed = make_run("stage_c", "killed", run=run_settings, **sections)
    kill_again_and_again(whole, killed, KILLS)
    assert len(steps_logged(whole.out)) == STEPS


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_kills_amid_a_stream_change_no_loss_and_no_sample(
    mode, make_run, uneven_latents, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    data = {"mode": mode, "shards": uneven_latents, "size": 32, "folder": None}
    data |= {"workers": 2, "batch_size": 2}
    settings = {"max_steps": STREAM_STEPS, "checkpoint_every_steps": 2, "threads": 1}
    whole, killed = (
        make_run("stage_c", name, run=settings, data=data) for name in ("whole", "killed")
    )
    kill_again_and_again(whole, killed, STREAM_KILLS)
    expected, found = samples_seen(whole.config), samples_seen(killed.config)
    assert found == expected and set(expected) == set(range(STREAM_STEPS))
    samples = [key for keys in expected.values() for key in keys]
    assert len(samples) == 62
    if mode == "exact":
        assert len(set(samples)) == 62, "an epoch has every sample, each once"
