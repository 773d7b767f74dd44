"""ControlNet of Stage C: a picture's edges, hole or small version -> what its blocks are told.

Unlike the ControlNet of the paper it is no copy of the network that it steers: one small feature
extractor, and a projection for each residual block that listens. The last layer of a projection
starts at zero, so that a new ControlNet changes nothing.

Reference: Zhang et al., 2023, arXiv:2302.05543, for the idea and the zero convolution; sizes are
those of the checkpoints published with Stable Cascade, which no paper describes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.semantic_compressor import (
    EFFICIENTNET_V2_S,
    CompressorConfig,
    Trunk,
    TrunkStage,
)

Bottleneck = Literal["effnet", "large", "simple"]

PUBLISHED_BLOCKS = (0, 4, 8, 12, 51, 55, 59, 63)
"""Residual blocks of the 3.6B Stage C that the published ControlNets steer."""
ALL_BLOCKS = tuple(range(64))
"""Every residual block of the 3.6B Stage C."""
_SIZES = (
    "in_channels",
    "feature_channels",
    "stem_channels",
    "residual_channels",
    "residual_blocks",
)
_NORM_EPS = 1e-5
_LEAK = 0.2


@dataclass(frozen=True)
class ControlNetConfig:
    """Sizes of a ControlNet; the defaults are the published one for edges (54,255,776)."""

    in_channels: int = 1
    """Channels of the signal: 1 edges, 4 picture and mask, 16 compressed picture."""
    bottleneck: Bottleneck = "effnet"
    """The feature extractor. "effnet": EfficientNetV2, which divides the size by 32; "large" and
    "simple": convolutions at the size of the signal."""
    blocks: tuple[int, ...] = PUBLISHED_BLOCKS
    """Residual blocks of Stage C that are steered, counted in running order."""
    out_channels: tuple[int, ...] = (2048,) * len(PUBLISHED_BLOCKS)
    """Width of Stage C in each of these blocks."""
    feature_channels: int = 1280
    """Width of the features; "simple" keeps that of the signal."""
    stem_channels: int = 24
    """Width after the first convolution: published are 24, "large" 16384, "simple" 2048."""
    stages: tuple[TrunkStage, ...] = EFFICIENTNET_V2_S
    """Stages of "effnet"; the others have none."""
    residual_channels: int = 1024
    """Width of the residual blocks of "large"."""
    residual_blocks: int = 8
    """Number of the residual blocks of "large"."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.bottleneck not in ("effnet", "large", "simple"):
            raise ValueError(
                f"bottleneck={self.bottleneck!r} must be 'effnet', 'large' or 'simple'"
            )
        if not self.blocks or min(self.blocks) < 0 or len(set(self.blocks)) < len(self.blocks):
            raise ValueError(f"blocks={self.blocks} must be different numbers from 0 on")
        if len(self.out_channels) != len(self.blocks):
            raise ValueError(
                f"out_channels={self.out_channels} and blocks={self.blocks} must have one entry "
                "per block"
            )
        if min(self.out_channels) < 1:
            raise ValueError(f"out_channels={self.out_channels} must be positive")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.bottleneck == "simple" and self.feature_channels != self.in_channels:
            raise ValueError(
                f"feature_channels={self.feature_channels} must equal "
                f"in_channels={self.in_channels} in a 'simple' bottleneck"
            )

    @classmethod
    def canny(cls) -> ControlNetConfig:
        """Return the published ControlNet for edges."""
        return cls()

    @classmethod
    def inpainting(cls) -> ControlNetConfig:
        """Return the published ControlNet for holes (54,256,424 parameters)."""
        return cls(in_channels=4)

    @classmethod
    def super_resolution(cls) -> ControlNetConfig:
        """Return the published ControlNet for twice the size (203,491,584 parameters)."""
        return cls(in_channels=16, bottleneck="large", stem_channels=16384)

    @classmethod
    def identity(cls) -> ControlNetConfig:
        """Return the ControlNet for faces (102,763,008); its weights were withdrawn."""
        return cls(
            in_channels=512,
            bottleneck="simple",
            blocks=ALL_BLOCKS,
            out_channels=(2048,) * len(ALL_BLOCKS),
            feature_channels=512,
            stem_channels=2048,
        )

    def steering(self, block_channels: tuple[int, ...]) -> ControlNetConfig:
        """Return this configuration for another Stage C.

        Args:
            block_channels: ``StageCConfig.block_channels`` of that Stage C.

        Raises:
            ValueError: If it has fewer blocks than this ControlNet steers.
        """
        if max(self.blocks) >= len(block_channels):
            raise ValueError(
                f"blocks={self.blocks} are not all in a Stage C of {len(block_channels)} blocks"
            )
        return replace(self, out_channels=tuple(block_channels[block] for block in self.blocks))

    @property
    def stride(self) -> int:
        """Side of the signal per cell of the features: 32 for "effnet", 1 for the others."""
        return self.trunk.stride if self.bottleneck == "effnet" else 1

    @property
    def trunk(self) -> CompressorConfig:
        """Sizes of the trunk of "effnet"."""
        return CompressorConfig(
            stem_channels=self.stem_channels,
            stages=self.stages,
            head_channels=self.feature_channels,
        )


class AffineLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of ``(B, C, H, W)``, with gain and shift."""

    def __init__(self, channels: int) -> None:
        """Take the number of channels."""
        super().__init__(channels, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized tensor."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ControlBlock(nn.Module):
    """Residual block of "large": twice norm, GELU and a dense convolution."""

    def __init__(self, channels: int) -> None:
        """Take the width."""
        super().__init__()
        self.norm_in = AffineLayerNorm2d(channels)
        self.conv_in = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.norm_out = AffineLayerNorm2d(channels)
        self.conv_out = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        h = self.conv_in(F.gelu(self.norm_in(x)))
        return x + self.conv_out(F.gelu(self.norm_out(h)))


class LargeBottleneck(nn.Module):
    """A wide 1x1 layer, dense residual blocks, a 1x1 convolution."""

    def __init__(self, config: ControlNetConfig) -> None:
        """Build the extractor of ``config``."""
        super().__init__()
        width = config.residual_channels
        self.stem = nn.Conv2d(config.in_channels, config.stem_channels, kernel_size=1)
        self.narrow = nn.Conv2d(config.stem_channels, width, kernel_size=1)
        self.blocks = nn.Sequential(*(ControlBlock(width) for _ in range(config.residual_blocks)))
        self.head = nn.Conv2d(width, config.feature_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_features, H, W)."""
        return self.head(self.blocks(self.narrow(F.leaky_relu(self.stem(x), _LEAK))))


class SimpleBottleneck(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, config: ControlNetConfig) -> None:
        """Build the extractor of ``config``."""
        super().__init__()
        width, hidden = config.in_channels, config.stem_channels
        self.stem = nn.Conv2d(width, hidden, kernel_size=3, padding=1)
        self.head = nn.Conv2d(hidden, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return self.head(F.leaky_relu(self.stem(x), _LEAK))


class ControlProjection(nn.Module):
    """Features -> what one residual block of Stage C is told; nothing at first."""

    def __init__(self, feature_channels: int, out_channels: int) -> None:
        """Take both widths."""
        super().__init__()
        self.mix = nn.Conv2d(feature_channels, feature_channels, kernel_size=1, bias=False)
        self.out = nn.Conv2d(feature_channels, out_channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_features, h, w) -> (B, C_out, h, w)."""
        return self.out(F.leaky_relu(self.mix(features), _LEAK))


class ControlNet(nn.Module):
    """The signal's features, projected for every steered block.

    Published training keeps the batch norms of "effnet" in evaluation mode.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        """Build the ControlNet of ``config`` with random features and projections of zero."""
        super().__init__()
        self.config = config
        self.backbone: nn.Module
        if config.bottleneck == "effnet":
            self.backbone = _trunk(config)
        elif config.bottleneck == "large":
            self.backbone = LargeBottleneck(config)
        else:
            self.backbone = SimpleBottleneck(config)
        self.projections = nn.ModuleList(
            ControlProjection(config.feature_channels, width) for width in config.out_channels
        )

    def forward(self, signal: Tensor) -> tuple[Tensor | None, ...]:
        """Tell the blocks of Stage C what to keep to.

        Args:
            signal: ``(B, in_channels, H, W)``, of about ``stride`` times Stage C's latent size;
                pictures and edges as they are, in [0, 1], without normalisation.

        Returns:
            One entry per residual block in running order, up to the last one that is steered:
            ``(B, C, H / stride, W / stride)``, or None where nothing is added.
        """
        dtype = next(self.parameters()).dtype
        x = signal.to(dtype).contiguous(memory_format=torch.channels_last)
        features = self.backbone(x)
        maps: list[Tensor | None] = [None] * (1 + max(self.config.blocks))
        for block, project in zip(self.config.blocks, self.projections, strict=True):
            maps[block] = project(features)
        return tuple(maps)


def _trunk(config: ControlNetConfig) -> Trunk:
    trunk = Trunk(config.trunk)
    if config.in_channels != 3:
        # The published first convolution has no padding here, unlike that for pictures.
        trunk.stem.conv = nn.Conv2d(
            config.in_channels, config.stem_channels, kernel_size=3, stride=2, bias=False
        )
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return trunk
