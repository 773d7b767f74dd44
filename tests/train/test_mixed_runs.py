"""Runs on real and generated pictures: resumed as whole, and they say what they saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.launchers import Part
from train.callbacks.stop import Stop
from train.data.precompute import precompute
from train.distill.factory import Factory
from train.distill.generate_config import GenerateConfig
from train.encode import FrozenPaths


@pytest.fixture
def generated(tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    """The tiny cascade's own pictures with a cache of them, as a further set."""
    (tmp_path / "prompts.txt").write_text("red apple\nblue fish\ngreen hat\n")
    out, cache = tmp_path / "generated", tmp_path / "generated_cache"
    options = GenerateConfig(str(tiny_model), str(tmp_path / "prompts.txt"), str(out), steps=1)
    Factory(options, Part()).run()
    model = str(tiny_model)
    precompute(f"{out}/*.tar", cache, FrozenPaths(text=f"{model}/text", compressor=model))
    return {"name": "teacher", "shards": f"{out}/*.tar", "folder": str(cache), "weight": 3.0}


def test_a_resumed_run_on_two_sets_equals_a_whole_one_and_counts_both(
    make_run, generated, shards, cache, monkeypatch
):
    held_out = {"shards": shards, "folder": str(cache), "every_steps": 3, "samples": 4}
    sections = {"data": {"mix": [generated]}, "validation": held_out}
    whole = make_run("stage_c", "whole", **sections)
    assert whole.start("--run.max_steps", 7) == 0
    halves = make_run("stage_c", "halves", **sections)
    steps = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "seconds_left", lambda self: 3 - next(steps))
        assert halves.start("--run.max_steps", 7) == 0
    assert halves.start("--run.max_steps", 7, "--resume") == 0
    one, two = (load_file(run.out / "stage_c.safetensors") for run in (whole, halves))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    for run in (whole, halves):
        rows = [json.loads(line) for line in (run.out / "ledger.jsonl").read_text().splitlines()]
        assert rows[-1]["samples"] == 28
        assert rows[-1]["samples_by_set"] == {"own": 7, "teacher": 21}


def test_a_cache_of_other_weights_is_refused_whichever_set_it_is_of(
    make_run, generated, tiny_unet, tmp_path
):
    wrong = {**generated, "folder": str(tmp_path / "none")}
    run = make_run("stage_c", data={"mix": [wrong]})
    with pytest.raises(ValueError, match=r"none/text\.safetensors: not there"):
        run.start()
