"""A run that was stopped and resumed ends as one that was not, bit for bit."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import read_metadata
from cascade.errors import UserError, run_main
from train.callbacks.checkpoints import newest_checkpoint
from train.callbacks.stop import Stop

EXPORTS = {
    "clip": ["text/model.safetensors"],
    "stage_a": ["stage_a.safetensors"],
    "autoencoder_kl": ["autoencoder_kl.safetensors"],
    "stage_b": ["stage_b.safetensors", "compressor.safetensors"],
    "stage_c": ["stage_c.safetensors"],
    "previewer": ["previewer.safetensors"],
    "unet": ["unet.safetensors"],
    "unet_kd": ["unet.safetensors"],
    "step_distil": ["stage_c.safetensors"],
}
TWO_OPTIMIZERS = ("stage_a", "autoencoder_kl")
# Dropout and Muon are in here too: what they draw and keep must survive.
SECTIONS = {
    "stage_c": {"model": {"dropout": 0.2}, "optim": {"name": "muon"}},
    "stage_b": {"model": {"dropout": [0.2, 0.2]}},
    "step_distil": {
        "adaptive_weight": True,
        "adversarial": {"weight": 0.1, "blocks": 2},
        "tangent": {"warmup_steps": 5},
    },
}


def steps_of(run):
    checkpoint = torch.load(newest_checkpoint(run.out), weights_only=True)
    return checkpoint["global_step"] // (2 if run.kind in TWO_OPTIMIZERS else 1)


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
        said = [read_metadata(run.out / name).get("cascade_config") for run in (whole, halves)]
        assert said[0] == said[1]  # the measured scale of an autoencoder's latents, too
    ends = [newest_checkpoint(run.out) for run in (whole, halves)]
    expected, found = (torch.load(end, weights_only=True) for end in ends)
    assert expected["global_step"] == found["global_step"]
    for key, value in expected["state_dict"].items():
        assert torch.equal(value, found["state_dict"][key]), key
    assert expected["lr_schedulers"] == found["lr_schedulers"]
    steps = [12, 14] if kind in TWO_OPTIMIZERS else [6, 7]
    assert sorted(p.name for p in halves.out.glob("checkpoints/*")) == [
        f"step={step}.ckpt" for step in steps
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
    assert (run.out / "done").is_file()
    assert run.start("--resume") == 0
    assert (run.out / "done").is_file()
    after = load_file(run.out / "previewer.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert run.start("--resume", "--run.max_steps", 6) == 0
    assert steps_of(run) == 6


def test_a_time_limit_counts_from_each_start_and_is_no_end(make_run):
    run = make_run("previewer")
    assert run.start("--run.max_minutes", 1e-9) == 0
    assert run.start("--run.max_minutes", 1e-9, "--resume") == 0
    assert steps_of(run) == 2 and not (run.out / "done").exists()


def test_a_run_that_gathers_micro_batches_stops_between_steps_and_goes_on(make_run, monkeypatch):
    sections = {"run": {"accumulate": 3}, "model": {"dropout": 0.2}, "data": {"batch_size": 2}}
    whole = make_run("stage_c", "whole", **sections)
    assert whole.start("--run.max_steps", 5) == 0
    halves = make_run("stage_c", "halves", **sections)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        halves.start("--run.max_steps", 5, "--run.log_every_steps", 100)
    assert steps_of(halves) == 2
    halves.start("--run.max_steps", 5, "--resume")
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (whole, halves))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_run_that_ended_within_a_step_goes_on_with_the_whole_of_it(make_run):
    sections = {"run": {"accumulate": 3}, "model": {"dropout": 0.2}, "data": {"batch_size": 2}}
    whole = make_run("stage_c", "whole", **sections)
    assert whole.start("--run.max_steps", 5) == 0
    run = make_run("stage_c", **sections)
    run.start("--run.max_steps", 2)
    newest = newest_checkpoint(run.out)
    checkpoint = torch.load(newest, weights_only=True)
    # So it looks where a batch did not come and the run was told to end: one of three was made.
    counted = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (counted["total"], counted["current"]):
        for name in counts:
            counts[name] = 7
    torch.save(checkpoint, newest)
    run.start("--run.max_steps", 5, "--resume")
    one, two = (load_file(each.out / "stage_c.safetensors") for each in (whole, run))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_other_windows_begin_with_a_whole_step(make_run):
    """From memory the same global batch gives the same steps, also from within a run."""
    sections = {"model": {"dropout": 0.0}, "optim": {"schedule": "constant"}}
    whole = make_run("stage_c", "whole", **sections)
    assert whole.start("--run.max_steps", 5) == 0
    run = make_run("stage_c", **sections)
    run.start("--run.max_steps", 3)
    earlier = shutil.copy(run.out / "stage_c.safetensors", run.out / "earlier.safetensors")
    run.start("--run.max_steps", 5, "--resume", "--run.accumulate", 2, "--data.batch_size", 2)
    one, two = (load_file(each.out / "stage_c.safetensors") for each in (whole, run))
    start = load_file(earlier)
    moved = sum(float((one[key] - value).square().sum()) for key, value in start.items())
    apart = sum(float((one[key] - value).square().sum()) for key, value in two.items())
    assert apart < 0.01 * moved


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_finishes_the_step_and_keeps_the_work(number, code, make_run, monkeypatch):
    run = make_run("previewer", run={"max_steps": 1000, "checkpoint_every_steps": 500})
    before = signal.getsignal(number)
    monkeypatch.setattr(
        "train.callbacks.ledger.Ledger.on_train_batch_start",
        lambda *_: os.kill(os.getpid(), number),
        raising=False,
    )
    assert run_main(lambda: run.start()) == code
    assert signal.getsignal(number) == before
    assert not (run.out / "done").exists()
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


def test_the_same_command_starts_a_run_and_goes_on_with_it(make_run):
    run = make_run("previewer")
    assert run.start("--resume", "--run.max_steps", 2) == 0
    assert steps_of(run) == 2 and (run.out / "done").read_text() == "2 steps\n"
    assert run.start("--resume", "--run.max_steps", 3) == 0
    assert steps_of(run) == 3 and (run.out / "done").read_text() == "3 steps\n"


def test_resuming_by_another_kind_of_run_is_refused(begun, make_run):
    before = (begun.out / "config.yaml").read_text()
    other = make_run("stage_a")
    with pytest.raises(UserError, match=r"another kind \(PreviewerRun, this is StageARun\)"):
        other.start("--resume", "--run.out", begun.out)
    assert (begun.out / "config.yaml").read_text() == before


def test_resuming_with_another_network_or_rate_is_refused(begun):
    with pytest.raises(UserError, match=r"model\.channels is \[8, 4\] but the run .* \[8, 8\]"):
        begun.start("--resume", "--model.channels", "[8, 4]")
    with pytest.raises(UserError, match=r"optim\.lr is 0\.5 but the run was started with 0\.01"):
        begun.start("--resume", "--optim.lr", 0.5)


@pytest.mark.parametrize(
    ("key", "before", "after"),
    [
        ("diffusion.weight", "constant", "adaptive"),
        ("diffusion.weight", "adaptive", "constant"),
        ("posthoc_ema", "null", "{lengths: [0.05, 0.1]}"),
    ],
)
def test_what_a_checkpoint_has_or_lacks_can_t_be_changed(key, before, after, make_run):
    run = make_run("stage_c")
    first = ("--diffusion.prediction", "v", f"--{key}", before, "--run.max_steps", 1)
    assert run.start(*first) == 0
    with pytest.raises(UserError, match=rf"--resume: {key} is .* but the run was started with"):
        run.start("--resume", *first[:2], f"--{key}", after)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "whole, and no checkpoint")


def test_a_full_disk_under_a_log_names_the_run(make_run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = make_run("previewer")
    monkeypatch.setattr("train.callbacks.ledger.Ledger.write_row", full)
    with pytest.raises(UserError, match=rf"^{re.escape(str(run.out))}: .*disk is full"):
        run.start()


@pytest.mark.parametrize("damage", [cut, flip_a_bit, put_another_zip])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(damage, make_run, caplog):
    whole = make_run("previewer", "whole")
    whole.start("--run.max_steps", 6)
    run = make_run("previewer")
    run.start()
    folder = run.out / "checkpoints"
    damage(folder / "step=4.ckpt")
    (folder / ".step=6.ckpt.abc.tmp").write_bytes(b"a kill during a save left this")
    run.start("--resume", "--run.max_steps", 6)
    assert "step=4.ckpt is damaged" in caplog.text and "the one before" in caplog.text
    assert sorted(p.name for p in folder.iterdir()) == [
        "step=4.ckpt",
        "step=4.damaged",
        "step=6.ckpt",
    ]
    expected, found = (load_file(one.out / "previewer.safetensors") for one in (whole, run))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_in_silence(make_run):
    run = make_run("previewer")
    run.start()
    for path in (run.out / "checkpoints").iterdir():
        cut(path)
    for _ in range(2):  # nor when somebody tries again
        with pytest.raises(UserError, match=r"no whole checkpoint is left \(damaged: step="):
            run.start("--resume")
