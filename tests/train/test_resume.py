"""A run that was stopped and resumed ends as one that was not, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.errors import UserError, run_main
from train.callbacks.stop import Stop

EXPORTS = {
    "clip": ["text/model.safetensors"],
    "stage_a": ["stage_a.safetensors"],
    "stage_b": ["stage_b.safetensors", "compressor.safetensors"],
    "stage_c": ["stage_c.safetensors"],
    "previewer": ["previewer.safetensors"],
}
# Dropout and Muon are in here too: what they draw and keep must survive.
SECTIONS = {
    "stage_c": {"model": {"dropout": 0.2}, "optim": {"name": "muon"}},
    "stage_b": {"model": {"dropout": [0.2, 0.2]}},
}


def steps_of(run):
    checkpoint = torch.load(run.out / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["global_step"] // (2 if run.kind == "stage_a" else 1)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the run's time be over after ``step`` steps of this start."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr(Stop, "seconds_left", lambda self: step - next(steps))


@pytest.mark.parametrize("kind", list(EXPORTS))
def test_half_a_run_and_its_resumption_equal_a_whole_run(kind, make_run, monkeypatch):
    sections = SECTIONS.get(kind, {})
    whole = make_run(kind, "whole", **sections)
    assert whole.start("--run.max_steps", 7) == 0
    halves = make_run(kind, "halves", **sections)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert halves.start("--run.max_steps", 7, "--run.log_every_steps", 100) == 0
    assert steps_of(halves) == 3
    assert halves.start("--run.max_steps", 7, "--resume") == 0
    for name in EXPORTS[kind]:
        expected, found = load_file(whole.out / name), load_file(halves.out / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
    ends = [run.out / "checkpoints" / "last.ckpt" for run in (whole, halves)]
    expected, found = (torch.load(end, weights_only=True) for end in ends)
    assert expected["global_step"] == found["global_step"]
    for key, value in expected["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key
    assert expected["lr_schedulers"] == found["lr_schedulers"]
    assert sorted(p.name for p in halves.out.glob("checkpoints/*")) == [
        "last.ckpt",
        f"step={12 if kind == 'stage_a' else 6}.ckpt",
    ]


def test_a_resumed_run_that_dies_goes_on_from_its_own_newest_checkpoint(make_run, monkeypatch):
    run = make_run("previewer")
    run.start("--run.max_steps", 2)

    def die(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("train.callbacks.ledger.Ledger.on_train_end", die)
        with pytest.raises(RuntimeError, match="power cut"):
            run.start("--run.max_steps", 6, "--resume")
    assert steps_of(run) == 6


def test_a_finished_run_can_be_resumed_and_prolonged(make_run):
    run = make_run("previewer")
    run.start()
    before = load_file(run.out / "previewer.safetensors")
    assert run.start("--resume") == 0
    after = load_file(run.out / "previewer.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run.start("--resume", "--run.max_steps", 6) == 0
    assert steps_of(run) == 6


def test_a_time_limit_counts_from_each_start(make_run):
    run = make_run("previewer")
    assert run.start("--run.max_minutes", 1e-9) == 0
    assert run.start("--run.max_minutes", 1e-9, "--resume") == 0
    assert steps_of(run) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_keeps_the_work(number, make_run, monkeypatch, capsys):
    run = make_run("previewer", run={"max_steps": 1000, "checkpoint_every_steps": 500})
    before = signal.getsignal(number)
    monkeypatch.setattr(
        "train.callbacks.ledger.Ledger.on_train_batch_start",
        lambda *_: os.kill(os.getpid(), number),
        raising=False,
    )
    assert run_main(lambda: run.start()) == 130
    assert signal.getsignal(number) == before
    assert (run.out / "previewer.safetensors").is_file()
    assert steps_of(run) == 1


@pytest.fixture
def begun(make_run) -> object:
    run = make_run("previewer")
    run.start("--run.max_steps", 1)
    return run


def test_a_fresh_start_over_a_run_is_refused_and_changes_nothing(begun):
    before = (begun.out / "config.yaml").read_text()
    with pytest.raises(UserError, match="holds a run already; go on with --resume"):
        begun.start("--optim.lr", 0.5)
    assert (begun.out / "config.yaml").read_text() == before


def test_resuming_nothing_is_refused_and_makes_nothing(make_run):
    run = make_run("previewer")
    with pytest.raises(UserError, match=r"last\.ckpt is not there; start without --resume"):
        run.start("--resume")
    assert not run.out.exists()


def test_resuming_with_another_network_or_rate_is_refused(begun):
    with pytest.raises(UserError, match=r"model\.channels is \[8, 4\] but the run .* \[8, 8\]"):
        begun.start("--resume", "--model.channels", "[8, 4]")
    with pytest.raises(UserError, match=r"optim\.lr is 0\.5 but the run was started with 0\.01"):
        begun.start("--resume", "--optim.lr", 0.5)


def test_a_broken_checkpoint_names_the_one_to_take_instead(make_run):
    run = make_run("previewer")
    run.start()
    newest: Path = run.out / "checkpoints" / "last.ckpt"
    shutil.copy(newest, newest.with_suffix(".whole"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole checkpoint; replace it with step=4"):
        run.start("--resume")
