"""Previewer: a small decoder from Stage C latents straight to a rough picture.

It shows what Stage C is doing, without Stage B and Stage A. 24 x 24 latents -> 192 x 192 pixels.

Reference: published with Stable Cascade (v3); the paper does not describe it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PreviewerConfig:
    """Sizes of the previewer; the defaults are the published network (3,979,651 parameters)."""

    latent_channels: int = 16
    """Channels of the Stage C latents."""
    channels: tuple[int, ...] = (512, 256, 128, 128)
    """Width at each resolution, the latents' own first; every further one doubles the size."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if not self.channels or min(self.latent_channels, *self.channels) < 1:
            raise ValueError(
                f"latent_channels={self.latent_channels} and channels={self.channels} must be "
                "positive, with at least one width"
            )

    @property
    def upscale(self) -> int:
        """Preview pixels per latent cell along one side: 8 as published."""
        return 2 ** (len(self.channels) - 1)


class ConvActNorm(nn.Module):
    """A convolution, GELU, then batch norm, in this order."""

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        """Wrap ``conv``."""
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> what the convolution makes of that."""
        return self.norm(F.gelu(self.conv(x)))


class Previewer(nn.Module):
    """Stage C latents -> a small picture."""

    def __init__(self, config: PreviewerConfig) -> None:
        """Build the previewer of ``config``."""
        super().__init__()
        self.config = config
        first = config.channels[0]
        self.blocks = nn.Sequential(
            ConvActNorm(nn.Conv2d(config.latent_channels, first, kernel_size=1)),
            ConvActNorm(nn.Conv2d(first, first, kernel_size=3, padding=1)),
        )
        for width, next_width in zip(config.channels[:-1], config.channels[1:], strict=True):
            upsample = nn.ConvTranspose2d(width, next_width, kernel_size=2, stride=2)
            self.blocks.append(ConvActNorm(upsample))
            refine = nn.Conv2d(next_width, next_width, kernel_size=3, padding=1)
            self.blocks.append(ConvActNorm(refine))
        self.to_pixels = nn.Conv2d(config.channels[-1], 3, kernel_size=1)

    def forward(self, stage_c_latents: Tensor) -> Tensor:
        """Decode latents (B, 16, h, w) into pixels (B, 3, 8h, 8w), about [0, 1], not clamped."""
        x = stage_c_latents.contiguous(memory_format=torch.channels_last)
        return self.to_pixels(self.blocks(x))
