"""Weights in int8: how far they are from those that were, and that all else goes on as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stages.int8 import Int8Linear, is_int8, to_int8, unpacked_bytes
from stages.layers import ResBlock, TimestepBlock
from stages.linear import Linear
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

CONFIG = StageCConfig(
    cond_channels=64,
    hidden_channels=(96,),
    num_heads=(4,),
    down_blocks=(2,),
    up_blocks=(2,),
    text_channels=32,
    text_pooled_channels=32,
    image_channels=None,
    time_conds=(),
)


def network() -> StageC:
    torch.manual_seed(0)
    made = StageC(CONFIG).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_the_nearest_of_its_row_s_255_levels(dtype):
    torch.manual_seed(0)
    layer = Linear(96, 64, dtype=dtype)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[4] *= 100
    rounded = Int8Linear.of(layer)
    assert rounded.weight.dtype == torch.int8 and rounded.scale.dtype == dtype
    step = layer.weight.float().abs().amax(dim=1, keepdim=True) / 127
    # Half a step, and what a coarse scale makes of it.
    bound = step * (0.5 + 127 * torch.finfo(dtype).eps) + torch.finfo(dtype).tiny
    error = (rounded.weight.float() * rounded.scale.float() - layer.weight.float()).abs()
    assert bool((error <= bound).all())
    assert not rounded.dense[3].any() and bool(rounded.dense.isfinite().all())
    assert rounded.dense.dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_multiplied_out_weight(bias):
    layer = Linear(96, 64, bias=bias)
    rounded = Int8Linear.of(layer)
    x = torch.randn(2, 5, 96)
    with torch.no_grad():
        found, plain = rounded(x), layer(x)
        torch.testing.assert_close(found, torch.nn.functional.linear(x, rounded.dense, layer.bias))
    assert float((found - plain).std() / plain.std()) < 0.02
    assert "in_features=96, out_features=64" in repr(rounded)


def test_a_network_is_smaller_and_says_nearly_the_same():
    plain = network()
    rounded = copy.deepcopy(plain)
    before = sum(p.numel() * p.element_size() for p in plain.parameters())
    saved = to_int8(rounded)
    assert saved > before / 2 and is_int8(rounded) and not is_int8(plain)
    now = sum(p.numel() * p.element_size() for p in rounded.parameters())
    assert now == before - saved
    widest = max(one.weight.numel() for one in rounded.modules() if isinstance(one, Int8Linear))
    assert unpacked_bytes(rounded) == 4 * widest and unpacked_bytes(plain) == 0
    condition = StageCCondition(torch.randn(2, 7, 32), torch.randn(2, 32))
    with torch.inference_mode():
        outputs = [
            one(torch.ones(2, 16, 6, 6), torch.tensor([0.3, 0.8]), condition)
            for one in (plain, rounded)
        ]
    assert 0 < float((outputs[0] - outputs[1]).std() / outputs[0].std()) < 0.05
    assert to_int8(rounded) == 0, "what is rounded stays"


def test_what_embeds_stays_and_a_format_can_follow():
    rounded = network()
    to_int8(rounded)
    for module in rounded.modules():
        if isinstance(module, TimestepBlock):
            assert type(module.mapper) is Linear
    assert type(rounded.text_mapper) is Linear
    rounded.to(torch.bfloat16)
    kinds = {p.dtype for p in rounded.parameters()}
    assert kinds == {torch.int8, torch.bfloat16}


def test_a_folded_skip_reads_the_multiplied_out_weight():
    torch.manual_seed(0)
    block, mapper = ResBlock(32, skip_channels=48), nn.Conv2d(5, 48, 1)
    x, source = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 4, 4)
    wide = nn.Sequential(block)
    assert to_int8(wide) > 0
    with torch.inference_mode():
        folded = block(x, None, block.fold(source, mapper))
        joined = block(x, mapper(source))
    torch.testing.assert_close(folded, joined, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "config", "plain", "rounded"),
    [
        (StageC, StageCConfig(), 6.69, 3.42),
        (StageB, StageBConfig(), 2.91, 1.52),
        (UNet, UNetConfig.sdxl(), 4.78, 2.73),
    ],
)
def test_the_published_sizes_are_those_that_readme_tells(network, config, plain, rounded):
    with torch.device("meta"):
        built = network(config).to(torch.bfloat16)
    for said in (plain, rounded):
        held = sum(one.numel() * one.element_size() for one in built.parameters())
        assert held / 2**30 == pytest.approx(said, abs=0.006)
        to_int8(built)
