"""Attention of the U-Nets: transformer blocks, and the stacks that the picture passes through.

Attributes are named as in the published files, which therefore load without renaming.

Reference: Rombach et al., 2022, arXiv:2112.10752, section 3.3; Shazeer, 2020, GLU variants,
arXiv:2002.05202 (the feed-forward).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from stages.layers import attend, run
from stages.linear import Linear
from stages.overwrite import multiply
from stages.unet.config import UNetConfig
from stages.unet.features import Features, Taps

KeysValues = tuple[Tensor, Tensor]
"""Keys and values, each (B, N, M, C / N): what is asked of a context, which it alone decides."""

Text = Tensor | Mapping[str, KeysValues]
"""The text's hidden states, (B, M, text_channels), or what each transformer block, by its path,
asks of them: the text does not change from step to step."""


class Attention(nn.Module):
    """Multi-head attention to itself, or to the text.

    Logits and softmax are float32 whatever the number format, which is what the published
    ``upcast_attention`` of SD 2.1 asks for.
    """

    def __init__(self, channels: int, context_channels: int, num_heads: int) -> None:
        """Take the widths of who asks and of who is asked."""
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_channels, channels, bias=False)
        self.to_v = Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def keys_values(self, context: Tensor) -> KeysValues:
        """Return what is asked of a context, ``(B, M, D)``."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def forward(self, tokens: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        """Return ``(B, L, C)``.

        Args:
            tokens: ``(B, L, C)``; they ask.
            context: Who is asked: ``(B, M, D)``, or its keys and values; None: the tokens.
        """
        context = tokens if context is None else context
        query = self._heads(self.to_q(tokens))  # (B, N, L, C / N)
        key, value = self.keys_values(context) if isinstance(context, Tensor) else context
        return self.to_out[0](attend(query, key, value).transpose(1, 2).flatten(2))

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedGELU(nn.Module):
    """Linear layer of which one half gates the other."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Take both widths."""
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C_in) -> (B, L, C_out)."""
        values, gate = self.proj(x).chunk(2, dim=-1)
        return multiply(F.gelu(gate), values)


class FeedForward(nn.Module):
    """Gated MLP, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        """Take the width."""
        super().__init__()
        # In the middle is the place of the published dropout, which is 0 in all of them.
        self.net = nn.Sequential(
            GatedGELU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L, C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each normed and with a residual."""

    def __init__(self, channels: int, text_channels: int, num_heads: int, name: str) -> None:
        """Take the widths and the block's path within the network."""
        super().__init__()
        self.name = name
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, channels, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, text_channels, num_heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, text: Text, wanted: frozenset[str]) -> tuple[Tensor, Features]:
        """Return ``(B, L, C)`` as it came, and what was asked for.

        Args:
            x: Tokens of the picture, ``(B, L, C)``.
            text: The text.
            wanted: Names of the sites asked for, in all of the network.
        """
        taps = Taps(self.name, wanted)
        context = text if isinstance(text, Tensor) else text[self.name]
        x = x + taps.see("attn1", self.attn1(self.norm1(x)))
        x = x + taps.see("attn2", self.attn2(self.norm2(x), context))
        x = x + taps.see("ff", self.ff(self.norm3(x)))
        taps.see("", x)
        return x, taps.found


class SpatialTransformer(nn.Module):
    """A stack of transformer blocks on the positions of a picture, with a residual around it."""

    def __init__(self, config: UNetConfig, level: int, depth: int, name: str) -> None:
        """Build a stack of ``depth`` blocks of ``level``; ``name`` is its path in the network."""
        super().__init__()
        width, heads = config.channels[level], config.num_heads[level]
        self.name = name
        self.linear_projection = config.linear_projection
        # The entry norm's eps differs from the resnets' in all published networks.
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=1e-6)
        self.proj_in = self._projection(width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                width, config.text_channels, heads, f"{name}.transformer_blocks.{number}"
            )
            for number in range(depth)
        )
        self.proj_out = self._projection(width)

    def _projection(self, width: int) -> nn.Module:
        return Linear(width, width) if self.linear_projection else nn.Conv2d(width, width, 1)

    def forward(
        self, x: Tensor, text: Text, wanted: frozenset[str], recompute: bool
    ) -> tuple[Tensor, Features]:
        """Return ``(B, C, H, W)`` as it came, and what was asked for.

        Args:
            x: ``(B, C, H, W)``.
            text: The text.
            wanted: Names of the sites asked for, in all of the network.
            recompute: Whether each transformer block is run again in the backward pass.
        """
        height, width = x.shape[-2:]
        taps = Taps(self.name, wanted)
        h = self.norm(x)
        h = self.proj_in(_tokens(h)) if self.linear_projection else _tokens(self.proj_in(h))
        for block in cast("list[TransformerBlock]", self.transformer_blocks):
            h, found = run(block, h, text, wanted, recompute=recompute)
            taps.found |= found
        if self.linear_projection:
            h = _picture(taps.see("proj_out", self.proj_out(h)), (height, width))
        else:
            h = taps.see("proj_out", self.proj_out(_picture(h, (height, width))))
        return x + h, taps.found


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _picture(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W)."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
