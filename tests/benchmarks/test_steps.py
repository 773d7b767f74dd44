from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.steps import find_students, mean_and_spread, psnr, ways_of
from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.few_steps import distilled_metadata
from cascade.pipelines.spec import StageSampling
from stages.stage_c import StageC


def test_passes_are_counted_as_they_run() -> None:
    network: nn.Module = nn.Identity()
    plain = StageSampling("dpmpp_2m", 20, 4.0)
    times = (1.0, 0.9, 0.5, 0.2, 0.0)
    few = StageSampling("lcm", 4, 4.0, times=times, guidance_range=(1.0, 6.0), max_steps=8)
    ways = list(ways_of((network, plain), ((network,), few), [2, 20], [1, 4], None))  # type: ignore[arg-type]
    found = [(one.name, one.sampling.steps, one.sampling.guidance, one.passes) for one in ways]
    assert found == [
        ("plain", 2, 1.0, 2),
        ("plain", 20, 1.0, 20),
        ("plain", 2, 4.0, 4),
        ("plain", 20, 4.0, 40),
        ("student", 1, 4.0, 1),
        ("student", 4, 4.0, 4),
    ]
    assert [one.sampling.times for one in ways[-2:]] == [(), times]
    told: list[object] = [[], [2], None, [2.0, 3.0], (1.0, 0.7, 0.0)]
    ways = list(ways_of((network, plain), ((network,) * 3, few), *told))  # type: ignore[arg-type]
    assert [(one.sampling.guidance, one.sampling.times, one.passes) for one in ways] == [
        (2.0, (), 2),
        (2.0, (1.0, 0.7, 0.0), 2),
        (3.0, (), 2),
        (3.0, (1.0, 0.7, 0.0), 2),
    ]
    assert {(one.name, len(one.networks)) for one in ways} == {("3 students", 3)}


def test_a_student_is_found_by_what_its_file_says(tiny_model: Path, tmp_path: Path) -> None:
    pipeline = CascadePipeline.from_folder(tiny_model, device="cpu", dtype="float32")
    assert find_students([], pipeline, "stage_c") is None
    with pytest.raises(UserError, match="does not say its steps"):
        find_students([tiny_model], pipeline, "stage_c")
    few = StageSampling("lcm", 4, 1.0, guidance_range=(1.0, 1.0), max_steps=8, prediction="v")
    said = {"cascade_diffusion": json.dumps({"prediction": "v"})} | distilled_metadata(few)
    network = load_network(tiny_model / "stage_c.safetensors", expect=StageC)
    save_network(tmp_path / "stage_c.safetensors", network, metadata=said)
    found = find_students([tmp_path, tmp_path / "stage_c.safetensors"], pipeline, "stage_c")
    assert found is not None and found[1] == replace(few) and len(found[0]) == 2
    other = distilled_metadata(replace(few, steps=2))
    save_network(tmp_path / "two.safetensors", network, metadata={**said, **other})
    with pytest.raises(UserError, match=r"two\.safetensors: is sampled otherwise than"):
        find_students([tmp_path, tmp_path / "two.safetensors"], pipeline, "stage_c")


def test_a_row_of_several_students_is_their_mean_and_standard_deviation() -> None:
    assert mean_and_spread([77.0], "{:.1f} %") == "77.0 %"
    assert mean_and_spread([76.0, 77.0, 78.0], "{:.1f} %") == "77.0 % ± 1.0"
    assert mean_and_spread([0.02, 0.04], "{:.4f}") == "0.0300 ± 0.0141"


def test_pictures_are_compared_in_decibels() -> None:
    grey = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    other = grey.clone()
    assert psnr(grey, other) == 99.0
    other[:] += 51  # a fifth of the range
    assert psnr(grey, other) == pytest.approx(20 * math.log10(5))
