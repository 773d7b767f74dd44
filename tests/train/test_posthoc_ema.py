"""Averages of any length, made of the two that a run stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import load_network
from cascade.errors import UserError
from stages.stage_c import StageC
from train.callbacks.posthoc_ema import exponent
from train.posthoc_ema import Snapshot, find_snapshots, solve
from train.posthoc_ema import main as posthoc_main


def profile(length: float, steps: int) -> np.ndarray:
    """Weight of each step's parameters in the running average after ``steps`` steps."""
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        share = 1 - (1 - 1 / step) ** (exponent(length) + 1)
        weights *= 1 - share
        weights[step - 1] += share
    return weights


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_profile_has_the_length_that_names_it(length):
    weights = profile(length, 2000)
    at = (np.arange(2000) + 0.5) / 2000
    mean = (weights * at).sum()
    assert weights.sum() == pytest.approx(1)
    assert (weights * (at - mean) ** 2).sum() ** 0.5 == pytest.approx(length, rel=0.01)


@pytest.mark.parametrize("length", [0.03, 0.07, 0.1, 0.15])
def test_snapshots_give_the_average_of_another_length(length, tmp_path):
    steps = 2000
    stored = [
        Snapshot(tmp_path, step, one) for step in range(100, steps + 1, 100) for one in (0.05, 0.1)
    ]
    factors = solve(stored, length, steps)
    made = np.zeros(steps)
    for snapshot, factor in zip(stored, factors, strict=True):
        made[: snapshot.step] += factor * profile(snapshot.length, snapshot.step)
    wanted = profile(length, steps)
    assert np.abs(made - wanted).sum() < 0.05  # of 1


@pytest.fixture
def stored(make_run):
    run = make_run("stage_c", posthoc_ema={"every_steps": 1, "dtype": "float32"})
    run.start()
    return run


def test_a_stored_length_comes_out_as_it_was_stored(stored, tmp_path):
    snapshots = find_snapshots(stored.out, "stage_c")
    assert [(one.step, one.length) for one in snapshots] == [
        (step, length) for step in (1, 2, 3, 4) for length in (0.05, 0.1)
    ]
    out = tmp_path / "made.safetensors"
    command = ["--run", str(stored.out), "--length", "0.1", "--dtype", "float32"]
    assert posthoc_main([*command, "--out", str(out)]) == 0
    made, last = load_file(out), load_file(snapshots[-1].path)
    for key, value in last.items():
        torch.testing.assert_close(made[key], value, atol=1e-6, rtol=1e-5)
    assert isinstance(load_network(out, expect=StageC), StageC)
    assert posthoc_main([*command, "--step", "2", "--out", str(out)]) == 0
    torch.testing.assert_close(load_file(out), load_file(snapshots[3].path))


def test_the_stored_averages_go_on_over_a_resumption(stored, make_run):
    half = make_run("stage_c", "half", posthoc_ema={"every_steps": 1, "dtype": "float32"})
    # The same command, stopped after its second step by the clock of no time left.
    whole = find_snapshots(stored.out, "stage_c")
    half.start("--run.max_minutes", "0.00001")
    half.start("--resume")
    again = find_snapshots(half.out, "stage_c")
    assert [one.step for one in again] == [one.step for one in whole]
    for one, other in zip(whole, again, strict=True):
        assert all(
            torch.equal(value, load_file(other.path)[key])
            for key, value in load_file(one.path).items()
        )


def test_a_finished_run_that_is_resumed_keeps_its_averages(stored):
    before = {one.path: one.path.read_bytes() for one in find_snapshots(stored.out, "stage_c")}
    assert stored.start("--resume") == 0
    assert {path: path.read_bytes() for path in before} == before
    assert stored.start("--resume", "--run.max_steps", 5) == 0
    assert find_snapshots(stored.out, "stage_c")[-1].step == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "0.5"], "length is 0.5"),
        (["--length", "0.1", "--step", "7"], "stored are 1, 2, 3, 4"),
        (["--length", "0.1", "--name", "stage_b"], "no stored averages of stage_b"),
    ],
)
def test_what_can_t_be_averaged_is_refused(arguments, message, stored, tmp_path):
    with pytest.raises(UserError, match=message):
        posthoc_main(["--run", str(stored.out), "--out", str(tmp_path / "x"), *arguments])
    assert not (tmp_path / "x").exists()
