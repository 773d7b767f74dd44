from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.controlnet import (
    ALL_BLOCKS,
    PUBLISHED_BLOCKS,
    AffineLayerNorm2d,
    ControlBlock,
    ControlNet,
    ControlNetConfig,
)
from stages.semantic_compressor import TrunkStage
from stages.stage_c import StageC, StageCCondition, StageCConfig

STAGES = (
    TrunkStage("fused", 1, 3, 1, 6, 1),
    TrunkStage("fused", 2, 3, 2, 8, 1),
    TrunkStage("mb", 2, 3, 2, 12, 1),
)
EFFNET = ControlNetConfig(
    in_channels=1,
    blocks=(0, 2, 5),
    out_channels=(8, 12, 8),
    feature_channels=10,
    stem_channels=6,
    stages=STAGES,
)
LARGE = ControlNetConfig(
    in_channels=4,
    bottleneck="large",
    blocks=(0, 2, 5),
    out_channels=(8, 12, 8),
    feature_channels=10,
    stem_channels=14,
    residual_channels=6,
    residual_blocks=2,
)
SIMPLE = ControlNetConfig(
    in_channels=5,
    bottleneck="simple",
    blocks=(1,),
    out_channels=(12,),
    feature_channels=5,
    stem_channels=9,
)
STAGE_C = StageCConfig(
    latent_channels=4,
    time_channels=8,
    cond_channels=8,
    hidden_channels=(8, 12),
    num_heads=(2, 3),
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    text_channels=6,
    text_pooled_channels=5,
    image_channels=None,
)


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (ControlNetConfig.canny(), 54_255_776),
        (ControlNetConfig.inpainting(), 54_256_424),
        (ControlNetConfig.super_resolution(), 203_491_584),
        (ControlNetConfig.identity(), 102_763_008),
    ],
)
def test_the_published_networks_have_the_published_counts(config, count):
    with torch.device("meta"):
        network = ControlNet(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert set(config.out_channels) == {2048}


@pytest.mark.parametrize(
    ("config", "signal"),
    [
        (ControlNetConfig.canny(), (1, 1, 768, 768)),
        (ControlNetConfig.super_resolution(), (1, 16, 24, 24)),
    ],
)
def test_published_shapes_at_1024_pixels(config, signal):
    with torch.device("meta"):
        network = ControlNet(config).eval()
        maps = network(torch.empty(signal))
    assert config.stride * 24 == signal[-1]
    assert [index for index, one in enumerate(maps) if one is not None] == list(PUBLISHED_BLOCKS)
    assert {tuple(one.shape) for one in maps if one is not None} == {(1, 2048, 24, 24)}


@pytest.mark.parametrize("config", [EFFNET, LARGE, SIMPLE], ids=["effnet", "large", "simple"])
def test_a_new_controlnet_says_nothing_and_a_trained_one_something(config):
    signal = torch.rand(2, config.in_channels, 24, 40)
    network = ControlNet(config).eval()
    maps = network(signal)
    assert len(maps) == 1 + max(config.blocks)
    for block, one in enumerate(maps):
        assert (one is not None) == (block in config.blocks)
        assert one is None or not one.any()
    told = [one for one in randomised(network)(signal) if one is not None]
    side = config.stride
    for one, width in zip(told, config.out_channels, strict=True):
        assert one.shape == (2, width, -(-24 // side), -(-40 // side)) and one.any()


@pytest.mark.parametrize("config", [EFFNET, LARGE, SIMPLE], ids=["effnet", "large", "simple"])
def test_the_gradient_reaches_every_parameter_of_a_trained_controlnet(config):
    network = randomised(ControlNet(config))
    maps = network(torch.rand(2, config.in_channels, 24, 40))
    sum((one * torch.randn_like(one)).sum() for one in maps if one is not None).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_the_first_convolution_is_padded_for_pictures_alone():
    """A published quirk: the features of edges lie half a pixel beside those of pictures."""
    network = ControlNet(EFFNET)
    conv = network.backbone.stem.conv
    x = torch.rand(1, 1, 9, 13)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, stride=2))
    assert conv(x).shape[-2:] == (4, 6)
    pictures = ControlNet(dataclasses.replace(EFFNET, in_channels=3)).backbone.stem.conv
    assert pictures(torch.rand(1, 3, 9, 13)).shape[-2:] == (5, 7)


def test_the_norm_of_the_large_bottleneck_is_pytorchs_own_with_gain_and_shift():
    norm = randomised(AffineLayerNorm2d(6))
    assert norm.eps == 1e-5 and norm.elementwise_affine
    x = 1e-2 * torch.randn(2, 6, 3, 4)
    mean = x.mean(1, keepdim=True)
    deviation = (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = (x - mean) / deviation * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1)
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)
    assert len([m for m in ControlBlock(6).modules() if isinstance(m, AffineLayerNorm2d)]) == 2


