"""Convolutional parts that the U-Nets and their autoencoder share.

Attributes are named as in the published files, which therefore load without renaming.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from stages.linear import Linear
from stages.overwrite import add, silu


class ProjectedTime(NamedTuple):
    """What a resnet makes of one time."""

    shift: Tensor
    """(B, C_out, 1, 1)."""


class ResnetBlock(nn.Module):
    """Two normed convolutions with a residual, told the time in between.

    Group norms compute their statistics in float32 in every number format.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        *,
        time_channels: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        """Take the widths; ``time_channels`` is None where there is no time to tell."""
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        if time_channels is not None:
            self.time_emb_proj = Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def project_time(self, time: Tensor) -> ProjectedTime:
        """Return what this resnet makes of a time, ``(B, time_channels)``, activated."""
        return ProjectedTime(self.time_emb_proj(time)[:, :, None, None])

    def forward(self, x: Tensor, time: Tensor | ProjectedTime | None = None) -> Tensor:
        """Return ``(B, C_out, H, W)``.

        Args:
            x: ``(B, C_in, H, W)``.
            time: ``(B, time_channels)``, already through its activation, which is the same for
                every resnet of a network, or what this one makes of it.
        """
        h = self.conv1(silu(self.norm1(x)))
        if time is not None:
            projected = self.project_time(time) if isinstance(time, Tensor) else time
            h = add(h, projected.shift)
        h = self.conv2(silu(self.norm2(h)))
        return add(h, x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Convolution of stride 2; an odd side is rounded up."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        """Take the width; ``asymmetric`` pads below and to the right alone, for even sides."""
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        """Take the width."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C, *size), which is one less than twice where it had been odd."""
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
