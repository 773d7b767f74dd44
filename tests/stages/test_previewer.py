from __future__ import annotations

import pytest
import torch

from stages.previewer import Previewer, PreviewerConfig


def test_the_published_network_has_the_published_counts():
    with torch.device("meta"):
        network = Previewer(PreviewerConfig())
        assert network(torch.empty(1, 16, 24, 24)).shape == (1, 3, 192, 192)
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_979_651
    assert len(network.state_dict()) == 58


@pytest.mark.parametrize("channels", [(8,), (8, 6), (12, 8, 4)])
def test_any_number_of_levels_and_odd_sizes_work(channels):
    config = PreviewerConfig(latent_channels=4, channels=channels)
    pixels = Previewer(config)(torch.randn(2, 4, 5, 3))
    assert pixels.shape == (2, 3, 5 * config.upscale, 3 * config.upscale)
    assert config.upscale == 2 ** (len(channels) - 1)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    network = Previewer(PreviewerConfig(latent_channels=4, channels=(8, 6, 4)))
    network(torch.randn(2, 4, 3, 3)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_sizes_that_cannot_be_built_are_refused():
    with pytest.raises(ValueError, match="channels=\\(\\)"):
        PreviewerConfig(channels=())
