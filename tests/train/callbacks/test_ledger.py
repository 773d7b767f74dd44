"""What a run spent adds up: to wall time, over resumes, and over kills."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from cascade.evaluate.flops import FlopCounter
from train.clock import PHASES, PhaseClock, process_began_s
from train.flops import peak_flops

ROOT = Path(__file__).parents[3]


def rows_of(run) -> list[dict]:
    return [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]


def test_every_second_belongs_to_one_phase(monkeypatch):
    now_s = 10.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    clock = PhaseClock()
    now_s += 1
    clock.switch("data")
    now_s += 2
    with pytest.raises(RuntimeError, match="disk"), clock.within("checkpoint"):
        now_s += 4
        raise RuntimeError("disk")
    now_s += 8
    assert {k: v for k, v in clock.seconds().items() if v} == {
        "setup": 1.0,
        "data": 10.0,
        "checkpoint": 4.0,
    }


@pytest.mark.slow
def test_the_ledger_of_a_process_begins_with_its_imports(make_run):
    run = make_run("stage_c", run={"log_every_steps": 2})
    words = [run.kind, "--config", str(run.config), "--run.max_steps", "2"]
    started_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "train", *words], cwd=ROOT, check=True)
    wall_s = time.monotonic() - started_s
    spent_s = sum(sum(row["seconds"].values()) for row in rows_of(run))
    # The interpreter's own start and its end are nobody's; imports take far longer than both.
    assert wall_s / 2 < spent_s <= wall_s, (wall_s, spent_s)
    assert PhaseClock(process_began_s()).seconds()["setup"] < 1, "this process is no training"


@pytest.mark.parametrize("kind", ["stage_c", "stage_a"])
def test_the_ledger_of_a_run_adds_up_to_its_wall_time(kind, make_run):
    run = make_run(kind, run={"log_every_steps": 2})
    started_s = time.monotonic()
    run.start("--run.max_steps", 5)
    first_s = time.monotonic() - started_s
    started_s = time.monotonic()
    run.start("--run.max_steps", 7, "--resume")
    second_s = time.monotonic() - started_s
    rows = rows_of(run)
    spent_s = sum(sum(row["seconds"].values()) for row in rows)
    # What comes before the clock, the reading of the configuration, counts in a run this short.
    assert spent_s == pytest.approx(first_s + second_s, rel=0.02, abs=1.0)
    assert sum(row["device_seconds"] for row in rows) == pytest.approx(spent_s, abs=1e-2)
    assert [row["step"] for row in rows] == [2, 4, 5, 6, 7, 7][: len(rows)]
    assert rows[-1]["step"] == 7 and rows[-1]["samples"] == 7 * 4
    assert all(set(row["seconds"]) == set(PHASES) for row in rows)
    flops = [row["flops"] for row in rows]
    if kind == "stage_c":  # the same number of operations at each of the seven steps
        assert sum(flops) == pytest.approx(flops[0] / 2 * 7) and flops[0] > 0
    else:  # the discriminator joins in at the third
        assert flops[1] > 1.05 * flops[0] and sum(flops) == pytest.approx(flops[0] + 2.5 * flops[1])
    assert all(row["peak_memory_mib"] > 0 and row["energy_j"] is None for row in rows)
    assert sum(row["seconds"]["checkpoint"] for row in rows) > 0


def test_counting_operations_changes_nothing(make_run, monkeypatch):
    counted = make_run("stage_c", "counted", model={"dropout": 0.2})
    counted.start()
    plain = make_run("stage_c", "plain", model={"dropout": 0.2})
    monkeypatch.setattr("train.callbacks.ledger.is_compiled", lambda _: True)
    plain.start()
    assert counted.losses() == plain.losses()
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (counted, plain))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert [row["flops"] for row in rows_of(plain)] == [None] * len(rows_of(plain))


def test_the_flops_of_a_step_are_those_of_its_products(make_run):
    run = make_run("previewer", run={"log_every_steps": 1})
    run.start("--run.max_steps", 1)
    [first, *_] = rows_of(run)
    from cascade.checkpoints.files import load_network
    from stages.previewer import Previewer

    network = load_network(run.out / "previewer.safetensors", expect=Previewer)
    weights = sum(one.numel() for one in network.parameters() if one.dim() > 1)
    assert first["flops"] > 2 * 2 * weights  # forward and backward, at one place at least


def test_the_environment_holds_an_entry_for_each_start(make_run):
    run = make_run("previewer")
    run.start("--run.max_steps", 1)
    run.start("--run.max_steps", 2, "--resume")
    starts = json.loads((run.out / "environment.json").read_text())
    assert len(starts) == 2
    assert starts[0]["packages"]["torch"] == torch.__version__
    assert all(start["commit"] and start["machine"] and start["command"] for start in starts)


def test_our_count_is_torch_s_own_and_has_attention():
    x = torch.randn(2, 3, 40, 16, requires_grad=True)
    weight = torch.randn(16, 24, requires_grad=True)
    with FlopCounter() as ours:
        (x @ weight).square().sum().backward()
    with FlopCounterMode(display=False) as theirs:
        (x @ weight).square().sum().backward()
    assert ours.total == theirs.get_total_flops() == 3 * 2 * (2 * 3 * 40) * 16 * 24
    with FlopCounter() as ours:
        torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
    # Two products forward; backward one of them again, and four.
    assert ours.total == 7 * 2 * (2 * 3) * 40 * 40 * 16


def test_the_peak_of_a_processor_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
