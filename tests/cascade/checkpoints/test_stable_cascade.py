from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.stable_cascade import (
    stage_b_from_diffusers,
    stage_b_from_original,
    stage_b_to_diffusers,
    stage_b_to_original,
    stage_c_from_diffusers,
    stage_c_from_original,
    stage_c_to_diffusers,
    stage_c_to_original,
)
from cascade.errors import UserError
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig

CONV, TIME, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"

TINY_C = StageCConfig(
    latent_channels=4,
    time_channels=8,
    cond_channels=24,
    hidden_channels=(16, 24),
    num_heads=(2, 3),
    down_blocks=(1, 2),
    up_blocks=(2, 3),
    text_channels=10,
    text_pooled_channels=12,
    pooled_tokens=2,
    image_channels=14,
)
TINY_B = StageBConfig(
    latent_channels=4,
    time_channels=8,
    cond_channels=20,
    hidden_channels=(8, 12, 16),
    num_heads=(0, 0, 2),
    down_blocks=(1, 2, 1),
    up_blocks=(2, 1, 2),
    up_repeats=(2, 1, 3),
    compressed_channels=4,
    text_pooled_channels=12,
    pooled_tokens=2,
    dropout=(0.0, 0.0, 0.1),
)


def diffusers_unet(config: StageBConfig | StageCConfig) -> nn.Module:
    """The diffusers network of the sizes of ours."""
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    levels = len(config.hidden_channels)
    common: dict[str, Any] = dict(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        timestep_ratio_embedding_dim=config.time_channels,
        patch_size=config.patch_size,
        conditioning_dim=config.cond_channels,
        block_out_channels=config.hidden_channels,
        num_attention_heads=tuple(heads or -1 for heads in config.num_heads),
        down_num_layers_per_block=config.down_blocks,
        up_num_layers_per_block=config.up_blocks,
        down_blocks_repeat_mappers=(1,) * levels,
        block_types_per_layer=tuple(
            (CONV, TIME, ATTENTION) if heads else (CONV, TIME) for heads in config.num_heads
        ),
        clip_text_pooled_in_channels=config.text_pooled_channels,
        clip_seq=config.pooled_tokens,
        kernel_size=config.kernel_size,
        dropout=0.1,
        timestep_conditioning_type=config.time_conds,
    )
    if isinstance(config, StageBConfig):
        return StableCascadeUNet(
            **common,
            up_blocks_repeat_mappers=config.up_repeats,
            effnet_in_channels=config.compressed_channels,
            pixel_mapper_in_channels=3 if config.pixel_condition else None,
        ).eval()
    return StableCascadeUNet(
        **common,
        up_blocks_repeat_mappers=(1,) * levels,
        clip_text_in_channels=config.text_channels,
        clip_image_in_channels=config.image_channels,
        switch_level=(False,) * (levels - 1),
    ).eval()


# Parity: the same numbers in, the same numbers out


def stage_c_inputs(height: int, width: int) -> tuple[Tensor, Tensor, StageCCondition]:
    g = torch.Generator().manual_seed(1)
    cond = StageCCondition(
        text_hidden=torch.randn(2, 5, 10, generator=g),
        text_pooled=torch.randn(2, 12, generator=g),
        image=torch.randn(2, 2, 14, generator=g),
        sca=torch.tensor([0.3, 0.7]),
        crp=torch.tensor([0.9, 0.1]),
    )
    return torch.randn(2, 4, height, width, generator=g), torch.tensor([0.996, 0.31]), cond


def stage_b_inputs(height: int, width: int) -> tuple[Tensor, Tensor, StageBCondition]:
    g = torch.Generator().manual_seed(1)
    cond = StageBCondition(
        stage_c_latents=torch.randn(2, 4, 3, 5, generator=g),
        text_pooled=torch.randn(2, 12, generator=g),
        pixels=torch.randn(2, 3, 8, 8, generator=g),
        sca=torch.tensor([0.3, 0.7]),
    )
    return torch.randn(2, 4, height, width, generator=g), torch.tensor([0.996, 0.31]), cond


