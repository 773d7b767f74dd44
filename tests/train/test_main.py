"""The command: what it prints, and how it refuses what can't work."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cascade.errors import run_main
from tests.train.processes import finished
from train.__main__ import KINDS, main

ROOT = Path(__file__).parents[2]


def refusal(run, capsys, *arguments: object) -> str:
    """The one line that a refused run prints."""
    assert run_main(lambda: run.start(*arguments)) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("stage_c", ["--model.hidden_chanels", "[8]"], "did you mean 'hidden_channels'?"),
        (
            "stage_c",
            ["--run.max_stpes", "3"],
            "--run.max_stpes: unknown key; did you mean",
        ),
        ("stage_c", ["--preset", "23gb"], "--preset 23gb: no such file; there are 12gb, 24gb"),
        ("stage_c", ["--optim.name", "adam"], "did you mean 'adamw'?"),
        (
            "stage_c",
            ["--run.max_steps", "many"],
            "error: --run.max_steps: expected int, got",
        ),
        ("stage_c", ["--run.max_steps", "0"], "run: max_steps is 0; at least 1"),
        ("stage_c", ["--run.max_steps"], "--run.max_steps: a value is missing"),
        ("stage_c", ["more"], "more: unexpected argument"),
        ("stage_c", ["--data.shards", "/none/*.tar"], "/none/*.tar: no shard matches"),
        ("stage_c", ["--data.batch_size", "13"], "data.batch_size is 13"),
        ("stage_c", ["--data.folder", "/none"], "--out /none --text FOLDER"),
        ("stage_c", ["--data.folder", "null"], "data.folder: this run trains on a cache"),
        ("stage_c", ["--text", "/none"], "/none: no such file or folder"),
        ("stage_c", ["--compressor", "/none"], "/none: no such file"),
        ("stage_c", ["--model.text_channels", "8"], "model.text_channels is 8 but the cached"),
        ("stage_c", ["--text_states.hidden", "post_norm"], "precompute it again"),
        ("stage_c", ["--init_from", "/none"], "/none: no such file or folder"),
        ("stage_b", ["--model.text_pooled_channels", "8"], "but the cached text states have 12"),
        ("stage_b", ["--stage_a", "/none"], "/none: no such file"),
        ("previewer", ["--run.accelerator", "mps"], "run.accelerator mps"),
        ("stage_a", ["--crop", "64"], "crop is 64 but the pictures are 32x32"),
        ("stage_a", ["--crop", "18"], "crop is 18; Stage A needs a multiple of 4"),
        ("stage_a", ["--clip", "null"], "loss.perceptual is 0.1 but clip names no folder"),
        ("stage_a", ["--clip", "/none"], "/none: not a CLIP with both towers"),
        ("autoencoder_kl", ["--crop", "64"], "crop is 64 but the pictures are 32x32"),
        ("autoencoder_kl", ["--crop", "17"], "crop is 17; this autoencoder needs a multiple of 2"),
        ("autoencoder_kl", ["--clip", "null"], "loss.perceptual is 0.1 but clip names no folder"),
        ("autoencoder_kl", ["--loss.distance", "l2"], "loss.distance: 'l2' is not one of l1, mse"),
        ("autoencoder_kl", ["--model.norm_groups", "3"], "norm_groups=3 does not divide channels"),
        ("autoencoder_kl", ["--init_from", "/none"], "/none: no such file or folder"),
        ("clip", ["--init_from", "/none"], "/none: no tokenizer.json in it"),
    ],
)
def test_what_can_t_work_is_refused_in_one_line(kind, arguments, message, make_run, capsys):
    assert message in refusal(make_run(kind), capsys, *arguments)


def test_weights_of_another_size_are_no_start(make_run, tiny_model, capsys):
    start = str(tiny_model / "previewer.safetensors")
    run = make_run("previewer", init_from=start)
    line = refusal(run, capsys, "--model.channels", "[8, 4]")
    assert "previewer.safetensors: another previewer than model says: channels is (8, 8)" in line
    run = make_run("stage_c", init_from=start)
    assert "holds a previewer, but a Stage C is needed" in refusal(run, capsys)


def test_a_run_s_folder_that_can_t_be_made_is_named(make_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "run"
    assert f"run.out {out}: can't be made" in refusal(
        make_run("previewer"), capsys, "--run.out", out
    )


# What is executed has not root's right to write where modes forbid it: PR_CAPBSET_DROP of
# CAP_DAC_OVERRIDE.
WITHOUT_ROOT_S_RIGHT = """
import ctypes, os, sys
assert os.geteuid() or ctypes.CDLL(None).prctl(24, 1) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="root keeps its right to write elsewhere")
@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_without_the_right_to_write_is_named(make_run, tmp_path, begun):
    run = make_run("previewer", run={"out": str(tmp_path / "closed"), "max_steps": 1})
    run.out = tmp_path / "closed"
    if begun:
        assert run.start() == 0
    before = {path: path.stat().st_mtime_ns for path in run.out.rglob("*")}
    run.out.mkdir(exist_ok=True)
    for folder in [run.out, *(path for path in before if path.is_dir())]:
        folder.chmod(0o500)
    launcher = ("-c", WITHOUT_ROOT_S_RIGHT)
    done = finished(run, "--resume", "--run.max_steps", 2, launcher=launcher)
    for folder in [run.out, *(path for path in before if path.is_dir())]:
        folder.chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "permission denied" in done.stderr.splitlines()[-1].lower()
    assert {path: path.stat().st_mtime_ns for path in run.out.rglob("*")} == before


