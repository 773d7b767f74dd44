"""Toy forms of every published U-Net, and the network of diffusers for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from stages.unet.config import UNetConfig
from stages.unet.unet import UNetCondition

PUBLISHED: dict[str, UNetConfig] = {
    "sdxl": UNetConfig.sdxl(),
    "bk_sdxl_base": UNetConfig.bk_sdxl_base(),
    "koala_1b": UNetConfig.koala_1b(),
    "koala_700m": UNetConfig.koala_700m(),
    "ssd_1b": UNetConfig.ssd_1b(),
    "vega": UNetConfig.vega(),
    "sd15": UNetConfig.sd15(),
    "bk_base": UNetConfig.bk_base(),
    "bk_small": UNetConfig.bk_small(),
    "bk_tiny": UNetConfig.bk_tiny(),
    "sd21": UNetConfig.sd21(),
    "bk_v2_base": UNetConfig.bk_v2_base(),
    "bk_v2_small": UNetConfig.bk_v2_small(),
    "bk_v2_tiny": UNetConfig.bk_v2_tiny(),
}


def toy_of(config: UNetConfig) -> UNetConfig:
    """The same structure, ten times as narrow: all depths, heads in their ratio, all switches."""
    added = config.text_pooled_channels is not None
    return replace(
        config,
        channels=tuple(width // 10 for width in config.channels),
        num_heads=tuple(max(1, heads // 5) if added else 4 for heads in config.num_heads),
        text_channels=24,
        text_pooled_channels=20 if added else None,
        size_channels=8 if added else None,
        norm_groups=8,
    )


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


def diffusers_arguments(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of a network of this shape."""

    def depth_of(depths: tuple[int, ...]) -> int | list[int]:
        return (depths[0] or 1) if len(set(depths)) == 1 else list(depths)

    def attends(depths: tuple[int, ...]) -> str:
        return "CrossAttn" if any(depths) else ""

    middle = None if config.mid_depth is None else "UNetMidBlock2DCrossAttn"
    arguments: dict[str, Any] = dict(
        block_out_channels=config.channels,
        attention_head_dim=config.num_heads,
        layers_per_block=[len(depths) for depths in config.down_depths],
        down_block_types=[f"{attends(d)}DownBlock2D" for d in config.down_depths],
        up_block_types=[f"{attends(d)}UpBlock2D" for d in config.up_depths],
        mid_block_type="UNetMidBlock2D" if config.mid_depth == 0 else middle,
        transformer_layers_per_block=[depth_of(d) for d in config.down_depths],
        reverse_transformer_layers_per_block=[depth_of(d) for d in config.up_depths],
        cross_attention_dim=config.text_channels,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
    )
    if config.size_channels is not None and config.text_pooled_channels is not None:
        arguments |= dict(
            addition_embed_type="text_time",
            addition_time_embed_dim=config.size_channels,
            projection_class_embeddings_input_dim=(
                config.text_pooled_channels + 6 * config.size_channels
            ),
        )
    return arguments


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
