"""Fixtures of the U-Nets' tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stages.unet.config import UNetConfig
from stages.unet.unet import UNetCondition
from tests.stages.unet.toys import PUBLISHED, diffusers_arguments, toy_of


@pytest.fixture(params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> UNetConfig:
    """Every published shape at full size."""
    return PUBLISHED[request.param]


@pytest.fixture
def toy(published: UNetConfig) -> UNetConfig:
    """Every published shape, narrow."""
    return toy_of(published)


@pytest.fixture
def small() -> UNetConfig:
    """All kinds of layers in the smallest network that has them."""
    return UNetConfig(
        channels=(8, 16),
        num_heads=(1, 2),
        down_depths=((0, 1), (2,)),
        mid_depth=1,
        up_depths=((1, 0), (2, 0, 1)),
        text_channels=6,
        text_pooled_channels=5,
        size_channels=4,
        norm_groups=4,
    )


@pytest.fixture
def diffusers_unet() -> Callable[[UNetConfig], nn.Module]:
    """Build the network of diffusers of a shape of ours."""

    def build(config: UNetConfig) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(**diffusers_arguments(config)).eval()

    return build


def _condition(config: UNetConfig, batch: int = 2) -> UNetCondition:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 7, config.text_channels, generator=generator)
    if config.text_pooled_channels is None:
        return UNetCondition(text)
    pooled = torch.randn(batch, config.text_pooled_channels, generator=generator)
    sizes = torch.tensor([[1024, 768, 0, 13, 1024, 1024], [333, 4096, 5, 0, 512, 768]])[:batch]
    return UNetCondition(text, pooled, sizes)


@pytest.fixture
def condition() -> Callable[..., UNetCondition]:
    """Make what a network is told."""
    return _condition


def _randomise(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            noise = torch.randn(parameter.shape, generator=generator)
            # Vectors are biases and gains: around 0 and 1, as before.
            kept = parameter if parameter.ndim == 1 else 0
            parameter.copy_(kept + noise / max(fan_in, 1) ** 0.5)


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Give every parameter a value of its own, the zero-initialised ones too."""
    return _randomise
