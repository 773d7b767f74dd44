"""What we write for diffusers, diffusers loads and samples as we do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.files import load_network, save_network
from cascade.pipelines import cascade as pipeline_module
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.parts import OwnFolder
from cascade.pipelines.spec import load_spec, save_spec
from cascade.tools.convert import convert
from cascade.tools.diffusers_names import TRAIN_TIMES
from stages.stage_c import StageC
from tests.reference.test_cascade_pipelines import SharedNoise, generator

pytestmark = pytest.mark.reference

STEPS_C, STEPS_B = 5, 4


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with an image mapper, which diffusers' pipeline can't do without."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    old = load_network(folder / "stage_c.safetensors", expect=StageC)
    torch.manual_seed(0)
    network = StageC(replace(old.config, image_channels=5))
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    save_network(folder / "stage_c.safetensors", network)
    return folder


def in_diffusers(folder: Path, prompt: str, guidance: float) -> Tensor:
    from diffusers import (
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    prior = StableCascadePriorPipeline.from_pretrained(folder / "prior")
    # diffusers 0.42 can't find the module that it names itself: the facts, section 5.4.
    parts: dict[str, Any] = {
        "decoder": StableCascadeUNet.from_pretrained(folder / "decoder" / "decoder"),
        "vqgan": PaellaVQModel.from_pretrained(folder / "decoder" / "vqgan"),
        "scheduler": type(prior.scheduler).from_pretrained(folder / "decoder" / "scheduler"),
    }
    decoder = StableCascadeDecoderPipeline(
        tokenizer=prior.tokenizer,
        text_encoder=prior.text_encoder,
        latent_dim_scale=4.0,
        **parts,
    )
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    embeddings = prior(
        prompt,
        height=32,
        width=32,
        num_inference_steps=STEPS_C,
        guidance_scale=guidance,
        generator=generator("stage_c"),
        output_type="pt",
    ).image_embeddings
    pixels: Tensor = decoder(
        embeddings,
        prompt,
        num_inference_steps=STEPS_B,
        guidance_scale=1.0,
        generator=generator("stage_b"),
        output_type="pt",
    ).images
    return pixels


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_epsilon_model_gives_the_same_picture_there(
    model: Path, tmp_path: Path, guidance: float, monkeypatch: Any
) -> None:
    written = convert(model, "diffusers", tmp_path / "out", torch.float32)
    assert {path.name for path in written.files} == {"prior", "decoder", "cascade.json"}
    theirs = in_diffusers(tmp_path / "out", "a red hat", guidance)

    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    spec = load_spec(model)
    raw = {"time_input": "raw", "last_step": "mean"}
    spec = replace(spec, stage_c=replace(spec.stage_c, **raw), stage_b=replace(spec.stage_b, **raw))
    save_spec(spec, model)
    ours = CascadePipeline(OwnFolder(model), device="cpu", dtype="float32")
    settings = {"steps_c": STEPS_C, "steps_b": STEPS_B, "guidance_c": guidance, "guidance_b": 1.0}
    output = ours("a red hat", seed=0, progress=False, **settings)
    assert (output.pixels - theirs).abs().max() < 1e-4


def test_a_v_model_gives_the_same_picture_there_with_ddim(
    model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    spec = load_spec(model)
    v = {"prediction": "v", "sampler": "ddim"}

    def times(steps: int) -> tuple[float, ...]:
        return tuple(1.0 - index / steps for index in range(steps + 1))

    # The scheduler's times are multiples of 1 / 1000, which those of 5 and 4 steps are.
    assert TRAIN_TIMES % STEPS_C == TRAIN_TIMES % STEPS_B == 0
    spec = replace(
        spec,
        stage_c=replace(spec.stage_c, steps=STEPS_C, times=times(STEPS_C), **v),
        stage_b=replace(spec.stage_b, steps=STEPS_B, times=times(STEPS_B), **v),
    )
    save_spec(spec, model)
    convert(model, "diffusers", tmp_path / "out", torch.float32)
    theirs = in_diffusers(tmp_path / "out", "a red hat", 3.0)
    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    ours = CascadePipeline(OwnFolder(model), device="cpu", dtype="float32")
    output = ours("a red hat", seed=0, guidance_c=3.0, guidance_b=1.0, progress=False)
    assert (output.pixels - theirs).abs().max() < 1e-3
