"""The shipped models draw what they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade.evaluate.clip_scorer import ClipScorer
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_plan import UNetSettings

WEIGHTS = Path(__file__).parents[1] / "weights"
DEMO, KOALA = WEIGHTS / "demo", WEIGHTS / "demo-koala"
# Unlike in style, colour and kind, as a model of any size must tell them apart.
PROMPTS = [
    "a 3D render of a red apple",
    "a flat vector illustration of a blue fish",
    "a black and white line icon of a bicycle",
    "a photo of a banana",
    "a 3D render of a green leaf",
    "a photo of a t-shirt",
    "a flat vector illustration of a yellow star",
    "a 3D render of a purple umbrella",
]


@pytest.mark.slow
def test_a_picture_is_found_by_its_prompt() -> None:
    drawn = CascadePipeline.from_folder(DEMO, device="cpu")(PROMPTS, seed=0)
    _check(drawn.pixels)


@pytest.mark.slow
@pytest.mark.parametrize("unet", [None, KOALA / "teacher.safetensors"], ids=["student", "teacher"])
def test_a_picture_of_a_unet_is_found_by_its_prompt(unet: Path | None) -> None:
    pipeline = UNetPipeline(open_unet_source(KOALA, unet), device="cpu")
    _check(pipeline(PROMPTS, UNetSettings(seed=0)).pixels)


def _check(pixels: torch.Tensor) -> None:
    assert pixels.shape == (len(PROMPTS), 3, 128, 128)
    scorer = ClipScorer.from_folder(DEMO / "text")
    alike = scorer.embed_pictures(pixels) @ scorer.embed_prompts(PROMPTS).T
    found = int((alike.argmax(dim=1) == torch.arange(len(PROMPTS))).sum())
    assert found >= 6, f"{found} of {len(PROMPTS)} are nearest to their own prompt"
