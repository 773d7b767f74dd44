"""What a run spent adds up: to wall time, over resumes, and over kills."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from cascade.config import load_yaml
from cascade.evaluate.flops import FlopCounter
from train.callbacks.ledger import Ledger
from train.clock import PHASES, PhaseClock, process_began_s
from train.data.open import open_data
from train.flops import peak_flops
from train.reduction import HostGroup
from train.systems.stage_a import StageARun

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


@pytest.fixture
def lossy(tmp_path, monkeypatch) -> str:
    """A shard of 10 good pictures, 3 small ones, one cut off and one without a caption."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    rows: list[tuple[str, bytes]] = []
    for number in range(15):
        side = 16 if number >= 12 else 32
        buffer = io.BytesIO()
        Image.new("RGB", (side, side), (number, 0, 0)).save(buffer, "png")
        data = buffer.getvalue()
        rows += [(f"{number:02d}.png", data[: len(data) - 30] if number == 10 else data)]
        rows += [(f"{number:02d}.txt", b"x")] if number != 11 else []
    with tarfile.open(tmp_path / "lossy.tar", "w") as tar:
        for name, data in rows:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(tmp_path / "lossy.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_an_exact_run_left_out_is_told_over_a_resumption(workers, make_run, lossy, caplog):
    """The cut picture fails when its turn comes, once in three steps, or in place of itself."""
    data = {"shards": lossy, "mode": "exact", "size": 32, "folder": None, "batch_size": 5}
    data |= {"filters": {"min_size": 24}, "workers": workers, "max_broken_share": 0.9}
    expected = {"broken": 2, "filtered": 3, "dropped": 0}
    whole = make_run("stage_a", "whole", data=data)
    with caplog.at_level("INFO"):
        whole.start("--run.max_steps", 3)
    assert rows_of(whole)[-1]["left_out"] == expected
    [line] = [one for one in caplog.messages if "3 of 3 steps" in one]
    assert line.endswith("; left out: 2 broken, 3 filtered")
    halves = make_run("stage_a", "halves", data=data)
    halves.start("--run.max_steps", 2)
    halves.start("--run.max_steps", 6, "--resume")
    config = load_yaml(StageARun, halves.config).data
    loader = open_data(config).loader_from(0, 0, 1)
    met = sum(batch.lost["broken"] for batch in itertools.islice(loader, 6))
    assert met == loader.broken >= 2
    assert rows_of(halves)[-1]["left_out"] == {**expected, "broken": 1 + met}


def test_what_a_resampled_run_left_out_is_told_for_each_time_that_a_shard_is_drawn(make_run, lossy):
    data = {"shards": lossy, "mode": "resampled", "size": 32, "folder": None, "batch_size": 5}
    data |= {"filters": {"min_size": 24}, "max_broken_share": 0.9}
    run = make_run("stage_a", data=data)
    run.start("--run.max_steps", 4)  # two blocks of eleven pictures, two steps each
    left_out = [row["left_out"] for row in rows_of(run)]
    assert [one["filtered"] for one in left_out[:4]] == [3, 3, 6, 6]
    assert left_out[0]["broken"] >= 1 and left_out[3]["broken"] >= 2


def test_what_could_not_be_read_into_memory_is_told(make_run, tmp_path, shards):
    [shard] = Path(shards).parent.glob("*.tar")
    with tarfile.open(shard) as tar, tarfile.open(tmp_path / "less.tar", "w") as less:
        for member in tar:
            if member.name not in ("00.txt", "00.json"):
                less.addfile(member, tar.extractfile(member))
    run = make_run("stage_a", data={"shards": str(tmp_path / "less.tar")})
    run.start("--run.max_steps", 1)
    assert rows_of(run)[-1]["left_out"] == {"broken": 1, "filtered": 0, "dropped": 0}


def test_what_ranks_left_out_is_summed_at_every_step_and_the_set_s_is_not():
    class Two(HostGroup):
        def summed(self, values: Sequence[int]) -> list[int]:
            return [ours + other for ours, other in zip(values, (5, 0, 1), strict=True)]

    ledger = Ledger(lost={"filtered": 7}, ranks=Two())
    ledger._lost_here.update({"broken": 2})
    for _ in range(2):
        ledger._share_losses()
    assert ledger.lost() == {"broken": 12, "filtered": 7, "dropped": 2}
    again = Ledger(lost={"filtered": 7})
    again.load_state_dict(ledger.state_dict())
    assert again.lost() == ledger.lost()


@pytest.mark.parametrize("beside", [True, False])
def test_counting_operations_changes_nothing(beside, make_run, monkeypatch):
    """Neither of the step itself, nor of a copy beside it, as of a compiled one."""
    counted = make_run("stage_c", "counted", model={"dropout": 0.2})
    counted.start()
    plain = make_run("stage_c", "plain", model={"dropout": 0.2})
    monkeypatch.setattr("train.callbacks.ledger.is_compiled", lambda _: True)
    if not beside:
        monkeypatch.setattr("train.callbacks.ledger.count_beside", lambda *_: None)
    plain.start()
    assert counted.losses() == plain.losses()
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (counted, plain))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    wanted = [row["flops"] if beside else None for row in rows_of(counted)]
    assert [row["flops"] for row in rows_of(plain)] == wanted


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