def test_a_network_of_half_precision_takes_a_signal_of_full_precision():
    network = randomised(ControlNet(LARGE)).bfloat16()
    maps = network(torch.rand(1, 4, 5, 5))
    assert {one.dtype for one in maps if one is not None} == {torch.bfloat16}


# In Stage C


def steered_stage_c() -> tuple[StageC, StageCCondition, Tensor, Tensor]:
    torch.manual_seed(0)
    network = randomised(StageC(STAGE_C))
    cond = StageCCondition(torch.randn(2, 4, 6), torch.randn(2, 5))
    return network, cond, torch.randn(2, 4, 6, 4), torch.rand(2)


def test_the_widths_of_stage_cs_blocks_are_in_running_order():
    assert STAGE_C.block_channels == (8, 12, 12, 12, 12, 8)
    assert StageCConfig.full().block_channels == (2048,) * 64
    assert StageCConfig.lite().block_channels == (1536,) * 32


def test_no_control_and_a_control_of_nothing_are_bitwise_the_same():
    network, cond, x, t = steered_stage_c()
    plain = network(x, t, cond)
    for control in [
        (),
        (None,) * 6,
        (None, None),
        ControlNet(EFFNET).eval()(torch.rand(2, 1, 8, 8)),
    ]:
        told = network(x, t, dataclasses.replace(cond, control=control))
        assert torch.equal(told, plain)


def test_a_map_is_added_before_the_residual_block_of_its_number():
    network, cond, x, t = steered_stage_c()
    blocks = [block for level in (*network.down_blocks, *network.up_blocks) for block in level]
    before: list[Tensor] = []
    seen: list[Tensor] = []
    for block in blocks:
        block.residual.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(x, t, cond)
        before[:], seen[:] = seen, []
        for number, width in enumerate(STAGE_C.block_channels):
            one = torch.randn(2, width, 3, 5)
            network(x, t, dataclasses.replace(cond, control=(*(None,) * number, one)))
            resized = F.interpolate(one, size=(6, 4), mode="bilinear", align_corners=True)
            for earlier in range(number):
                assert torch.equal(seen[earlier], before[earlier])
            torch.testing.assert_close(seen[number], before[number] + resized)
            seen.clear()


def test_a_prepared_control_is_the_same_control():
    network, cond, x, t = steered_stage_c()
    maps = randomised(ControlNet(EFFNET))(torch.rand(2, 1, 24, 40))
    told = dataclasses.replace(cond, control=maps)
    assert torch.equal(network(x, t, network.prepare(told)), network(x, t, told))
    assert not torch.equal(network(x, t, told), network(x, t, cond))


def test_stage_c_teaches_a_controlnet_through_its_projections_of_zero():
    network, cond, x, t = steered_stage_c()
    control = ControlNet(EFFNET).eval()
    maps = control(torch.rand(2, 1, 24, 40))
    network(x, t, dataclasses.replace(cond, control=maps)).square().sum().backward()
    for projection in control.projections:
        assert projection.out.weight.grad is not None and projection.out.weight.grad.any()


def test_maps_for_another_stage_c_are_refused():
    network, cond, _, _ = steered_stage_c()
    with pytest.raises(ValueError, match="7 residual blocks, but this Stage C has 6"):
        network.prepare(dataclasses.replace(cond, control=(None,) * 7))
    wrong = (None, torch.zeros(2, 8, 3, 3))
    with pytest.raises(ValueError, match="block 1 has 8 channels, but this Stage C has 12"):
        network.prepare(dataclasses.replace(cond, control=wrong))


def test_a_controlnet_takes_the_widths_of_another_stage_c():
    config = dataclasses.replace(EFFNET, out_channels=(1, 1, 1)).steering(STAGE_C.block_channels)
    assert config.out_channels == (8, 12, 8)
    with pytest.raises(ValueError, match="Stage C of 32 blocks"):
        ControlNetConfig.canny().steering(StageCConfig.lite().block_channels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bottleneck": "huge"}, "bottleneck='huge'"),
        ({"blocks": ()}, r"blocks=\(\)"),
        ({"blocks": (0, 2, 2)}, "different numbers"),
        ({"blocks": (-1, 2, 5)}, "different numbers"),
        ({"blocks": (0, 2)}, "one entry per block"),
        ({"out_channels": (8, 0, 8)}, r"out_channels=\(8, 0, 8\)"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"residual_blocks": 0}, "residual_blocks=0"),
        ({"bottleneck": "simple"}, "feature_channels=10 must equal in_channels=1"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EFFNET, **change)


def test_the_published_blocks_are_those_of_the_full_stage_c():
    assert len(ALL_BLOCKS) == len(StageCConfig.full().block_channels) == max(PUBLISHED_BLOCKS) + 1
