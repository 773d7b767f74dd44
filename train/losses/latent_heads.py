"""A discriminator of latents: small heads on a frozen denoiser's features of noised latents.

Reference: Sauer et al., 2024, arXiv:2403.12015 (LADD), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import LayerNorm2d

_MOST_CHANNELS = 256


class LatentHead(nn.Module):
    """Judges each position of a feature map, told the prompt by projection."""

    def __init__(self, channels: int, text_channels: int) -> None:
        """Take the widths of the features and of the pooled text state."""
        super().__init__()
        width = min(channels, _MOST_CHANNELS)
        self.norm = LayerNorm2d(channels)
        self.squeeze = nn.Conv2d(channels, width, kernel_size=1)
        self.look = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.judge = nn.Conv2d(width, 1, kernel_size=1)
        self.text = nn.Linear(text_channels, width)

    def forward(self, features: Tensor, text_pooled: Tensor) -> Tensor:
        """Return logits ``(B, 1, h, w)`` of ``(B, C, h, w)`` and ``(B, P)``; above 0 is real.

        Reference of the projection: Miyato & Koyama, 2018, arXiv:1802.05637.
        """
        h = F.leaky_relu(self.squeeze(self.norm(features)), 0.2)
        h = F.leaky_relu(self.look(h), 0.2)
        told = self.text(text_pooled)[:, :, None, None]
        return self.judge(h) + (h * told).mean(dim=1, keepdim=True)


class LatentHeads(nn.Module):
    """One head for each place of the teacher that is looked at."""

    def __init__(self, channels: Sequence[int], text_channels: int) -> None:
        """Take the widths of the places' features, and of the pooled text state."""
        super().__init__()
        self.heads = nn.ModuleList(LatentHead(one, text_channels) for one in channels)

    def forward(self, features: Sequence[Tensor], text_pooled: Tensor) -> list[Tensor]:
        """Return every head's logits."""
        return [
            head(one.float(), text_pooled.float())
            for head, one in zip(self.heads, features, strict=True)
        ]

    def fixed(self, features: Sequence[Tensor], text_pooled: Tensor) -> list[Tensor]:
        """Return the same; the features have their gradient, the heads learn nothing from it."""
        fixed = {name: value.detach() for name, value in self.named_parameters()}
        return torch.func.functional_call(self, fixed, (features, text_pooled))


def heads_loss(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Return the heads' hinge loss, the mean over heads, a scalar.

    Reference: Lim & Ye, 2017, arXiv:1705.02894.
    """
    losses = [
        F.relu(1.0 - one).mean() + F.relu(1.0 + other).mean()
        for one, other in zip(real, fake, strict=True)
    ]
    return torch.stack(losses).mean()


def student_loss(fake: Sequence[Tensor]) -> Tensor:
    """Return the student's adversarial loss, the mean over heads, a scalar."""
    return -torch.stack([one.mean() for one in fake]).mean()
