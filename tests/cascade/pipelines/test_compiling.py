from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.compiling import CompileReport, compile_pipeline
from cascade.pipelines.plan import Settings, make_plan
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan
from tests.unet_models import save_tiny


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr("cascade.compiled.COMPILE_BACKEND", counter)
    return counter


def pixels(pipeline: CascadePipeline, size: int) -> torch.Tensor:
    settings = Settings(seed=0, width=size, height=size, steps_c=3)
    (picture,) = pipeline.run(make_plan(pipeline.spec, "a red apple", settings))
    return picture.pixels


@pytest.mark.slow
def test_each_kind_of_block_is_compiled_once_and_once_more_for_all_other_sizes(
    tiny_model: Path, counter: CompileCounterWithBackend
) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu", dtype="float32")
    plain = pixels(pipeline, 32), pixels(pipeline, 48)
    plan = make_plan(pipeline.spec, "a red apple", Settings(seed=0))
    report = compile_pipeline(pipeline, plan)
    # Stage C: blocks with and without a skip, and the change of levels; Stage B: fine blocks with
    # and without a skip, coarse ones, and the samplers down and up; Stage A: two levels.
    kinds = counter.frame_count
    assert kinds == 3 + 5 + 2
    torch.testing.assert_close(pixels(pipeline, 32), plain[0], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == kinds, "nothing of the plan was left to compile"
    torch.testing.assert_close(pixels(pipeline, 48), plain[1], atol=1e-5, rtol=1e-5)
    twice = counter.frame_count
    assert twice <= 2 * kinds
    pixels(pipeline, 64)
    pixels(pipeline, 40)
    assert counter.frame_count == twice, "a third and a fourth size compile nothing"
    assert (
        set(report.plain_s)
        == set(report.compiled_s)
        == {
            "text",
            "stage_c",
            "stage_b",
            "stage_a",
        }
    )


def test_the_report_says_from_how_many_pictures_on_it_pays() -> None:
    report = CompileReport(30.0, {"stage_c": 2.0, "stage_b": 1.0}, {"stage_c": 1.0, "stage_b": 0.5})
    assert report.describe() == (
        "compiled in 30 s: a picture takes 1.50 s, 3.00 s without; it pays from 20 pictures on"
    )
    assert replace(report, compiled_s={"stage_c": 4.0}).describe().endswith("it does not pay here")


def test_weights_that_come_and_go_are_not_compiled(tiny_model: Path) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu", offload="model")
    plan = make_plan(pipeline.spec, "a red apple", Settings(seed=0))
    with pytest.raises(UserError, match="leave --offload and --vram out"):
        compile_pipeline(pipeline, plan)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_a_compiled_u_net_draws_the_same(
    kind: str, tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    pipeline = UNetPipeline(save_tiny(tmp_path / "model", kind), device="cpu")  # type: ignore[arg-type]
    settings = UNetSettings(seed=0, steps=3)
    plain = pipeline("a red apple", settings).pixels
    report = compile_pipeline(pipeline, make_unet_plan(pipeline.spec, "a red apple", settings))
    compiled = counter.frame_count
    assert compiled > 0 and set(report.plain_s) == {"text", "unet", "autoencoder"}
    torch.testing.assert_close(pipeline("a red apple", settings).pixels, plain, atol=1e-5, rtol=0)
    assert counter.frame_count == compiled
