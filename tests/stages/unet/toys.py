"""Toy forms of every published U-Net, and what diffusers calls their sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stages.unet.config import UNetConfig

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


def toy_of(config: UNetConfig, divisor: int = 10) -> UNetConfig:
    """The same structure, many times as narrow: all depths, heads in their ratio, all switches."""
    added = config.text_pooled_channels is not None
    return replace(
        config,
        channels=tuple(width // divisor for width in config.channels),
        num_heads=tuple(max(1, heads // 5) if added else 4 for heads in config.num_heads),
        text_channels=24,
        text_pooled_channels=20 if added else None,
        size_channels=8 if added else None,
        norm_groups=8,
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
