from __future__ import annotations

import pytest
import torch
from torch import nn

from stages.discriminator import Discriminator, DiscriminatorConfig


def test_the_published_network_has_the_published_count():
    with torch.device("meta"):
        network = Discriminator(DiscriminatorConfig())
        assert network(torch.empty(1, 3, 256, 192)).shape == (1, 1, 4, 3)
    assert sum(parameter.numel() for parameter in network.parameters()) == 6_271_105


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47)])
def test_there_is_one_logit_per_patch(height, width):
    config = DiscriminatorConfig(channels=(4, 8, 8))
    logits = Discriminator(config)(torch.rand(2, 3, height, width))
    assert logits.shape == (2, 1, -(-height // 8), -(-width // 8))
    assert config.stride == 8


def test_probabilities_are_the_sigmoid_of_the_logits():
    config = DiscriminatorConfig(channels=(4, 8))
    logits = Discriminator(config).eval()
    probabilities = Discriminator(DiscriminatorConfig(channels=(4, 8), sigmoid=True)).eval()
    probabilities.load_state_dict(logits.state_dict())
    pixels = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(probabilities(pixels), logits(pixels).sigmoid())


def test_every_convolution_keeps_to_spectral_norm_one():
    torch.manual_seed(0)
    network = Discriminator(DiscriminatorConfig(channels=(4, 8, 8)))
    for _ in range(200):  # power iterations
        network(torch.rand(1, 3, 16, 16))
    network.eval()
    for conv in network.layers:
        norm = torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)
        torch.testing.assert_close(norm, torch.tensor(1.0), atol=1e-3, rtol=0)


def test_the_norm_between_layers_is_instance_norm():
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(nn.functional.group_norm(x, 8), nn.InstanceNorm2d(8)(x))


def test_gradients_reach_every_parameter_and_the_pixels():
    torch.manual_seed(0)
    network = Discriminator(DiscriminatorConfig(channels=(4, 8, 8), cond_channels=5))
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    network(pixels, torch.randn(2, 5)).square().mean().backward()
    assert pixels.grad.abs().sum() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # Instance norm takes the mean out again, so that biases before it have no effect.
        if not name.endswith("bias") or name in ("layers.0.bias", "to_logits.bias"):
            assert parameter.grad.abs().sum() > 0, name


def test_a_missing_or_unwanted_condition_is_refused():
    pixels = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="no condition was given"):
        Discriminator(DiscriminatorConfig(channels=(4,), cond_channels=5))(pixels)
    with pytest.raises(ValueError, match="a condition of 5 was given"):
        Discriminator(DiscriminatorConfig(channels=(4,)))(pixels, torch.randn(1, 5))
    with pytest.raises(ValueError, match="channels=\\(\\)"):
        DiscriminatorConfig(channels=())
