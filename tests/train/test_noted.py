"""What a run's folder says of it, when the run goes on, is refused, or has lost its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cascade.checkpoints.files import read_metadata
from cascade.errors import UserError
from train.callbacks.checkpoints import RunCheckpoints, newest_checkpoint
from train.callbacks.stop import Stop

WEIGHTS = "previewer.safetensors"


def notes(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("config.yaml", "environment.json")]


@pytest.mark.parametrize("resume", [["--resume"], []])
def test_a_finished_run_without_checkpoints_is_not_begun_anew(resume, make_run):
    run = make_run("previewer")
    assert run.start("--run.max_steps", 2) == 0
    before = (run.out / WEIGHTS).read_bytes(), notes(run.out)
    shutil.rmtree(run.out / "checkpoints")
    with pytest.raises(UserError, match=r"is done, but its checkpoints are gone; put them back, "):
        run.start("--run.max_steps", 2, *resume)
    assert ((run.out / WEIGHTS).read_bytes(), notes(run.out)) == before


def test_a_stopped_run_without_checkpoints_is_not_begun_anew(make_run, monkeypatch):
    run = make_run("previewer", run={"checkpoint_every_steps": 2})
    steps = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "seconds_left", lambda self: 3 - next(steps))
        assert run.start("--run.max_steps", 6, "--run.log_every_steps", 100) == 0
    assert read_metadata(run.out / WEIGHTS)["train_steps"] == "3"
    for path in (run.out / "checkpoints").iterdir():
        path.unlink()
    for _ in range(2):  # without the files, and without the folder
        with pytest.raises(UserError, match=r"previewer\.safetensors: holds 3 steps of training"):
            run.start("--run.max_steps", 6, "--resume")
        shutil.rmtree(run.out / "checkpoints", ignore_errors=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(make_run, monkeypatch):
    """Its first export is written before its first checkpoint."""
    run = make_run("previewer", run={"checkpoint_every_steps": 2})
    save = RunCheckpoints.save_checkpoint

    def die(self: RunCheckpoints, checkpoint: object, path: object, **more: object) -> None:
        if ".rehearsal" not in str(path):
            raise RuntimeError("killed")
        save(self, checkpoint, path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save_checkpoint", die)
        with pytest.raises(RuntimeError, match="killed"):
            run.start("--run.max_steps", 4, "--resume")
    assert (run.out / WEIGHTS).is_file() and newest_checkpoint(run.out) is None
    assert run.start("--run.max_steps", 4, "--resume") == 0
    assert (run.out / "done").is_file()


def test_a_start_that_is_refused_leaves_the_notes_of_the_one_before(make_run):
    run = make_run("previewer")
    assert run.start("--run.max_steps", 1) == 0
    before = notes(run.out)
    with pytest.raises(UserError):
        run.start("--run.max_steps", 2, "--resume", "--data.shards", "nowhere")
    assert notes(run.out) == before
    with pytest.raises(UserError, match="model"):
        run.start("--run.max_steps", 2, "--resume", "--model.channels", "[8, 4]")
    assert notes(run.out) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "a configuration is a mapping"),
        (b"- 1\n", "a configuration is a mapping"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"a: [", "not valid YAML"),
        (None, "not there, and the sizes"),
    ],
)
def test_a_damaged_config_of_a_run_is_one_line_with_a_remedy(content, said, make_run, tiny_model):
    init = {"model": None, "init_from": str(tiny_model / "previewer.safetensors")}
    run = make_run("previewer", **init)
    assert run.start("--run.max_steps", 1) == 0
    path = run.out / "config.yaml"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"(?s)config\.yaml: {said}.*put .* back"):
        run.start("--run.max_steps", 2, "--resume")
    if content is not None:  # of a run that says its sizes itself
        whole = make_run("previewer", "whole")
        with pytest.raises(UserError, match=rf"(?s)config\.yaml: {said}.*put .* back"):
            whole.start("--run.max_steps", 2, "--resume", "--run.out", run.out)
