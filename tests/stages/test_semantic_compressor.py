from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from stages.semantic_compressor import (
    CompressorConfig,
    SemanticCompressor,
    Trunk,
    TrunkBlock,
    TrunkStage,
)

TINY = CompressorConfig(
    stem_channels=8,
    stages=(
        TrunkStage("fused", 1, 3, 1, 8, 2),
        TrunkStage("fused", 2, 3, 2, 12, 2),
        TrunkStage("mb", 2, 3, 2, 16, 2),
        TrunkStage("mb", 1, 5, 1, 16, 1),
    ),
    head_channels=24,
    latent_channels=4,
)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def num_buffer_scalars(module: nn.Module) -> int:
    return sum(buffer.numel() for buffer in module.buffers())


def test_the_published_networks_have_the_published_counts():
    with torch.device("meta"):
        v2, v3 = SemanticCompressor(CompressorConfig.v2()), SemanticCompressor(CompressorConfig())
    assert num_parameters(v3.trunk) == 20_177_488
    assert num_parameters(v2) == 20_198_000
    assert num_parameters(v3) == 20_197_968
    assert num_buffer_scalars(v3) == 154_015
    assert len(v3.state_dict()) == 784
    assert len(v2.state_dict()) == 786
    assert v3.stride == 32


def test_the_trunk_of_the_first_generation_is_a_configuration_too():
    # EfficientNetV2-L, table 4 of arXiv:2104.00298 as torchvision builds it.
    large = CompressorConfig(
        stem_channels=32,
        stages=(
            TrunkStage("fused", 1, 3, 1, 32, 4),
            TrunkStage("fused", 4, 3, 2, 64, 7),
            TrunkStage("fused", 4, 3, 2, 96, 7),
            TrunkStage("mb", 4, 3, 2, 192, 10),
            TrunkStage("mb", 6, 3, 1, 224, 19),
            TrunkStage("mb", 6, 3, 2, 384, 25),
            TrunkStage("mb", 6, 3, 1, 640, 7),
        ),
        affine=True,
    )
    with torch.device("meta"):
        assert num_parameters(SemanticCompressor(large)) == 117_254_784


@pytest.mark.parametrize(("size", "cells"), [(384, 12), (768, 24), (1024, 32)])
def test_published_latent_sizes(size, cells):
    with torch.device("meta"):
        network = SemanticCompressor(CompressorConfig())
        assert network(torch.empty(1, 3, size, size)).shape == (1, 16, cells, cells)


def test_a_picture_of_1024_pixels_becomes_24_cells():
    assert CompressorConfig().input_size((1024, 1024)) == (768, 768)
    assert CompressorConfig().latent_size((1024, 1024)) == (24, 24)
    with torch.device("meta"):
        latents = SemanticCompressor(CompressorConfig()).encode(torch.empty(1, 3, 1024, 1024))
    assert latents.shape == (1, 16, 24, 24)


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 40), (8, 9)])
def test_the_configuration_foretells_the_size_of_the_latents(height, width):
    network = SemanticCompressor(TINY).eval()
    latents = network.encode(torch.rand(2, 3, height, width))
    assert latents.shape == (2, 4, *TINY.latent_size((height, width)))
    latents = network(torch.rand(2, 3, height, width))
    assert latents.shape == (2, 4, -(-height // 8), -(-width // 8))


def test_pixels_are_normalised_with_the_configured_constants():
    network = SemanticCompressor(TINY).eval()
    seen = []
    network.trunk.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    network(torch.tensor(TINY.pixel_mean).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    network(torch.ones(1, 3, 8, 8))
    assert seen[0].abs().max() < 1e-6
    expected = (1 - torch.tensor(TINY.pixel_mean)) / torch.tensor(TINY.pixel_std)
    torch.testing.assert_close(seen[1][0, :, 0, 0], expected)


def test_v2_latents_are_shifted_and_scaled_and_raw_undoes_it():
    plain = SemanticCompressor(TINY).eval()
    scaled = SemanticCompressor(dataclasses.replace(TINY, shift=1.0, scale=42.0)).eval()
    scaled.load_state_dict(plain.state_dict())
    pixels = torch.rand(1, 3, 24, 24)
    z = plain(pixels)
    torch.testing.assert_close(scaled(pixels), (z + 1) / 42)
    torch.testing.assert_close(scaled.raw(scaled(pixels)), z, atol=1e-5, rtol=1e-4)
    assert CompressorConfig.v2().shift == 1.0 and CompressorConfig.v2().scale == 42.0


def test_latents_of_a_training_batch_have_unit_variance():
    latents = SemanticCompressor(TINY)(torch.rand(8, 3, 32, 32))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        latents.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-2, rtol=0
    )


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, affine=True, stochastic_depth=0.0)
    network = SemanticCompressor(config)
    (network(torch.rand(4, 3, 40, 32)) * torch.randn(4, 4, 5, 4)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_stochastic_depth_keeps_or_drops_whole_branches_in_training_only():
    torch.manual_seed(0)
    block = TrunkBlock(8, TINY.stages[0], stride=1, drop=0.5)
    x = torch.randn(64, 8, 4, 4)
    branches = block(x) - x
    block.drop = 0.0
    full = block(x) - x
    kept = branches.flatten(1).abs().sum(1) > 1e-3
    assert 10 < kept.sum() < 54
    torch.testing.assert_close(branches[kept], 2 * full[kept], atol=1e-5, rtol=1e-4)
    block.eval()
    without = block(x)
    block.drop = 0.9
    assert torch.equal(block(x), without)


def test_stochastic_depth_grows_over_the_blocks_and_can_be_off():
    trunk = Trunk(TINY)
    drops = [module.drop for module in trunk.modules() if isinstance(module, TrunkBlock)]
    assert drops == pytest.approx([0.2 * index / 7 for index in range(7)])
    network = SemanticCompressor(dataclasses.replace(TINY, stochastic_depth=0.0))
    pixels = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(network(pixels), network(pixels))


def test_evaluation_mode_is_independent_of_the_batch():
    network = SemanticCompressor(TINY)
    network(torch.rand(8, 3, 32, 32))
    network.eval()
    pixels = torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(network(pixels)[:1], network(pixels[:1]), atol=1e-5, rtol=1e-4)


def test_norms_of_the_trunk_use_the_published_constants():
    network = SemanticCompressor(TINY)
    norms = [module for module in network.trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.1)}
    assert network.norm.eps == 1e-5


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="kind='dense'"):
        TrunkStage("dense", 1, 3, 1, 8, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel=4 must be odd"):
        TrunkStage("mb", 1, 4, 1, 8, 1)
    with pytest.raises(ValueError, match="at least 1"):
        TrunkStage("mb", 1, 3, 1, 8, 0)
    with pytest.raises(ValueError, match="at least one stage"):
        CompressorConfig(stages=())
    with pytest.raises(ValueError, match="input_fraction=0"):
        CompressorConfig(input_fraction=0)
    with pytest.raises(ValueError, match="stochastic_depth=1"):
        CompressorConfig(stochastic_depth=1.0)
    with pytest.raises(ValueError, match="scale=0"):
        CompressorConfig(scale=0.0)
    with pytest.raises(ValueError, match="head_channels=0"):
        CompressorConfig(head_channels=0)
