"""The benchmark of sampling does the same work on all sides; what it measures is not checked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import sampling, sampling_measure, sampling_sides, start_up
from benchmarks.load import SMALL
from benchmarks.sampling_aims import judge
from benchmarks.sampling_measure import Case, Row
from benchmarks.sampling_models import MODELS, CascadeModel, Model, UNetModel
from benchmarks.sampling_sides import HERE, THEIRS, Side
from cascade.errors import UserError, run_main
from cascade.evaluate.cost import spread_of
from cascade.pipelines.unet_spec import UNetSampling
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c_v2 import StageCV2Config
from stages.unet.config import UNetConfig

pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

CPU = torch.device("cpu")
V3 = CascadeModel(
    "tiny v3",
    SMALL["prior_lite"],
    SMALL["decoder_lite"],
    SMALL["vqgan"],
    pixels_per_cell=16.0,
    guidance_b=1.1,
    tokens=5,
    size=64,
)
V2 = CascadeModel(
    "tiny v2",
    StageCV2Config(hidden_channels=16, num_blocks=2, num_heads=2, text_channels=12),
    StageBV2Config(
        cond_channels=20,
        hidden_channels=(8, 16),
        num_heads=(0, 2),
        num_blocks=(1, 1),
        reads_compressed=(False, True),
        text_channels=12,
        dropout=(0.0, 0.0),
    ),
    SMALL["vqgan"],
    pixels_per_cell=16.0,
    tokens=5,
    size=64,
)
UNET = UNetModel(
    "tiny U-Net",
    UNetConfig(
        channels=(32, 64),
        num_heads=(2, 4),
        down_depths=((0,), (1,)),
        mid_depth=1,
        up_depths=((1, 2), (0, 0)),
        text_channels=24,
        text_pooled_channels=20,
        size_channels=8,
        norm_groups=8,
    ),
    UNetSampling(spacing="trailing", steps=4, guidance=3.5),
    AutoencoderKLConfig(channels=(16, 32), blocks_per_level=1, norm_groups=8, scale=0.13025),
    tokens=5,
    size=32,
)
TINY: dict[str, Model] = {"v3": V3, "v2": V2, "unet": UNET}


class SharedNoise:
    """Draws for a whole batch from one generator, in the order in which diffusers draws."""

    def __init__(self, seeds: Sequence[int], stream: str) -> None:
        self.count = len(seeds)
        self.generator = torch.Generator().manual_seed(seeds[0])

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn((self.count, *shape), generator=self.generator)

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models in place of all others, and a small matrix for the rate."""
    for key in list(MODELS):
        monkeypatch.delitem(MODELS, key)
    for key, model in TINY.items():
        monkeypatch.setitem(MODELS, key, lambda model=model: model)
    monkeypatch.setattr(sampling_measure, "_RATE_SIDE", {"cpu": 64})

    def peak_memory(run: Any, device: torch.device) -> int:
        run()
        return 1  # measuring it collects garbage, which is slow where many modules are loaded

    monkeypatch.setattr(sampling_measure, "peak_memory", peak_memory)


def test_a_run_has_all_rows_that_agree_and_its_json_reads_back(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    told = ["--dtype", "float32,bfloat16", "--repeats", "2", "--start-up", "0", "--batch-size", "2"]
    told += ["--steps-c", "3", "--steps-b", "2", "--loop-steps", "2", "--json", str(path)]
    assert run_main(lambda: sampling.main([*told, "--device", "cpu"])) == 0
    printed = capsys.readouterr().out
    assert "seed 0, commit " in printed and "diffusers 0." in printed and "aims" in printed
    content = json.loads(path.read_text())
    assert content["seed"] == "0" and content["matmul_flops_per_s"].keys() == {
        "float32",
        "bfloat16",
    }
    rows = content["rows"]
    cascade, unet = (
        ["Stage C", "Stage B", "Stage A", "end to end"],
        ["U-Net", "autoencoder", "end to end"],
    )
    for key, parts in (("v3", cascade), ("v2", cascade), ("unet", unet)):
        for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.06)):
            for side in (HERE, THEIRS):
                found = [r for r in rows if (r["key"], r["dtype"], r["side"]) == (key, dtype, side)]
                assert [row["part"] for row in found] == parts
                assert all(0 <= row["difference"] < bound for row in found)
                assert all(row["copied_bytes"] == 0 < row["shared_bytes"] for row in found)
                whole = found[-1]
                assert whole["flops"] == sum(row["flops"] for row in found[:-1]) > 0
                assert whole["all_s"][1] == pytest.approx(sum(r["all_s"][1] for r in found[:-1]))
                assert whole["times_diffusers"] > 0 and len(whole["all_s"]) == 2
    stage_c = next(row for row in rows if row["part"] == "Stage C")
    assert (stage_c["steps"], stage_c["steps_run"], stage_c["batch_size"]) == (3, 2, 2)
    assert "computed from 2 of 3 steps" in printed
    differing = [row["difference"] for row in rows if row["side"] == HERE]
    assert max(differing) > 0  # they are two programs, not one called twice


