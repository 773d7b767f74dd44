"""One process, two, or micro-batches: the same global batch gives the same steps."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cascade.config import load_yaml
from cascade.errors import UserError
from tests.train.processes import ROOT, TORCHRUN, finished
from train.data.open import open_data
from train.systems.previewer import PreviewerRun

STEPS = 4
LEARNING_RATE = 1e-5
OPTIM = {
    "optim": {"name": "adamw", "lr": LEARNING_RATE, "warmup_steps": 0, "schedule": "constant"},
    "run": {"ema_decay": 0.0},
    "model": {"dropout": 0.0},  # drawn by each process for itself
}

pytestmark = pytest.mark.slow


def start(run, *arguments: object) -> subprocess.CompletedProcess[str]:
    return finished(run, "--run.max_steps", STEPS, *arguments, timeout_s=600)


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(run.out / f"{run.kind.removesuffix('_kd')}.safetensors")


def assert_same_steps(one, other) -> None:
    """The updates agree. AdamW's are as large for gradients of rounding errors, so not bit by bit.

    Of unrelated gradients, or of half of the batch alone, the share below is near or above 1.
    """
    first, second = weights_of(one), weights_of(other)
    gaps = torch.cat([(value - second[key]).flatten() for key, value in first.items()])
    moved = torch.full_like(gaps, LEARNING_RATE * STEPS)
    assert float(gaps.norm() / moved.norm()) < 0.1


def test_two_processes_train_as_one(make_run, tiny_model: Path) -> None:
    start_from = str(tiny_model / "stage_c.safetensors")  # of zeros, gradients are rounding errors
    whole = make_run("stage_c", "whole", data={"batch_size": 4}, init_from=start_from, **OPTIM)
    assert whole.start("--run.max_steps", STEPS) == 0
    halves = make_run("stage_c", "halves", data={"batch_size": 2}, init_from=start_from, **OPTIM)
    done = start(halves, "--run.devices", 2)
    assert done.returncode == 0, done.stderr
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-4)
    assert_same_steps(whole, halves)


def test_a_step_asks_the_other_ranks_for_the_means_of_its_logs_once_and_waits_for_none(
    make_run, tmp_path, monkeypatch
) -> None:
    own = {**OPTIM, "run": {"checkpoint_every_steps": 4}}
    run = make_run("stage_c", data={"batch_size": 2}, **own)
    counts = []
    for steps in (4, 12):
        folder = tmp_path / str(steps)
        monkeypatch.setenv("COUNTS", str(folder))
        command = [*TORCHRUN, "-m", "tests.train.count_collectives", "stage_c"]
        options = ["--run.max_steps", steps, "--run.out", folder / "run", "--run.devices", 2]
        done = subprocess.run(
            [sys.executable, *command, "--config", str(run.config), *map(str, options)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        counts.append(Counter(json.loads((folder / "0.json").read_text())))
    few, many = counts
    # Gradients are reduced within the backward pass, which asks from C++. A step's logs are one
    # reduction on the device; what was left out and who is to end are one each among the hosts. A
    # barrier, or a broadcast that is read, would let each step wait for the device.
    steps, checkpoints = 12 - 4, (12 - 4) // 4
    assert (many - few) == {"all_reduce": 3 * steps, "barrier": checkpoints}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_distill_as_one(strategy, make_run) -> None:
    """Equal gradients at every place, with half of the batch each."""
    distill = {"features": {"kinds": ["self_attention", "block"], "normalize": True}}
    more = {**OPTIM, "distill": distill, "caption_dropout": 0.3}
    del more["model"]
    whole = make_run("unet_kd", "whole", data={"batch_size": 4}, **more)
    halves = make_run("unet_kd", "halves", data={"batch_size": 2}, **more)
    assert whole.start("--run.max_steps", STEPS) == 0
    done = start(halves, "--run.devices", 2, "--run.strategy", strategy)
    assert done.returncode == 0, done.stderr
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-4)
    for one, other in zip(whole.metrics(), halves.metrics(), strict=True):
        for name in ("task", "kd_output", "kd_features"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3)
    assert_same_steps(whole, halves)


def test_two_processes_step_two_optimizers_and_go_on_together(make_run) -> None:
    # Not as one: Stage A's batch norms see each process's half (on GPUs they see all).
    run = make_run("stage_a", data={"batch_size": 2})
    for steps in (STEPS, STEPS + 2):
        done = start(run, "--run.devices", 2, "--resume", "--run.max_steps", steps)
        assert done.returncode == 0, done.stderr
        assert (run.out / "done").read_text() == f"{steps} steps\n"
    rows = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    assert rows[-1]["samples"] == (STEPS + 2) * 4
    assert rows[-1]["device_seconds"] == pytest.approx(2 * sum(rows[-1]["seconds"].values()))


def test_two_micro_batches_train_as_one_batch(make_run, tiny_model: Path) -> None:
    start_from = str(tiny_model / "stage_c.safetensors")
    whole = make_run("stage_c", "whole", data={"batch_size": 4}, init_from=start_from, **OPTIM)
    both = {**OPTIM, "run": {**OPTIM["run"], "accumulate": 2}}
    halves = make_run("stage_c", "halves", data={"batch_size": 2}, init_from=start_from, **both)
    assert whole.start("--run.max_steps", STEPS) == 0
    assert halves.start("--run.max_steps", STEPS) == 0
    assert_same_steps(whole, halves)


def test_what_steps_two_optimizers_takes_no_micro_batches(make_run) -> None:
    run = make_run("stage_a", run={"accumulate": 2})
    with pytest.raises(UserError, match=r"raise data\.batch_size instead"):
        run.start()


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_two_processes_of_torchrun_share_uneven_shards_without_a_hang(
    mode, make_run, tiny_model: Path, uneven_latents: str, tmp_path: Path, monkeypatch
) -> None:
    """Five shards of 13, 5, 20, 1 and 23 samples, for more steps than an epoch has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    data = {"mode": mode, "size": 32, "folder": None, "shards": uneven_latents, "workers": 1}
    start_from = str(tiny_model / "stage_c.safetensors")
    runs = [
        make_run("stage_c", name, data={**data, "batch_size": size}, init_from=start_from, **OPTIM)
        for name, size in (("halves", 2), ("whole", 4))
    ]
    halves, whole = runs
    done = finished(halves, "--run.devices", 2, "--run.max_steps", 20, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "fontManager" not in done.stderr
    assert len(halves.losses()) == 20
    rows = [json.loads(line) for line in (halves.out / "ledger.jsonl").read_text().splitlines()]
    # The last of an exact epoch's 16 steps has the two samples that are left, one for each rank.
    assert rows[-1]["samples"] == 20 * 4 - (2 if mode == "exact" else 0)
    if mode == "exact":  # a resampled stream is one of each rank's own
        assert whole.start("--run.max_steps", 20) == 0
        assert halves.losses() == pytest.approx(whole.losses(), rel=1e-4)


def test_what_two_processes_left_out_is_one_sum(make_run, tmp_path, monkeypatch) -> None:
    """Each rank's broken pictures count once; what the filters left out is the set's, not twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(16):
            buffer = io.BytesIO()
            side = 16 if number >= 13 else 32
            Image.new("RGB", (side, side), (number, 0, 0)).save(buffer, "png")
            data = buffer.getvalue()
            cut = data[:-30] if number % 3 == 0 and side == 32 else data
            for name, content in ((f"{number}.png", cut), (f"{number}.txt", b"x")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    section = {"shards": str(tmp_path / "a.tar"), "mode": "exact", "size": 32, "folder": None}
    section |= {"batch_size": 2, "filters": {"min_size": 24}, "workers": 1}
    run = make_run("previewer", data=section)
    done = finished(run, "--run.devices", 2, "--run.max_steps", 4, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    data = open_data(load_yaml(PreviewerRun, run.config).data)
    broken = [
        sum(batch.lost["broken"] for batch in itertools.islice(data.loader_from(0, rank, 2), 4))
        for rank in range(2)
    ]
    assert min(broken) > 0, "both ranks must have met some"
    rows = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
    assert rows[-1]["left_out"] == {"broken": sum(broken), "filtered": 3, "dropped": 0}


def test_a_log_that_can_t_be_written_ends_all_ranks_with_one_line(make_run) -> None:
    run = make_run("stage_c", data={"batch_size": 2})
    (run.out / "ledger.jsonl").mkdir(parents=True)
    done = start(run, "--run.devices", 2, "--run.max_steps", 50)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert any("ledger.jsonl" in line for line in errors)
    assert "Traceback" not in done.stderr


def test_an_error_of_one_rank_ends_both_with_its_line(make_run) -> None:
    run = make_run("stage_c", data={"batch_size": 2}, run={"checkpoint_every_steps": 1})
    run.out.mkdir()
    (run.out / "checkpoints").write_text("a file where the folder belongs")
    begun_s = time.monotonic()
    done = start(run, "--run.devices", 2, "--run.max_steps", 50)
    assert done.returncode != 0
    assert "something else of that name is in the way" in done.stderr
    assert time.monotonic() - begun_s < 120, "nobody waits for a time limit"
    assert not (run.out / "done").exists()
