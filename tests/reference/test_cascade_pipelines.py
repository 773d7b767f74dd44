"""Whole pipelines against diffusers: a folder that diffusers saved, opened here, the same noise."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cascade.diffusion.samplers import StepInfo
from cascade.errors import UserError
from cascade.pipelines import cascade as pipeline_module
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.parts import open_source
from cascade.pipelines.plan import Settings, make_plan
from cascade.pipelines.sampling import sample_stage_c

pytestmark = pytest.mark.reference

WIDTH_C, WIDTH_B, POOLED = 16, 24, 16
PROMPTS = ["a red cat", "a blue hat on a box"]
SIZES = [(128, 128), (256, 384)]
STEPS_C, STEPS_B = 4, 3


class SharedNoise:
    """Draws for a whole batch from one generator, in the order in which diffusers draws."""

    def __init__(self, seeds: Sequence[int], stream: str) -> None:
        self.count = len(seeds)
        self.generator = generator(stream)

    def randn(self, shape: Sequence[int]) -> Tensor:
        return torch.randn((self.count, *shape), generator=self.generator)

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator)


def generator(stream: str) -> torch.Generator:
    return torch.Generator().manual_seed({"stage_c": 1, "stage_b": 2}[stream])


def tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=20
    )


def text_model(tokens: Any, width: int, *, projects: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=POOLED,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
        image_size=28,
        patch_size=14,
    )
    return CLIPVisionModelWithProjection(config).eval()


def randomize(network: nn.Module) -> nn.Module:
    """Give zero-initialised weights values, so that all of the network has a say."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return network.eval()


def vqgan() -> Any:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return randomize(
        PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=16, levels=2, embed_dim=16)
    )


def save_v3(folder: Path) -> tuple[Any, Any]:
    from diffusers import (
        DDPMWuerstchenScheduler,
        StableCascadeDecoderPipeline,
        StableCascadePriorPipeline,
        StableCascadeUNet,
    )
    from transformers import CLIPImageProcessor

    conv, time, attention = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"
    prior = StableCascadeUNet(
        in_channels=16,
        out_channels=16,
        timestep_ratio_embedding_dim=8,
        patch_size=1,
        conditioning_dim=16,
        block_out_channels=(16, 24),
        num_attention_heads=(2, 3),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=((conv, time, attention),) * 2,
        clip_text_in_channels=WIDTH_C,
        clip_text_pooled_in_channels=POOLED,
        clip_image_in_channels=12,
        clip_seq=2,
        switch_level=(False,),
    )
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        patch_size=2,
        conditioning_dim=20,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(2, 1),
        block_types_per_layer=((conv, time), (conv, time, attention)),
        clip_text_pooled_in_channels=POOLED,
        clip_seq=2,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
    )
    tokens = tokenizer(folder / "vocabulary")
    text = text_model(tokens, WIDTH_C, projects=True)
    first = StableCascadePriorPipeline(
        tokenizer=tokens,
        text_encoder=text,
        prior=randomize(prior),
        scheduler=DDPMWuerstchenScheduler(),
        image_encoder=image_encoder(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
    )
    second = StableCascadeDecoderPipeline(
        tokenizer=tokens,
        text_encoder=text,
        decoder=randomize(decoder),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan(),
    )
    return first, second


def save_v2(folder: Path) -> tuple[Any, Any]:
    from diffusers import DDPMWuerstchenScheduler
    from diffusers.pipelines.deprecated.wuerstchen import (
        WuerstchenDecoderPipeline,
        WuerstchenPrior,
        WuerstchenPriorPipeline,
    )
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
        WuerstchenDiffNeXt,
    )

    prior = WuerstchenPrior(c_in=16, c=24, c_cond=WIDTH_C, c_r=8, depth=2, nhead=3)
    with mock.patch.object(WuerstchenDiffNeXt, "_init_weights", lambda self, module: None):
        decoder = WuerstchenDiffNeXt(
            c_r=8,
            c_cond=20,
            c_hidden=[8, 16],
            nhead=[-1, 2],
            blocks=[1, 1],
            level_config=["CT", "CTA"],
            inject_effnet=[False, True],
            clip_embd=WIDTH_B,
        )
    tokens = tokenizer(folder / "vocabulary")
    first = WuerstchenPriorPipeline(
        tokenizer=tokens,
        text_encoder=text_model(tokens, WIDTH_C, projects=False),
        prior=tamed(randomize(prior), "out"),
        scheduler=DDPMWuerstchenScheduler(),
    )
    second = WuerstchenDecoderPipeline(
        tokenizer=tokens,
        text_encoder=text_model(tokens, WIDTH_B, projects=False),
        decoder=tamed(randomize(decoder), "clf"),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=vqgan(),
    )
    return first, second