def test_a_resumed_run_without_its_configuration_says_what_it_can_t_tell(make_run, capsys, caplog):
    run = make_run("previewer")
    run.start("--run.max_steps", 1)
    (run.out / "config.yaml").unlink()
    with caplog.at_level("WARNING"):
        assert run.start("--resume", "--run.max_steps", 2) == 0
    [line] = [line for line in caplog.messages if "config.yaml" in line]
    assert "is not there: whether this is the run that was begun can't be told" in line
    assert (run.out / "config.yaml").is_file()


def test_a_fresh_start_over_a_run_is_one_line_too(make_run, capsys):
    run = make_run("previewer")
    run.start("--run.max_steps", 1)
    capsys.readouterr()
    assert "holds a run already; go on with --resume" in refusal(run, capsys)


def test_a_loss_that_is_lost_ends_the_run_in_one_line(make_run, capsys):
    optim = {"grad_clip": 0.0, "lr": 1e30, "warmup_steps": 0}
    run = make_run("previewer", run={"checkpoint_every_steps": 100}, optim=optim)
    line = refusal(run, capsys, "--run.max_steps", 50)
    assert "21 steps in a row had gradients that are not finite" in line and "optim.lr" in line
    assert not (run.out / "previewer.safetensors").exists()


def test_an_unknown_kind_lists_the_kinds(make_run, capsys):
    run = make_run("previewer")
    run.kind = "stage_d"
    message = refusal(run, capsys)
    assert all(kind in message for kind in KINDS)


def test_the_run_s_folder_keeps_the_resolved_configuration(make_run):
    run = make_run("previewer")
    run.start("--run.max_steps", 1, "--optim.lr=0.003")
    kept = yaml.safe_load((run.out / "config.yaml").read_text())
    assert kept["optim"]["lr"] == 0.003
    assert kept["optim"]["betas"] == [0.9, 0.95]
    again = shutil.copy(run.out / "config.yaml", run.config)
    run.config = Path(again)
    assert run.start("--run.out", run.out.with_name("again")) == 0


@pytest.mark.slow
def test_a_run_prints_its_own_lines_and_nothing_else(make_run):
    # Stage A has most to be warned of: a frozen network, two optimizers stepped by hand.
    run = make_run("stage_a")
    run.start()
    command = [sys.executable, "-m", "train", "stage_a", "--config", str(run.config)]
    done = subprocess.run(
        [*command, "--resume", "--run.max_steps", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    number = r"[\d.]+"
    ours = (
        r"1 shards: 12 pictures read",
        rf"resuming {re.escape(str(run.out))} at step 4 of 6",
        rf"step [56]/6: loss -?{number}, {number} samples/s, data wait {number}%, {number} GiB, "
        rf"MFU {number}%, {number} min left",
        rf"exported stage_a to {re.escape(str(run.out))}",
        rf"{re.escape(str(run.out))}: 6 of 6 steps, 24 samples, \d+ s",
    )
    printed = done.stderr.splitlines()
    assert [line for line in printed if not any(re.fullmatch(own, line) for own in ours)] == []
    assert sum(line.startswith("step ") for line in printed) == 2
    assert done.stdout == ""


@pytest.mark.parametrize("kind", KINDS)
def test_help_after_a_network_lists_its_keys_and_what_each_means(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([kind, "--help"]) == 0
    lines = capsys.readouterr().out.split(f"keys of {kind}:\n")[1].splitlines()
    assert "  --run.max_steps int" in lines
    silent = [
        name.split()[0]
        for name, meaning in itertools.pairwise(lines)
        if name.startswith("  --") and meaning.startswith("      (")
    ]
    assert silent == []


@pytest.mark.parametrize("in_hardware", [True, False])
def test_a_run_in_a_format_without_instructions_says_so(in_hardware, make_run, monkeypatch, caplog):
    monkeypatch.setattr("train.fit.computes_bfloat16", lambda device: in_hardware)
    run = make_run("stage_c", run={"precision": "bf16-mixed", "accelerator": "cpu"})
    assert run.start("--run.max_steps", 1) == 0
    told = [one for one in caplog.records if "computes it in software" in one.getMessage()]
    assert len(told) == (not in_hardware)
