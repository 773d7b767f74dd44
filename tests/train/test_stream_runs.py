"""Runs that train from streams: every kind starts, and one that is killed ends as a whole one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import read_metadata
from cascade.checkpoints.written_tensors import save_tensors
from cascade.errors import run_main
from train.callbacks.checkpoints import newest_checkpoint
from train.callbacks.stop import Stop
from train.data.__main__ import main as data_main
from train.data.exact import ExactSource
from train.data.resampled import ResampledSource

ROOT = Path(__file__).parents[2]
STREAM = {"mode": "exact", "size": 32, "folder": None}


@pytest.fixture(autouse=True)
def own_index_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture
def latents(shards: str, tiny_model: Path, tmp_path: Path) -> str:
    """Shards of all parts that the tiny model makes."""
    words = ["precompute", "--shards", shards, "--shards-out", str(tmp_path / "latents")]
    words += ["--size", "32", "--batch-size", "6", "--text", str(tiny_model / "text")]
    words += ["--stage-a", str(tiny_model / "stage_a.safetensors")]
    words += ["--compressor", str(tiny_model / "compressor.safetensors")]
    assert data_main(words) == 0
    return f"{tmp_path}/latents/*.tar"


def refusal(run, capsys, *arguments: object) -> str:
    assert run_main(lambda: run.start(*arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def assert_equal_ends(whole, other) -> None:
    ends = [newest_checkpoint(run.out) for run in (whole, other)]
    expected, found = (torch.load(end, weights_only=True)["state_dict"] for end in ends)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize(
    "kind", ["stage_a", "autoencoder_kl", "compressor", "stage_b", "stage_c", "previewer"]
)
def test_every_kind_trains_from_a_stream_of_pictures(kind, make_run):
    buckets = {"step": 8, "max_aspect": 1.0}
    run = make_run(kind, data={**STREAM, "buckets": buckets, "crop": "random"})
    assert run.start() == 0
    assert len(run.losses()) == 4


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_stage_b_and_c_train_from_a_stream_of_latents(mode, make_run, latents, tiny_model):
    data = {**STREAM, "mode": mode, "shards": latents}
    run = make_run("stage_c", data=data)
    assert run.start() == 0
    compressor = str(tiny_model / "compressor.safetensors")
    run = make_run("stage_b", "b", data=data, compressor=None, frozen_compressor=compressor)
    assert run.start() == 0
    assert len(run.losses()) == 4


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_half_a_streamed_run_and_its_resumption_equal_a_whole_run(mode, make_run, monkeypatch):
    data = {**STREAM, "mode": mode, "crop": "random", "workers": 1, "batch_size": 5}
    whole = make_run("stage_a", "whole", data=data)
    assert whole.start("--run.max_steps", 7) == 0
    halves = make_run("stage_a", "halves", data=data)
    with monkeypatch.context() as patch:
        steps = iter(range(1, 1000))
        patch.setattr(Stop, "seconds_left", lambda self: 4 - next(steps))
        assert halves.start("--run.max_steps", 7) == 0
    assert halves.start("--run.max_steps", 7, "--resume") == 0
    assert_equal_ends(whole, halves)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(make_run):
    data = {**STREAM, "workers": 1, "batch_size": 4, "crop": "random"}
    sections = {"data": data, "run": {"max_steps": 10}}
    whole = make_run("compressor", "whole", **sections)
    assert whole.start() == 0
    killed = make_run("compressor", "killed", **sections)
    command = [sys.executable, "-m", "train", "compressor", "--config", str(killed.config)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    first = killed.out / "checkpoints" / "step=2.ckpt"
    deadline = time.monotonic() + 200
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    newest = newest_checkpoint(killed.out)
    assert newest is not None
    step = torch.load(newest, weights_only=True)["global_step"]
    assert step < 10, "it was killed too late to prove anything"
    assert killed.start("--resume") == 0
    assert_equal_ends(whole, killed)
    names = ["compressor.safetensors", "previewer.safetensors"]
    for expected, found in ((load_file(r.out / n) for r in (whole, killed)) for n in names):
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_told_to_end_while_no_batch_comes_saves_and_ends(workers, make_run, monkeypatch):
    """A shard that hangs must not cost what was learned since the last checkpoint."""
    data = {**STREAM, "mode": "resampled", "workers": workers}
    sections = {"data": data, "run": {"max_steps": 6, "checkpoint_every_steps": 100}}
    whole = make_run("stage_a", "whole", **sections)
    assert whole.start() == 0
    run = make_run("stage_a", "run", **sections)
    with monkeypatch.context() as patch:
        serve = ResampledSource.serve

        def hang(self: ResampledSource, step: int) -> object:
            if step >= 4:
                time.sleep(300)
            return serve(self, step)

        patch.setattr(ResampledSource, "serve", hang)
        threading.Timer(8.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert run.start() == 0
    newest = newest_checkpoint(run.out)
    assert newest is not None and not (run.out / "done").exists()
    assert torch.load(newest, weights_only=True)["global_step"] >= 2 * 3  # two optimizers
    assert run.start("--resume") == 0
    assert_equal_ends(whole, run)


@pytest.mark.parametrize("change", [("--run.accumulate", 2), ("--data.batch_size", 2)])
def test_a_run_goes_on_where_it_was_in_its_data_whatever_its_steps_take(
    change, make_run, monkeypatch
):
    data = {**STREAM, "batch_size": 1, "workers": 0}
    run = make_run("stage_c", data=data, run={"checkpoint_every_steps": 100})
    assert run.start("--run.max_steps", 4) == 0
    served = []
    serve = ExactSource.serve
    monkeypatch.setattr(
        ExactSource, "serve", lambda self, step: served.append(step) or serve(self, step)
    )
    assert run.start("--run.max_steps", 5, "--resume", *change) == 0
    # Four samples were seen: batches 0 to 3 of one, or 0 and 1 of two.
    assert served[0] == (4 if change[0] == "--run.accumulate" else 2)


def test_frozen_weights_that_have_changed_are_no_part_of_a_resumed_run(
    make_run, tiny_model, tmp_path, capsys
):
    compressor = tmp_path / "compressor.safetensors"
    weights = load_file(tiny_model / "compressor.safetensors")
    metadata = read_metadata(tiny_model / "compressor.safetensors")
    save_tensors(weights, compressor, metadata)
    run = make_run("stage_c", data=STREAM, compressor=str(compressor))
    assert run.start("--run.max_steps", 2) == 0
    before = (run.out / "stage_c.safetensors").read_bytes()
    save_tensors({name: 1.5 * one.float() for name, one in weights.items()}, compressor, metadata)
    words = ("--run.max_steps", 3, "--resume")
    line = refusal(run, capsys, *words)
    assert "--resume: the compressor has the weights" in line and "and had" in line
    assert (run.out / "stage_c.safetensors").read_bytes() == before
    save_tensors(weights, compressor, metadata)
    assert run.start(*words) == 0


def test_a_resumed_run_is_told_when_its_data_are_others(make_run, caplog):
    run = make_run("compressor", data=STREAM)
    run.start("--run.max_steps", 2)
    run.start("--run.max_steps", 3, "--resume", "--data.workers", 1)
    assert "the order of the samples is another" not in caplog.text
    run.start("--run.max_steps", 4, "--resume", "--data.batch_size", 3)
    assert "the order of the samples is another" in caplog.text


def test_what_a_stream_can_t_serve_is_refused_in_one_line(make_run, latents, capsys):
    run = make_run("stage_a", data=STREAM)
    for arguments, message in (
        (["--data.size", "8"], "crop is 16 but the pictures are 8x8"),
        (["--data.mode", "exat"], "did you mean 'exact'?"),
        (["--data.filters.min_siez", "3"], "did you mean 'min_size'?"),
        (["--data.filters.min_size", "99"], "nothing to train on: 12 samples in 1 shards"),
        (["--data.batch_size", "13"], "batch_size is 13 on 1 device(s)"),
        (["--data.shards", latents], "shards of latents, but this run reads pixels"),
        (["--data.shards", "pipe:cat x"], "would run a command"),
    ):
        assert message in refusal(run, capsys, *arguments)
    run = make_run("stage_c", "c", data={**STREAM, "shards": latents})
    assert "size is 40 here and 32 there" in refusal(run, capsys, "--data.size", "40")
    run = make_run("clip", "clip", data=STREAM)
    assert "a tokenizer is trained on captions in memory" in refusal(run, capsys)
    run = make_run("stage_b", "b", data={**STREAM, "size": 30})
    assert "the network does not take these pictures" in refusal(run, capsys)
