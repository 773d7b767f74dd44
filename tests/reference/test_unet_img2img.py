"""U-Nets from a picture against diffusers: the same folder, picture, samples and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.diffusion.samplers import StepInfo
from cascade.pipelines import unet as pipeline_module
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan
from cascade.pipelines.unet_sampling import sample_unet
from tests.reference.unet_toys import save_pipeline, scheduler

pytestmark = pytest.mark.reference

PROMPTS = ["a red cat", "a blue hat on a box"]
SEEDS = [5, 6]


class OwnNoise:
    """One generator a picture for all that is drawn of it, as diffusers has it."""

    generators: ClassVar[dict[int, torch.Generator]] = {}

    def __init__(self, seeds: Sequence[int], stream: str) -> None:
        for seed in seeds:
            self.generators.setdefault(seed, torch.Generator().manual_seed(seed))
        self.own = [self.generators[seed] for seed in seeds]

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=one) for one in self.own])

    def randn_like(self, x: Tensor) -> Tensor:
        return self.randn(x.shape[1:])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import diffusers

    folder = tmp_path_factory.mktemp("unets")
    known: dict[str, tuple[Path, Any]] = {}

    def get(kind: str) -> tuple[Path, Any]:
        if kind not in known:
            pipeline = save_pipeline(folder / kind, kind)
            name = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
            pipeline = getattr(diffusers, f"{name}Img2ImgPipeline").from_pipe(pipeline)
            pipeline.set_progress_bar_config(disable=True)
            pipeline.watermark = None
            known[kind] = folder / kind, pipeline
        return known[kind]

    return get


def picture(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    levels = np.stack([x, y, (x - y) ** 2], axis=-1) * 255
    return Image.fromarray(levels.astype(np.uint8))


CASES = [
    # kind, sampler, spacing, steps, strength, guidance, (width, height), prediction
    ("sdxl", "euler", "leading", 5, 0.65, 5.0, (16, 16), "epsilon"),
    ("sdxl", "euler", "trailing", 4, 1.0, 3.5, (24, 16), "epsilon"),
    ("sdxl", "euler", "linspace", 4, 0.5, 1.0, (16, 24), "v"),
    ("sdxl", "euler_ancestral", "trailing", 5, 0.7, 2.0, (16, 16), "epsilon"),
    ("sdxl", "ddim", "leading", 5, 0.65, 5.0, (16, 24), "epsilon"),
    ("sdxl", "ddim", "trailing", 4, 0.9, 1.0, (16, 16), "v"),
    ("sdxl", "dpmpp_2m", "leading", 6, 0.65, 5.0, (16, 16), "epsilon"),
    ("sdxl", "dpmpp_2m", "trailing", 5, 0.99, 2.0, (24, 16), "epsilon"),
    ("sdxl", "lcm", "leading", 4, 0.8, 1.0, (16, 16), "epsilon"),
    ("sd", "euler", "leading", 5, 0.65, 7.5, (24, 16), "epsilon"),
    ("sd", "euler_ancestral", "linspace", 5, 0.8, 7.5, (16, 16), "epsilon"),
    ("sd", "ddim", "leading", 5, 0.65, 7.5, (16, 16), "epsilon"),
    ("sd", "ddim", "leading", 4, 1.0, 3.0, (16, 24), "v"),
    ("sd", "dpmpp_2m", "linspace", 6, 0.5, 7.5, (16, 16), "epsilon"),
    ("sd", "dpmpp_2m", "trailing", 50, 0.58, 2.0, (16, 16), "epsilon"),
    ("sd", "lcm", "leading", 8, 0.3, 1.0, (16, 16), "epsilon"),
]


@pytest.mark.parametrize(
    ("kind", "sampler", "spacing", "steps", "strength", "guidance", "size", "prediction"), CASES
)
def test_latents_of_every_step_and_pixels_are_those_of_diffusers(
    kind: str,
    sampler: str,
    spacing: str,
    steps: int,
    strength: float,
    guidance: float,
    size: tuple[int, int],
    prediction: str,
    saved: Any,
    monkeypatch: Any,
) -> None:
    folder, theirs = saved(kind)
    theirs.scheduler = scheduler(sampler, spacing, prediction)
    wanted: list[Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted.append(tensors["latents"].clone())
        return {}

    images = theirs(
        prompt=PROMPTS,
        image=picture(*size),
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="np",
        callback_on_step_end=keep,
    ).images

    pipeline = UNetPipeline(folder, device="cpu")
    # The folder's own scheduler says another prediction, and nothing of DDIM's end.
    sampling = replace(pipeline.spec.sampling, prediction=prediction, ends_clean=False)  # type: ignore[arg-type]
    pipeline.spec = replace(pipeline.spec, sampling=sampling)
    infos: list[StepInfo] = []

    def sample(*positional: Any, on_step: Any, **named: Any) -> Tensor:
        return sample_unet(*positional, on_step=infos.append, **named)

    monkeypatch.setattr(OwnNoise, "generators", {})
    monkeypatch.setattr(pipeline_module, "PictureNoise", OwnNoise)
    monkeypatch.setattr(pipeline_module, "sample_unet", sample)
    settings = UNetSettings(
        seeds=SEEDS,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        spacing=None if sampler == "lcm" else spacing,
        width=size[0],
        height=size[1],
    )
    given = PictureInput(picture(*size), "img2img", strength=strength)
    plan = make_unet_plan(pipeline.spec, PROMPTS, settings, picture=given)
    output = pipeline.make(plan, batch_size=2)
    own = [info.x_t for info in infos[1:]] + [output.latents]
    times = [info.t for info in infos[1:]] + [0.0]

    assert len(own) == len(wanted) == int(steps * strength)
    for latents, time, reference in zip(own, times, wanted, strict=True):
        if sampler.startswith("euler"):
            latents = latents / sampling.schedule(torch.tensor(time))[0]
        away = float((latents - reference).abs().max() / reference.std())
        assert away < 1e-4, f"{away:.1e} of a deviation away at t = {time}"
    assert np.abs(output.pixels.permute(0, 2, 3, 1).numpy() - images).max() < 1e-4
    assert images.std() > 0.01, "the pictures show nothing to compare"
