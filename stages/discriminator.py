"""Patch discriminator for the adversarial part of Stage A's training.

Every output cell judges its own patch of the picture, real or reconstructed.

Reference: Isola et al., 2017, arXiv:1611.07004, section 3.2.2; Miyato et al., 2018,
arXiv:1802.05957, for the spectral norm. The sizes are those of Paella's VQGAN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminator; the defaults are published (6,271,105 parameters)."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512, 512)
    """Width of each convolution; each halves height and width. Pictures below 128 px need fewer:
    instance norm over a single cell leaves nothing."""
    cond_channels: int = 0
    """Channels of a condition joined before the last layer; 0: none."""
    sigmoid: bool = False
    """Return probabilities, as published, instead of logits."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if not self.channels or min(self.channels) < 1 or self.cond_channels < 0:
            raise ValueError(
                f"channels={self.channels} must be positive, at least one, and "
                f"cond_channels={self.cond_channels} must not be negative"
            )

    @property
    def stride(self) -> int:
        """Pixels per output cell along one side: 64 as published."""
        return 2 ** len(self.channels)


class Discriminator(nn.Module):
    """Pixels -> one logit per patch."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        """Build the discriminator of ``config``."""
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        width = 3
        for next_width in config.channels:
            conv = nn.Conv2d(width, next_width, kernel_size=3, stride=2, padding=1)
            self.layers.append(spectral_norm(conv))
            width = next_width
        self.to_logits = nn.Conv2d(width + config.cond_channels, 1, kernel_size=1)

    def forward(self, pixels: Tensor, cond: Tensor | None = None) -> Tensor:
        """Judge patches.

        Args:
            pixels: (B, 3, H, W) in [0, 1].
            cond: (B, cond_channels), the same for every patch; None if there is no condition.

        Returns:
            (B, 1, ceil(H / stride), ceil(W / stride)); positive: looks real. Logits, or
            probabilities if the configuration says so.

        Raises:
            ValueError: If ``cond`` is missing or not wanted.
        """
        wanted = self.config.cond_channels
        if (cond is None) != (wanted == 0):
            given = "no condition" if cond is None else f"a condition of {cond.shape[-1]}"
            raise ValueError(f"cond_channels={wanted}, but {given} was given")
        x = pixels.contiguous(memory_format=torch.channels_last)
        for index, conv in enumerate(self.layers):
            x = conv(x)
            if index > 0:
                # One group per channel is instance norm, and keeps channels_last memory.
                x = F.group_norm(x, num_groups=x.shape[1])
            x = F.leaky_relu(x, 0.2)
        if cond is not None:
            x = torch.cat([x, cond[:, :, None, None].expand(-1, -1, *x.shape[-2:])], dim=1)
        logits = self.to_logits(x)
        return logits.sigmoid() if self.config.sigmoid else logits