@pytest.mark.parametrize(
    ("key", "name"), [("v3", "stage_c"), ("v3", "stage_b"), ("v2", "stage_c"), ("unet", "unet")]
)
def test_both_loops_end_at_the_same_latents(
    key: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_sides, "PictureNoise", SharedNoise)
    model = TINY[key]
    case = Case(key, model.size or 0, 2, torch.float32, repeats=1)
    part = sampling_measure._build(case, model, name, model.builders()[name], CPU, 3, None)
    with torch.inference_mode():
        here, theirs = (part.sides[side].loop(4, None) for side in (HERE, THEIRS))
    assert (here - theirs).abs().max() < 1e-3 * theirs.std()
    assert theirs.std() > 0.1


def test_predictions_of_other_weights_are_an_error(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = sampling_measure.same_in_diffusers

    def other(ours: Any) -> Any:
        theirs = same(ours)
        next(theirs.parameters()).data = torch.ones_like(next(theirs.parameters()))
        return theirs

    monkeypatch.setattr(sampling_measure, "same_in_diffusers", other)
    told = ["--models", "unet", "--repeats", "1", "--steps", "1", "--start-up", "0"]
    assert run_main(lambda: sampling.main([*told, "--device", "cpu"])) == 1
    assert "tiny U-Net, U-Net, here: predictions differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (["--models", "stable_cascade_lit"], "did you mean 'stable_cascade_lite'"),
        (["--models", ""], "--models"),
        (["--dtype", "float8"], "--dtype 'float8'"),
        (["--size", "500"], "multiples of 128"),
        (["--size", "large"], "whole numbers"),
        (["--batch-size", "0"], "at least 1"),
        (["--steps-c", "0"], "--steps-c 0"),
        (["--start-up", "-1"], "--start-up -1"),
        (["--json", "no/such/folder.json"], "its folder is not there"),
        (["--device", "gpu"], "--device gpu"),
        (["--quick", "--models", "sdxl"], "--models 'sdxl': of demo, "),
        (["--quick", "--dtype", "float32"], "--quick has its own --dtype"),
        (["--sizes", "512"], "did you mean --size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    told: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda: sampling.main(told)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


def test_the_steps_that_are_left_out_cost_what_later_steps_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]

    def loop(steps: int, mark: Any) -> Tensor:
        for step in range(steps):
            now[0] += 1.0 if step else 5.0  # the first prepares
            if mark is not None:
                mark()
        return torch.zeros(1)

    monkeypatch.setattr(sampling_measure.time, "perf_counter", lambda: now[0])
    side = Side(lambda: torch.zeros(1), loop)
    for steps_run in (2, 4, 10):
        assert sampling_measure.loop_seconds(side, 10, steps_run, CPU) == pytest.approx(14.0)
    assert sampling_measure.loop_seconds(side, 3, 1, CPU) == pytest.approx(15.0)


@pytest.mark.parametrize(("key", "name"), [("v3", "stage_c"), ("v2", "stage_b"), ("unet", "unet")])
def test_what_is_done_once_a_picture_is_counted_once(key: str, name: str) -> None:
    model = TINY[key]
    counts = []
    for steps in (1, 2, 3):
        case = Case(key, model.size or 0, 1, torch.float32, 1, 0, steps, steps, steps)
        part = sampling_measure._build(case, model, name, model.builders()[name], CPU, 0, None)
        counts.append(part.flops)
    assert counts[2] - counts[1] == counts[1] - counts[0]
    assert counts[0] > counts[1] - counts[0] > 0


def row(**changes: Any) -> Row:
    plain = Row(
        key="stable_cascade_lite",
        model="Stable Cascade lite",
        part="end to end",
        px=512,
        batch_size=1,
        dtype="bfloat16",
        side=HERE,
        parameters=1,
        steps=31,
        steps_run=31,
        seconds=spread_of([1.0]),
        least_s=1.0,
        all_s=(1.0,),
        times_diffusers=1.4,
        flops=1.0,
        roofline_share=0.5,
        peak_bytes=100_000_000,
        difference=0.0,
        shared_bytes=1,
        copied_bytes=0,
    )
    return replace(plain, **changes)


def test_aims_are_held_missed_or_not_measured_by_the_rows() -> None:
    part = row(part="Stage A", times_diffusers=1.2, peak_bytes=200_000_000)
    rows = [row(), part, row(part="Stage A", side=THEIRS, times_diffusers=1.0)]
    started = [start_up.StartUp(start_up.HELP, spread_of([0.7]))]
    found = {aim.text: aim for aim in judge(rows, started, "cpu")}
    told = {text.split(" ")[0] + " " + text.split(",")[-1]: aim for text, aim in found.items()}
    assert told["1.3  Stable Cascade lite at 512 px end to end"].holds is True
    assert told["1.5  the demonstration end to end"].holds is None
    stage_a = told["1.5  published Stage A"]
    assert stage_a.holds is False and "Stage A, 512 px, batch 1, bfloat16: 1.20" in stage_a.found
    assert told["never  any network"].holds is True
    [memory] = [aim for text, aim in found.items() if text.startswith("peak memory")]
    assert memory.holds is False and "200 MB against 100" in memory.found
    assert found["sample.py --help below 0.5 s"].holds is False
    assert found["import of the pipeline below 2.5 s"].holds is None
    computed = judge([row(steps_run=4, times_diffusers=1.29)], [], "cpu")[0]
    assert computed.holds is False and computed.found.endswith("1.29, computed")


def test_aims_on_a_gpu_are_others() -> None:
    full = {"key": "stable_cascade_full", "px": 1024}
    rows = [
        row(**full, times_diffusers=2.5, roofline_share=0.5),
        row(**full, side="diffusers, compiled", seconds=spread_of([1.2])),
    ]
    eager, compiled, roofline, lite, *_ = judge(rows, [], "cuda")
    assert eager.holds is True
    assert compiled.holds is False and compiled.found.endswith("1.20")
    assert roofline.holds is False and roofline.found.endswith("2.00 times")
    assert lite.holds is None


def test_a_process_that_fails_is_one_line() -> None:
    assert start_up._seconds(["-c", "pass"]) > 0
    with pytest.raises(UserError, match=r"failed: ZeroDivisionError"):
        start_up._seconds(["-c", "1 / 0"])
    [_title, line] = start_up.table([start_up.StartUp("import", spread_of([1.0, 2.0, 9.0]))])
    assert line.split() == ["import", "2.00", "1.50", "to", "5.50"]


def test_each_side_works_in_its_own_memory_and_is_told_before_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Huge pages of a fresh tensor, as the system counts them, hand over with the sides."""
    script = (
        "from cascade.cpu_memory import tune_cpu_memory\ntune_cpu_memory()\n"
        "import re, torch\nfrom benchmarks.sampling_memory import SideMemory\n"
        "def huge():\n"
        "    text = open('/proc/self/smaps_rollup').read()\n"
        "    return int(re.search(r'AnonHugePages: *([0-9]+)', text)[1]) // 1024\n"
        "memory, found = SideMemory('own'), []\n"
        "for side in ('here', 'diffusers', 'here, compiled', 'diffusers, compiled'):\n"
        "    memory.give(side)\n"
        "    before = huge()\n"
        "    tensor = torch.ones(64, 2**20)\n"
        "    found.append(huge() - before)\n"
        "    del tensor\n"
        "print(*found)\n"
    )
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[madvise]" not in setting.read_text():
        pytest.skip("this system gives huge pages to all, or to none")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    ours, theirs, ours_again, theirs_again = (int(word) for word in said.split())
    assert ours > 200 and ours_again > 200, "of 256 MB"
    assert theirs < 20 and theirs_again < 20
