from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cascade.errors import UserError, run_main
from cascade.evaluate.__main__ import main
from cascade.evaluate.cost import (
    ELSEWHERE,
    count_flops,
    count_parameters,
    measure_inference,
    parts_of,
    peak_memory,
    spread_of,
)
from cascade.evaluate.training_cost import cost_table, read_ledger, training_cost
from cascade.pipelines.cascade import CascadePipeline


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("inference", [False, True])
def test_flops_count_attention_by_part_in_inference_mode_as_well(inference: bool) -> None:
    parts: dict[str, nn.Module] = {"attention": Attention(), "conv": nn.Conv2d(3, 4, 3)}
    x, picture = torch.rand(2, 5, 8), torch.rand(2, 3, 6, 6)

    def run() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            parts["attention"](x)
            parts["conv"](picture)
            torch.rand(7, 3) @ torch.rand(3, 2)

    found = count_flops(parts, run)
    linear = 2 * (2 * 5) * 8 * 24
    attention = 2 * (2 * 2 * (2 * 5 * 5 * 4))  # scores and values, 2 batches of 2 heads
    assert found["attention"] == linear + attention
    assert found["conv"] == 2 * (2 * 4 * 4 * 4) * (3 * 3 * 3)
    assert found[ELSEWHERE] == 2 * 7 * 3 * 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in parts["attention"].modules())


def test_quartiles_are_those_of_the_repeats_and_one_slow_repeat_moves_no_median() -> None:
    found = spread_of([1.0, 2.0, 3.0, 4.0, 1000.0])
    assert (found.median, found.lower, found.upper, found.repeats) == (3.0, 2.0, 4.0, 5)
    assert spread_of([7.0]).upper == 7.0


def test_a_pipelines_cost_is_whole(tiny_model: Path) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu")
    calls = []

    def draw() -> dict[str, float]:
        calls.append(1)
        return pipeline(["a red apple"], seed=0, steps_c=2, steps_b=1, progress=False).seconds

    found = measure_inference(pipeline, draw, 1, warm_up=1, repeats=3)
    assert set(found.parameters) == {"text", "stage_c", "stage_b", "stage_a"}
    assert found.parameters == count_parameters(parts_of(pipeline))
    assert set(found.seconds) == {"text", "stage_c", "stage_b", "stage_a", "all"}
    stages = sum(found.seconds[name].median for name in ("stage_c", "stage_b", "stage_a"))
    assert 0 < stages < 1.5 * found.seconds["all"].median
    assert all(found.seconds[name].repeats == 3 for name in found.seconds)
    assert found.flops["stage_c"] > 0 and found.flops["stage_b"] > 0
    assert found.energy_j is None  # nothing tells it on a CPU
    assert len(calls) == 1 + 1 + 3 + 1  # warm-up, memory, clock, FLOPs


def test_twice_the_steps_are_twice_the_flops_of_a_stage(tiny_model: Path) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu")

    def flops(steps: int) -> float:
        def run() -> object:
            return pipeline(["a red apple"], seed=0, steps_c=steps, steps_b=1, progress=False)

        return count_flops(parts_of(pipeline), run)["stage_c"]

    once, twice, thrice = flops(1), flops(2), flops(3)
    assert twice - once == pytest.approx(thrice - twice)
    assert twice > 1.5 * once


def test_peak_memory_is_that_of_the_run_alone() -> None:
    found = peak_memory(lambda: torch.ones(64, 2**20).sum(), torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell a process's memory")
    assert found > 200 * 2**20


def ledger(folder: Path, *rows: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    common = {"step": 1, "flops": 1e9, "energy_j": None, "peak_memory_mib": 100}
    lines = [json.dumps({**common, **row}) for row in rows]
    (folder / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_ledgers_add_up_over_starts_and_the_teachers_line_stands_apart(tmp_path: Path) -> None:
    stage_c = ledger(
        tmp_path / "stage_c",
        {"samples": 64, "seconds": {"step": 10.0, "data": 1.0}, "device_seconds": 22.0},
        {"samples": 128, "seconds": {"step": 9.0, "data": 1.0}, "device_seconds": 20.0},
        # Killed and started again: spent again, progress is not made twice.
        {"samples": 96, "seconds": {"step": 5.0}, "device_seconds": 10.0, "peak_memory_mib": 300},
    )
    found = read_ledger(stage_c)
    assert found.samples == 128 and found.device_seconds == 52.0
    assert found.phase_seconds == {"step": 24.0, "data": 2.0}
    assert found.flops == 3e9 and found.energy_j is None and found.peak_memory_mib == 300
    assert found.price(36.0) == pytest.approx(0.52)
    teacher = ledger(
        tmp_path / "teacher", {"samples": 1000, "seconds": {"step": 7200.0}, "device_seconds": 7200}
    )
    cost = training_cost([stage_c, stage_c], [teacher])
    assert cost.device_seconds == 104.0 and cost.teacher_device_seconds == 7200.0
    lines = cost_table(cost, 2.0).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "stage_c",
        "stage_c",
        "all",
        "teacher: teacher",
        "with the teacher",
    ]
    assert lines[4].split("|")[3].strip() == "104.0" and lines[4].split("|")[5].strip() == "unknown"
    assert lines[-1].split("|")[-2].strip() == "4.06"


def test_the_pictures_of_a_teachers_set_are_added_up(tmp_path: Path) -> None:
    row = {"phase": "teacher", "seconds": {"teacher": 9.0}, "device_seconds": 9.0}
    made = ledger(tmp_path / "set", {**row, "samples": 256}, {**row, "samples": 100})
    assert read_ledger(made).samples == 356


def test_a_compiled_runs_flops_are_unknown_and_not_zero(tmp_path: Path) -> None:
    row = {"samples": 1, "seconds": {}, "device_seconds": 1.0}
    assert read_ledger(ledger(tmp_path / "r", row, {**row, "flops": None})).flops is None


def test_ledgers_that_are_none_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such ledger"):
        read_ledger(tmp_path)
    path = tmp_path / "ledger.jsonl"
    for text, words in (
        ("", "no rows"),
        ('{"samples": 1', "no rows"),
        ("{}", "samples is missing"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_ledger(path)


def test_a_line_that_a_kill_has_cut_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"samples": 1, "seconds": {}, "device_seconds": 1.0}
    run = ledger(tmp_path / "r", row)
    with open(run / "ledger.jsonl", "a", encoding="utf-8") as file:
        file.write('{"samples": 2, "sec')
    assert read_ledger(run).device_seconds == 1.0
    assert "line 2 is cut off" in caplog.text


def test_the_command_prints_both_kinds_of_cost(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ledger(tmp_path / "r", {"samples": 1, "seconds": {}, "device_seconds": 3600.0})
    words = ["cost", "--model", str(tiny_model), "--repeats", "2", "--warm-up", "1"]
    words += ["--device", "cpu", "--ledgers", str(run), "--price", "2.5"]
    assert run_main(lambda: main(words)) == 0
    printed = capsys.readouterr().out
    assert "| stage_c" in printed and "quartiles" in printed and "2.50" in printed
    for bad, line in (
        (["cost"], "nothing to measure"),
        (["cost", "--ledgers", str(tmp_path / "x")], "no such ledger"),
        (["cost", "--model", str(tiny_model), "--repeats", "0"], "--repeats must be at least 1"),
    ):
        assert run_main(lambda bad=bad: main(bad)) == 2  # type: ignore[misc]
        assert line in capsys.readouterr().err
