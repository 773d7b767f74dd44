from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

TINY = AutoencoderKLConfig(
    channels=(8, 16, 24), blocks_per_level=1, latent_channels=3, norm_groups=4
)


def randomised(network: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(noise + (parameter if parameter.ndim == 1 else 0))
    return network.eval()


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_published_network_has_the_published_counts():
    with torch.device("meta"):
        network = AutoencoderKL(AutoencoderKLConfig.sdxl())
    assert num_parameters(network) == 83_653_863
    assert num_parameters(network.encoder) == 34_163_592
    assert num_parameters(network.decoder) == 49_490_179
    assert network.downscale == 8
    assert AutoencoderKLConfig.sd().scale == 0.18215
    assert AutoencoderKLConfig.sdxl().scale == 0.13025
    assert AutoencoderKLConfig.sdxl().shift == AutoencoderKLConfig.sd().shift == 0


def test_published_shapes_at_1024_pixels():
    with torch.device("meta"):
        network = AutoencoderKL(AutoencoderKLConfig.sdxl())
        latents = network.encode(torch.empty(1, 3, 1024, 1024))
        assert latents.shape == (1, 4, 128, 128)
        assert network.decode(latents).shape == (1, 3, 1024, 1024)


# Parity


def diffusers_network(config: AutoencoderKLConfig) -> Any:
    from diffusers import AutoencoderKL as Theirs

    levels = len(config.channels)
    return Theirs(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        use_quant_conv=config.quant_convs,
        use_post_quant_conv=config.quant_convs,
        scaling_factor=config.scale,
        shift_factor=config.shift,
    )


def off_by(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.reference
@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, blocks_per_level=2, scale=0.5, shift=0.25),
        dataclasses.replace(TINY, quant_convs=False, latent_channels=5),
        AutoencoderKLConfig(channels=(16, 32, 64, 64), norm_groups=16),
    ],
)
def test_both_ways_equal_those_of_diffusers(config):
    theirs = randomised(diffusers_network(config))
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.rand(2, 3, 16, 24)

    expected = theirs.encode(2 * pixels - 1).latent_dist
    posterior = ours.posterior(pixels)
    assert off_by(posterior.mean, expected.mean) < 1e-5
    assert off_by(posterior.log_variance, expected.logvar) < 1e-5
    assert off_by(posterior.std, expected.std) < 1e-5
    latents = (expected.mean - config.shift) * config.scale
    assert off_by(ours.encode(pixels), latents) < 1e-5
    latents = config.scale * torch.randn(latents.shape)
    decoded = theirs.decode(latents / config.scale + config.shift).sample  # as pipelines do
    assert off_by(ours.decode(latents), decoded / 2 + 0.5) < 1e-5


@pytest.mark.reference
def test_keys_and_shapes_at_full_size_are_those_of_diffusers():
    config = AutoencoderKLConfig.sd()
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), diffusers_network(config)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    for name, module in ours.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == theirs.get_submodule(name).eps, name


# What it does


def test_a_sample_is_the_mean_and_noise_of_the_deviation():
    network = randomised(AutoencoderKL(dataclasses.replace(TINY, scale=0.5, shift=0.2)))
    pixels = torch.rand(1, 3, 8, 12)
    posterior = network.posterior(pixels)
    mean = network.encode(pixels)
    torch.testing.assert_close(mean, (posterior.mean - 0.2) * 0.5)
    sample = network.encode(pixels, randn_like=torch.ones_like)
    torch.testing.assert_close(sample - mean, 0.5 * posterior.std)


def test_variances_are_clamped():
    gaussian = DiagonalGaussian.of_moments(torch.tensor([0.0, 1.0, -99.0, 99.0]).view(1, 4, 1, 1))
    assert gaussian.mean.flatten().tolist() == [0.0, 1.0]
    assert gaussian.log_variance.flatten().tolist() == [-30.0, 20.0]


def test_decode_undoes_scale_and_shift():
    network = randomised(AutoencoderKL(TINY))
    other = AutoencoderKL(dataclasses.replace(TINY, scale=3.0, shift=-0.7)).eval()
    other.load_state_dict(network.state_dict())
    pixels = torch.rand(1, 3, 8, 12)
    assert (network.encode(pixels) - other.encode(pixels)).abs().max() > 0.1
    torch.testing.assert_close(
        network.decode(network.encode(pixels)), other.decode(other.encode(pixels))
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_float32(autocast):
    network = randomised(AutoencoderKL(TINY))
    pixels = torch.rand(1, 3, 16, 16)
    latents = network.encode(pixels)
    decoded = network.decode(latents)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = network.encode(pixels), network.decode(latents)
    else:
        network.bfloat16()
        found = network.encode(pixels), network.decode(latents)
    for actual, expected in zip(found, (latents, decoded), strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).abs().max() < 0.1 * expected.std()


def test_gradients_reach_every_parameter():
    network = randomised(AutoencoderKL(TINY))
    latents = network.encode(torch.rand(2, 3, 8, 12), randn_like=torch.randn_like)
    network.decode(latents).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="18x16: both sides must be multiples of 4"):
        AutoencoderKL(TINY).encode(torch.rand(1, 3, 18, 16))
    for change, message in (
        ({"channels": ()}, "one for each level"),
        ({"norm_groups": 5}, "norm_groups=5 does not divide"),
        ({"blocks_per_level": 0}, "blocks_per_level=0"),
        ({"scale": 0.0}, "scale"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)