def theirs_on(unet: nn.Module, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The diffusers network, one picture at a time: it takes no batch of ``sca`` and ``crp``."""
    rows = []
    for i in range(len(x)):
        # ``cond or zeros`` in diffusers reads 0 as not given, which means 0 too.
        part = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond)}
        part = {name: None if value is None else value[i : i + 1] for name, value in part.items()}
        assert part.pop("cfg") is None  # nothing published is told a guidance scale
        part["clip_text_pooled"] = part.pop("text_pooled")[:, None]
        if isinstance(cond, StageCCondition):
            assert part.pop("control") is None  # diffusers has none
            part["clip_text"] = part.pop("text_hidden")
            image = part.pop("image")
            part["clip_img"] = torch.zeros(1, 1, 14) if image is None else image
        else:
            part["effnet"] = part.pop("stage_c_latents")
        rows.append(unet(x[i : i + 1], t[i : i + 1], **part).sample)
    return torch.cat(rows)


def variations(x: Tensor, t: Tensor, cond: Any) -> dict[str, tuple[Tensor, Tensor, Any]]:
    """The inputs with one of them changed, or left out where it may be."""
    varied = {"x": (x + 0.1, t, cond), "t": (x, t - 0.05, cond)}
    for field in dataclasses.fields(cond):
        value = getattr(cond, field.name)
        if value is None:  # a ControlNet's maps, which diffusers does not know
            continue
        varied[field.name] = x, t, dataclasses.replace(cond, **{field.name: value + 0.05})
        if field.default is None:
            varied[f"no {field.name}"] = x, t, dataclasses.replace(cond, **{field.name: None})
    return varied


CASES = [
    pytest.param(StageC, TINY_C, stage_c_from_diffusers, stage_c_inputs, (6, 4), id="C even"),
    pytest.param(StageC, TINY_C, stage_c_from_diffusers, stage_c_inputs, (5, 7), id="C odd"),
    pytest.param(StageB, TINY_B, stage_b_from_diffusers, stage_b_inputs, (16, 24), id="B even"),
    pytest.param(StageB, TINY_B, stage_b_from_diffusers, stage_b_inputs, (18, 22), id="B odd"),
]


@pytest.mark.reference
@pytest.mark.parametrize(("network", "config", "from_diffusers", "inputs", "size"), CASES)
@torch.no_grad()
def test_ours_equals_the_diffusers_network(
    network, config, from_diffusers, inputs, size, randomise
):
    theirs = diffusers_unet(config)
    randomise(theirs)
    ours = network(config).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), config))
    x, t, cond = inputs(*size)
    before = ours(x, t, cond)
    assert before.shape == x.shape
    for name, varied in {"": (x, t, cond), **variations(x, t, cond)}.items():
        expected = theirs_on(theirs, *varied)
        actual = ours(*varied)
        error = float((actual - expected).abs().max() / expected.std())
        assert error < 1e-5, name
        change = float((actual - before).abs().max() / before.std())
        assert not name or change > 1e-4, f"{name} has no say"


# Tables


FULL = [
    pytest.param(StageC, StageCConfig.full(), "stage_c", 1550, 1294, id="C full"),
    pytest.param(StageC, StageCConfig.lite(), "stage_c", 782, 654, id="C lite"),
    pytest.param(StageB, StageBConfig.full(), "stage_b", 1726, 1454, id="B full"),
    pytest.param(StageB, StageBConfig.lite(), "stage_b", 970, 826, id="B lite"),
]
FROM_DIFFUSERS = {"stage_b": stage_b_from_diffusers, "stage_c": stage_c_from_diffusers}
TO_DIFFUSERS = {"stage_b": stage_b_to_diffusers, "stage_c": stage_c_to_diffusers}
FROM_ORIGINAL = {"stage_b": stage_b_from_original, "stage_c": stage_c_from_original}
TO_ORIGINAL = {"stage_b": stage_b_to_original, "stage_c": stage_c_to_original}


@pytest.mark.reference
@pytest.mark.parametrize(("network", "config", "stage", "num_diffusers", "num_original"), FULL)
def test_published_sizes_have_every_key_and_shape(
    network, config, stage, num_diffusers, num_original, shapes, as_original
):
    with torch.device("meta"):
        ours = network(config).state_dict()
        theirs = diffusers_unet(config).state_dict()
    assert shapes(TO_DIFFUSERS[stage](ours, config)) == shapes(theirs)
    assert shapes(FROM_DIFFUSERS[stage](theirs, config)) == shapes(ours)
    assert len(theirs) == num_diffusers
    expected = as_original(shapes(theirs))
    if stage == "stage_b":
        renamed = ("clip_txt_pooled_mapper", "clip_mapper")
        expected = {key.replace(*renamed): shape for key, shape in expected.items()}
    original = TO_ORIGINAL[stage](ours, config)
    assert shapes(original) == expected
    assert len(original) == num_original
    assert shapes(FROM_ORIGINAL[stage](original, config)) == shapes(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tables", [(TO_DIFFUSERS, FROM_DIFFUSERS), (TO_ORIGINAL, FROM_ORIGINAL)])
@pytest.mark.parametrize(
    ("network", "config", "stage"), [(StageC, TINY_C, "stage_c"), (StageB, TINY_B, "stage_b")]
)
def test_weights_survive_the_way_there_and_back(
    network, config, stage, tables, dtype, randomise, assert_same_tensors
):
    there, back = tables
    ours = network(config).to(dtype)
    randomise(ours)
    state = dict(ours.state_dict())
    theirs = there[stage](state, config)
    assert_same_tensors(back[stage](theirs, config), state)
    assert_same_tensors(there[stage](back[stage](theirs, config), config), theirs)


@pytest.mark.parametrize(
    ("network", "config", "stage"),
    [
        (StageC, dataclasses.replace(TINY_C, image_channels=None, time_conds=()), "stage_c"),
        (StageB, dataclasses.replace(TINY_B, pixel_condition=False, time_conds=()), "stage_b"),
    ],
)
def test_networks_without_the_optional_conditions_are_mapped_too(network, config, stage):
    state = network(config).state_dict()
    for there, back in ((TO_DIFFUSERS, FROM_DIFFUSERS), (TO_ORIGINAL, FROM_ORIGINAL)):
        assert back[stage](there[stage](state, config), config).keys() == state.keys()


def test_weights_of_another_size_are_refused_by_name():
    with torch.device("meta"):
        theirs = stage_c_to_original(StageC(TINY_C).state_dict(), TINY_C)
    wider = dataclasses.replace(TINY_C, text_channels=11)
    message = r"1 misshapen: clip_txt_mapper.weight \(24x10 instead of 24x11\)"
    with pytest.raises(UserError, match=message):
        stage_c_from_original(theirs, wider)
    deeper = dataclasses.replace(TINY_C, down_blocks=(2, 2))
    with pytest.raises(UserError, match=r"missing: down_blocks\.0\.3\.depthwise\.weight"):
        stage_c_from_original(theirs, deeper)
    with pytest.raises(UserError, match=r"unexpected: .*attn\.in_proj_weight"):
        stage_c_from_diffusers(theirs, TINY_C)