def tamed(network: Any, name: str) -> Any:
    """Shrink the output, whose second half divides: near zero it would magnify rounding."""
    with torch.no_grad():
        for parameter in getattr(network, name).parameters():
            parameter.mul_(0.1)
    return network


@pytest.fixture(scope="module", params=["v3", "v2"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Any, Any, Path]:
    """Both diffusers pipelines, and the folder that holds what they saved."""
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save: Callable[[Path], tuple[Any, Any]] = save_v3 if request.param == "v3" else save_v2
        first, second = save(folder)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
    first.save_pretrained(folder / "prior-pipeline")
    second.save_pretrained(folder / "decoder-pipeline")
    return first, second, folder


CASES = [
    pytest.param(SIZES[0], 1.0, "", id="square-unguided"),
    pytest.param(SIZES[0], 3.0, "", id="square-guided"),
    pytest.param(SIZES[1], 3.0, "a dog", id="oblong-negative"),
]


@pytest.mark.parametrize(("size", "guidance", "negative"), CASES)
def test_latents_of_every_step_and_pixels_are_those_of_diffusers(
    saved: Any, size: tuple[int, int], guidance: float, negative: str, monkeypatch: Any
) -> None:
    first, second, folder = saved
    height, width = size
    steps: list[Tensor] = []
    # diffusers' v2 decoder takes one prompt: of several it makes the square of their number.
    prompts, repeats = (PROMPTS[:1], 2) if "Wuerstchen" in type(second).__name__ else (PROMPTS, 1)
    unwanted = [negative] * len(prompts) if guidance > 1 else None

    def keep(_pipe: Any, _index: int, _t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(values["latents"].clone())
        return values

    embeddings = first(
        prompts,
        num_images_per_prompt=repeats,
        negative_prompt=unwanted,
        height=height,
        width=width,
        num_inference_steps=STEPS_C,
        guidance_scale=guidance,
        generator=generator("stage_c"),
        output_type="pt",
        callback_on_step_end=keep,
    ).image_embeddings
    theirs = second(
        embeddings,
        prompts,
        negative_prompt=unwanted,
        num_inference_steps=STEPS_B,
        guidance_scale=guidance,
        generator=generator("stage_b"),
        output_type="pt",
    ).images

    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    ours = CascadePipeline(open_source(folder, dialect="diffusers"), device="cpu", dtype="float32")
    output = ours(
        prompts,
        seed=0,
        num_images=repeats,
        negative_prompt=negative,
        height=height,
        width=width,
        steps_c=STEPS_C,
        steps_b=STEPS_B,
        guidance_c=guidance,
        guidance_b=guidance,
        batch_size=2,
        progress=False,
    )
    assert output.pixels.shape == theirs.shape
    assert (output.pixels - theirs).abs().max() < 1e-4
    assert output.pixels.std() > 0.01

    seen: list[Tensor] = []

    def watch(info: StepInfo) -> None:
        seen.append(info.x_t.clone())

    settings = Settings(seed=0, steps_c=STEPS_C, guidance_c=guidance, negative_prompt=negative)
    plan = make_plan(ours.spec, prompts, settings)
    last = sample_stage_c(
        ours.stage_c,
        plan.stage_c,
        ours.prompt_states([*prompts, negative])[0].pair(prompts * repeats, negative),
        SharedNoise([0, 0], "stage_c"),  # type: ignore[arg-type]
        ours.spec.stage_c_size(size),
        on_step=watch,
    )
    for step, (mine, other) in enumerate(zip([*seen[1:], last], steps, strict=True)):
        error = (mine - other).abs().max() / other.std()
        assert error < 1e-4, f"step {step}"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_variation_is_that_of_diffusers(saved: Any, guidance: float, monkeypatch: Any) -> None:
    first, _, folder = saved
    rows, columns = np.mgrid[0:28, 0:28]
    levels = np.stack([rows * 9, columns * 9, 255 - rows * 4 - columns * 4], axis=-1)
    image = Image.fromarray(levels.astype(np.uint8))  # of the tower's size: nothing is resized
    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    ours = CascadePipeline(open_source(folder, dialect="diffusers"), device="cpu", dtype="float32")
    settings = Settings(
        seed=0, height=128, width=128, steps_c=STEPS_C, steps_b=1, guidance_c=guidance
    )
    if ours.spec.generation == "v2":
        with pytest.raises(UserError, match="told nothing of pictures"):
            ours.variation(image, PROMPTS[0], settings)
        return
    theirs = first(
        PROMPTS[0],
        images=[image],
        height=128,
        width=128,
        num_inference_steps=STEPS_C,
        guidance_scale=guidance,
        generator=generator("stage_c"),
        output_type="pt",
    ).image_embeddings
    mine = ours.variation(image, PROMPTS[0], settings).stage_c_latents
    assert (mine - theirs).abs().max() < 1e-4 * theirs.std()
    unseen = ours(
        PROMPTS[0],
        seed=0,
        height=128,
        width=128,
        steps_c=STEPS_C,
        steps_b=1,
        guidance_c=guidance,
    )
    assert (mine - unseen.stage_c_latents).abs().max() > 1e-3 * theirs.std()


def test_the_same_files_are_sampled_as_their_authors_do_unless_told_otherwise(saved: Any) -> None:
    _, _, folder = saved
    official, other = open_source(folder), open_source(folder, dialect="diffusers")
    assert official.spec.stage_b_cells_per_stage_c_cell is None
    assert other.spec.stage_b_cells_per_stage_c_cell == 10.67
    pipeline = CascadePipeline(official, device="cpu", dtype="float32")
    v2 = official.spec.generation == "v2"
    assert pipeline.stage_a.config.scale == (0.3764 if v2 else 0.43)
    assert official.spec.stage_c.rescale == (0.0 if v2 else 0.7)
    assert official.weights_hash() != other.weights_hash()
    output = pipeline("a red cat", seed=1, width=192, height=128, steps_c=2, steps_b=2)
    assert output.pixels.shape == (1, 3, 128, 192)


def test_a_size_that_diffusers_rule_can_not_make_is_one_line(saved: Any) -> None:
    _, _, folder = saved
    pipeline = CascadePipeline(open_source(folder, dialect="diffusers"), device="cpu")
    with pytest.raises(UserError, match="Stage B takes multiples of"):
        pipeline("a red cat", seed=0, width=192, height=192, steps_c=1, steps_b=1)


def test_float16_is_refused_where_stage_c_is_known_to_overflow(saved: Any) -> None:
    _, _, folder = saved
    source = open_source(folder)
    if source.spec.generation == "v3":
        with pytest.raises(UserError, match="overflows in float16"):
            CascadePipeline(source, device="cpu", dtype="float16")
    else:
        CascadePipeline(source, device="cpu", dtype="float16")


def test_a_missing_part_is_named(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved
    (tmp_path / "prior-pipeline").symlink_to(folder / "prior-pipeline")
    with pytest.raises(UserError, match="no stage_b and no stage_a in it"):
        open_source(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no model: neither model\.json"):
        open_source(empty)


def test_a_missing_text_encoder_is_named(saved: Any, tmp_path: Path) -> None:
    _, _, folder = saved
    for pipeline, parts in {
        "prior-pipeline": ("prior",),
        "decoder-pipeline": ("decoder", "vqgan"),
    }.items():
        (tmp_path / pipeline).mkdir()
        for part in parts:
            (tmp_path / pipeline / part).symlink_to(folder / pipeline / part)
    with pytest.raises(UserError, match="no text encoder 16 wide for Stage C"):
        open_source(tmp_path)


def test_a_plan_may_change_the_times_of_v2() -> None:
    from cascade.pipelines.published import V2_TIMES
    from cascade.pipelines.spec import CascadeSpec, StageSampling

    assert len(V2_TIMES) == 30 and V2_TIMES[0] == 1.0 and V2_TIMES[-1] == 0.0
    spec = CascadeSpec(
        name="v2",
        image_size=1024,
        pixels_per_stage_c_cell=42.67,
        stage_c=StageSampling(steps=29, times=V2_TIMES),
    )
    assert make_plan(spec, "a", Settings(seed=0)).stage_c.times == V2_TIMES
    assert make_plan(spec, "a", Settings(seed=0, steps_c=5)).stage_c.times == ()
    with pytest.raises(ValueError, match="need one more"):
        replace(spec.stage_c, steps=5)
