"""Pipelines whose linear weights are int8: said, placed and counted as any other weights are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stages.int8
from cascade.errors import UserError
from cascade.evaluate.drawn import maker_of
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.memory import Workload, footprints
from stages.int8 import is_int8

WEIGHTS = Path(__file__).parents[3] / "weights"
PROMPTS = ["a red apple", "a blue fish"]


@pytest.fixture
def of_any_size(monkeypatch):
    """Round layers of the tiny model as well."""
    monkeypatch.setattr(stages.int8, "_MIN_WEIGHTS", 1)


def test_pictures_differ_a_little_and_say_why(tiny_model, of_any_size):
    plain = CascadePipeline(tiny_model, device="cpu")
    rounded = CascadePipeline(tiny_model, device="cpu", int8=True)
    assert is_int8(rounded.stage_c) and is_int8(rounded.stage_b) and not is_int8(rounded.stage_a)
    made = [one(PROMPTS, seed=7, progress=False) for one in (plain, rounded)]
    difference = (made[0].pixels - made[1].pixels).abs()
    assert 0 < float(difference.mean()) < 0.05
    said = [json.loads(one.metadata[0]["settings"])["dtype"] for one in made]
    assert said == ["float32", "float32; linear weights int8"]
    again = CascadePipeline(tiny_model, device="cpu", int8=True)(PROMPTS, seed=7, progress=False)
    assert torch.equal(again.pixels, made[1].pixels)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_wherever_the_weights_are_the_pictures_are_the_same(mode, tiny_model, of_any_size):
    pipeline = CascadePipeline(tiny_model, device="cpu", int8=True)
    stays = pipeline(PROMPTS, seed=7, progress=False).pixels
    pipeline.place(offload=mode)
    assert torch.equal(pipeline(PROMPTS, seed=7, progress=False).pixels, stays)
    pipeline.place()
    assert torch.equal(pipeline(PROMPTS, seed=7, progress=False).pixels, stays)


def test_a_plan_of_memory_counts_what_is_there_and_what_is_multiplied_out():
    sizes = {}
    for int8 in (False, True):
        one = CascadePipeline(WEIGHTS / "demo", device="cpu", int8=int8)
        work = Workload(one.spec.stage_c, one.spec.stage_b, (6, 6), (4, 32, 32), 36)
        sizes[int8] = footprints(
            one.stage_c, one.stage_b, one.stage_a, {"text": one.text_encoder}, one.dtypes, work
        )["stage_c"]
    assert sizes[True].weights < 0.45 * sizes[False].weights
    assert sizes[True].layer < sizes[False].layer
    assert sizes[True].working - sizes[False].working == 4 * 4 * 256 * 256


def test_a_model_that_would_not_gain_is_told_so(tiny_model):
    with pytest.raises(UserError, match="int8: Stage C has no linear layers large enough to gain"):
        CascadePipeline(tiny_model, device="cpu", int8=True)


def test_a_u_net_and_what_measures_it_take_it_too():
    maker = maker_of(
        str(WEIGHTS / "demo-koala"), None, unet=None, device="cpu", dtype="auto", int8=True
    )
    assert maker.dtype == "float32; linear weights int8"
    pipeline = maker.load()
    assert is_int8(pipeline.unet) and not is_int8(pipeline.autoencoder)
