"""Whole U-Net pipelines against diffusers: a folder that it saved, opened here, the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cascade.diffusion.samplers import StepInfo
from cascade.pipelines import unet as pipeline_module
from cascade.pipelines.results import UNetPictures
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings
from cascade.pipelines.unet_sampling import sample_unet
from cascade.pipelines.unet_spec import UNetSampling
from tests.reference.unet_toys import save_pipeline, scheduler

pytestmark = pytest.mark.reference

PROMPTS = ["a red cat", "a blue hat on a box"]
STEPS = 4


class SharedNoise:
    """Draws for a whole batch from one generator, in the order in which diffusers draws."""

    def __init__(self, seeds: Sequence[int], stream: str) -> None:
        self.count = len(seeds)
        self.generator = torch.Generator().manual_seed(5)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn((self.count, *shape), generator=self.generator)

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unets")
    known: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in known:
            known[kind] = folder / kind, save_pipeline(folder / kind, kind)
        return known[kind]

    return get


def theirs(pipeline: Any, arguments: dict[str, Any]) -> tuple[list[Tensor], np.ndarray]:
    steps: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return {}

    images = pipeline(
        prompt=PROMPTS,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
        callback_on_step_end=keep,
        **arguments,
    ).images
    return steps, images


def ours(
    folder: Path, settings: UNetSettings, monkeypatch: Any, sampling: UNetSampling
) -> tuple[list[Tensor], list[float], UNetPictures]:
    """Return the latents after every step, the times they are at, and the pictures."""
    pipeline = UNetPipeline(folder, device="cpu")
    pipeline.spec = replace(pipeline.spec, sampling=sampling)
    infos: list[StepInfo] = []

    def sample(*positional: Any, on_step: Any, **named: Any) -> Tensor:
        return sample_unet(*positional, on_step=infos.append, **named)

    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    monkeypatch.setattr(pipeline_module, "sample_unet", sample)
    output = pipeline(PROMPTS, settings, batch_size=2)
    steps = [info.x_t for info in infos[1:]] + [output.latents]
    return steps, [info.t for info in infos[1:]] + [0.0], output


CASES = [
    # kind, sampler, spacing, guidance, negative prompt, (height, width), prediction
    ("sdxl", "euler", "leading", 5.0, "", (16, 16), "epsilon"),
    ("sdxl", "euler", "trailing", 3.5, "a box", (16, 24), "epsilon"),
    ("sdxl", "euler", "linspace", 1.0, "", (24, 16), "v"),
    ("sdxl", "euler_ancestral", "trailing", 1.0, "", (16, 16), "epsilon"),
    ("sdxl", "euler_ancestral", "leading", 3.0, "", (16, 24), "epsilon"),
    ("sdxl", "ddim", "leading", 5.0, "a hat", (16, 16), "epsilon"),
    ("sdxl", "ddim", "trailing", 4.0, "", (16, 24), "v"),
    ("sdxl", "dpmpp_2m", "leading", 5.0, "", (16, 16), "epsilon"),
    ("sdxl", "dpmpp_2m", "trailing", 2.0, "", (16, 24), "epsilon"),
    ("sdxl", "dpmpp_2m", "linspace", 5.0, "a hat", (16, 16), "v"),
    ("sdxl", "lcm", "leading", 1.0, "", (16, 16), "epsilon"),
    ("sdxl", "lcm", "leading", 2.0, "", (16, 24), "epsilon"),
    ("sd", "euler", "leading", 7.5, "", (16, 16), "epsilon"),
    ("sd", "euler", "trailing", 1.0, "", (24, 16), "epsilon"),
    ("sd", "euler_ancestral", "linspace", 7.5, "a box", (16, 16), "epsilon"),
    ("sd", "ddim", "leading", 7.5, "", (16, 24), "v"),
    ("sd", "dpmpp_2m", "linspace", 7.5, "", (16, 16), "epsilon"),
    ("sd", "lcm", "leading", 1.0, "", (16, 16), "epsilon"),
]


@pytest.mark.parametrize(
    ("kind", "sampler", "spacing", "guidance", "negative", "size", "prediction"), CASES
)
def test_latents_of_every_step_and_pixels_are_those_of_diffusers(
    kind: str,
    sampler: str,
    spacing: str,
    guidance: float,
    negative: str,
    size: tuple[int, int],
    prediction: str,
    saved: Any,
    monkeypatch: Any,
) -> None:
    folder, pipeline = saved(kind)
    pipeline.scheduler = scheduler(sampler, spacing, prediction)
    height, width = size
    arguments: dict[str, Any] = {"height": height, "width": width, "guidance_scale": guidance}
    arguments["negative_prompt"] = [negative] * 2 if negative else None
    told: dict[str, Any] = {}
    if kind == "sdxl":
        told = {"original_size": (40, 48), "crop": (3, 5), "target_size": (20, 24)}
        crop = told["crop"]
        arguments |= {**told, "crops_coords_top_left": crop}
        del arguments["crop"]
        # diffusers tells the other side the same, unless it is told otherwise.
    latents, images = theirs(pipeline, arguments)

    # The folder's own scheduler says another prediction, and nothing of DDIM's end.
    own = UNetPipeline(folder, device="cpu").spec.sampling
    sampling = replace(own, prediction=prediction, ends_clean=False)  # type: ignore[arg-type]
    settings = UNetSettings(
        negative_prompt=negative,
        seed=0,
        steps=STEPS,
        guidance=guidance,
        sampler=sampler,
        spacing=None if sampler == "lcm" else spacing,
        width=width,
        height=height,
        **told,
    )
    steps, times, output = ours(folder, settings, monkeypatch, sampling)
    assert len(steps) == len(latents) == STEPS
    schedule = sampling.schedule
    for step, time, wanted in zip(steps, times, latents, strict=True):
        if sampler.startswith("euler"):
            step = step / schedule(torch.tensor(time))[0]
        scale = float(wanted.std())
        torch.testing.assert_close(step, wanted, atol=2e-5 * max(1.0, scale), rtol=1e-4)
    difference = np.abs(output.pixels.permute(0, 2, 3, 1).numpy() - images).max()
    assert difference < 1e-4
    assert images.std() > 0.01, "the pictures show nothing to compare"
