from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.wuerstchen import (
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
from stages.stage_b_v2 import StageBV2, StageBV2Condition, StageBV2Config
from stages.stage_c_v2 import StageCV2, StageCV2Condition, StageCV2Config

TINY_C = StageCV2Config(
    latent_channels=4,
    time_channels=8,
    hidden_channels=24,
    num_blocks=3,
    num_heads=3,
    text_channels=10,
)
TINY_B = StageBV2Config(
    latent_channels=4,
    time_channels=8,
    cond_channels=20,
    hidden_channels=(8, 12, 16),
    num_heads=(0, 3, 2),
    num_blocks=(2, 1, 2),
    reads_compressed=(False, True, True),
    compressed_channels=4,
    text_channels=10,
    dropout=(0.1, 0.1, 0.1),
)


def diffusers_stage_c(config: StageCV2Config) -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    return WuerstchenPrior(
        c_in=config.latent_channels,
        c=config.hidden_channels,
        c_cond=config.text_channels,
        c_r=config.time_channels,
        depth=config.num_blocks,
        nhead=config.num_heads,
    ).eval()


def diffusers_stage_b(config: StageBV2Config) -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
        WuerstchenDiffNeXt,
    )

    # Its own start runs through all blocks for each module, and no test needs it.
    with mock.patch.object(WuerstchenDiffNeXt, "_init_weights", lambda self, module: None):
        return WuerstchenDiffNeXt(**_sizes(config)).eval()


def _sizes(config: StageBV2Config) -> dict[str, Any]:
    return dict(
        c_in=config.latent_channels,
        c_out=config.latent_channels,
        c_r=config.time_channels,
        patch_size=config.patch_size,
        c_cond=config.cond_channels,
        c_hidden=list(config.hidden_channels),
        nhead=[heads or -1 for heads in config.num_heads],
        blocks=list(config.num_blocks),
        level_config=["CTA" if heads else "CT" for heads in config.num_heads],
        inject_effnet=list(config.reads_compressed),
        effnet_embd=config.compressed_channels,
        clip_embd=config.text_channels,
    )


# Parity: the same numbers in, the same numbers out


def assert_equal_and_every_input_has_a_say(ours, run_theirs, x: Tensor, t: Tensor, cond) -> None:
    before = ours(x, t, cond)
    assert before.shape == x.shape
    cases = {"": (x, t, cond), "x": (x + 0.1, t, cond), "t": (x, t - 0.05, cond)}
    for field in dataclasses.fields(cond):
        changed = {field.name: getattr(cond, field.name) + 0.05}
        cases[field.name] = x, t, dataclasses.replace(cond, **changed)
    for name, case in cases.items():
        expected, actual = run_theirs(*case), ours(*case)
        error = float((actual - expected).abs().max() / expected.std())
        assert error < 1e-5, name
        change = float((actual - before).abs().max() / before.std())
        assert not name or change > 1e-4, f"{name} has no say"


def shrink(out: nn.Module) -> None:
    """Keep the divisor of the prediction away from 0, where it would magnify rounding errors."""
    out.weight.mul_(0.1)
    out.bias.mul_(0.1)


@pytest.mark.reference
@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
@torch.no_grad()
def test_stage_c_equals_the_diffusers_network(size, randomise):
    theirs = diffusers_stage_c(TINY_C)
    randomise(theirs)
    shrink(theirs.out[1])
    ours = StageCV2(TINY_C).eval()
    ours.load_state_dict(stage_c_from_diffusers(theirs.state_dict(), TINY_C))
    g = torch.Generator().manual_seed(1)
    cond = StageCV2Condition(torch.randn(2, 5, 10, generator=g))
    x, t = torch.randn(2, 4, *size, generator=g), torch.tensor([0.996, 0.31])
    assert_equal_and_every_input_has_a_say(
        ours, lambda x, t, cond: theirs(x, t, cond.text_hidden), x, t, cond
    )


@pytest.mark.reference
@pytest.mark.parametrize("size", [(16, 32), (24, 40)])  # the coarsest levels: 2 x 4 and 3 x 5
@torch.no_grad()
def test_stage_b_equals_the_diffusers_network(size, randomise):
    theirs = diffusers_stage_b(TINY_B)
    randomise(theirs)
    shrink(theirs.clf[1])
    ours = StageBV2(TINY_B).eval()
    ours.load_state_dict(stage_b_from_diffusers(theirs.state_dict(), TINY_B))
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 5, generator=g)
    cond = StageBV2Condition(latents, torch.randn(2, 5, 10, generator=g))
    x, t = torch.randn(2, 4, *size, generator=g), torch.tensor([0.996, 0.31])
    assert_equal_and_every_input_has_a_say(
        ours,
        lambda x, t, cond: theirs(x, t, cond.stage_c_latents, cond.text_hidden),
        x,
        t,
        cond,
    )


# Tables


DIFFUSERS = {
    "stage_b": (stage_b_to_diffusers, stage_b_from_diffusers),
    "stage_c": (stage_c_to_diffusers, stage_c_from_diffusers),
}
ORIGINAL = {
    "stage_b": (stage_b_to_original, stage_b_from_original),
    "stage_c": (stage_c_to_original, stage_c_from_original),
}


@pytest.mark.reference
@pytest.mark.parametrize(
    ("network", "config", "stage", "build", "num_diffusers", "num_original"),
    [
        (StageCV2, StageCV2Config.full(), "stage_c", diffusers_stage_c, 648, 520),
        (StageBV2, StageBV2Config.full(), "stage_b", diffusers_stage_b, 990, 814),
    ],
)
def test_published_sizes_have_every_key_and_shape(
    network, config, stage, build, num_diffusers, num_original, shapes, as_original
):
    with torch.device("meta"):
        ours, theirs = network(config).state_dict(), build(config).state_dict()
    to_diffusers, from_diffusers = DIFFUSERS[stage]
    assert shapes(to_diffusers(ours, config)) == shapes(theirs)
    assert shapes(from_diffusers(theirs, config)) == shapes(ours)
    assert len(theirs) == num_diffusers
    to_original, from_original = ORIGINAL[stage]
    original = to_original(ours, config)
    assert shapes(original) == as_original(shapes(theirs))
    assert len(original) == num_original
    assert shapes(from_original(original, config)) == shapes(ours)


@pytest.mark.parametrize("tables", [DIFFUSERS, ORIGINAL])
@pytest.mark.parametrize(
    ("network", "config", "stage"), [(StageCV2, TINY_C, "stage_c"), (StageBV2, TINY_B, "stage_b")]
)
def test_weights_survive_the_way_there_and_back(
    network, config, stage, tables, randomise, assert_same_tensors
):
    there, back = tables[stage]
    ours = network(config)
    randomise(ours)
    state = dict(ours.state_dict())
    theirs = there(state, config)
    assert_same_tensors(back(theirs, config), state)
    assert_same_tensors(there(back(theirs, config), config), theirs)


def test_weights_of_another_size_are_refused_by_name():
    theirs = stage_b_to_original(StageBV2(TINY_B).state_dict(), TINY_B)
    wider = dataclasses.replace(TINY_B, text_channels=11)
    with pytest.raises(UserError, match=r"misshapen: clip_mapper.weight \(20x10 instead of 20x11"):
        stage_b_from_original(theirs, wider)
    shallower = dataclasses.replace(TINY_B, num_blocks=(1, 1, 2))
    with pytest.raises(UserError, match=r"unexpected: down_blocks\.0\.2\.depthwise\.weight"):
        stage_b_from_original(theirs, shallower)
