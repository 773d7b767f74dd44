"""Stage C of Würstchen v2, the prior: denoises the strongly compressed latent, told by text.

A flat stack at the latent's own resolution (24 x 24 for 1024 px), each block a convolutional
residual block, a time modulation and an attention to picture and text.

Reference: Pernias et al., 2023, Würstchen, arXiv:2306.00637; sizes are those of the published v2
checkpoint, which differ from the paper's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import (
    AttnBlock,
    LayerNorm2d,
    ResBlock,
    TimestepBlock,
    init_weights,
    run,
    scale_residual_outputs,
)
from stages.linear import Linear
from stages.prepared import Prepared, Time, Told, at_times, block_inputs, keys_values

_MIN_DIVISOR = 1e-5
_LEAKY_SLOPE = 0.2


@dataclass(frozen=True)
class StageCV2Config:
    """Sizes of the prior; the defaults are the published one (993,636,896 parameters)."""

    latent_channels: int = 16
    """Channels of the compressed latent."""
    time_channels: int = 64
    """Size of the embedding of the time."""
    hidden_channels: int = 1536
    """Width of the stack and of the text tokens inside it."""
    num_blocks: int = 32
    """Blocks of the stack."""
    num_heads: int = 24
    """Attention heads of every block."""
    text_channels: int = 1280
    """Width of the text model's hidden states."""
    kernel_size: int = 3
    """Side of the depthwise kernels."""
    dropout: float = 0.1
    """Dropout in training."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.num_heads < 1 or self.hidden_channels % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide hidden_channels={self.hidden_channels}"
            )
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks={self.num_blocks} must be at least 1")
        if self.time_channels < 4 or self.time_channels % 2:
            raise ValueError(f"time_channels={self.time_channels} must be even and at least 4")

    @classmethod
    def full(cls) -> StageCV2Config:
        """Return the published prior."""
        return cls()


@dataclass(frozen=True)
class StageCV2Condition:
    """What the prior is told."""

    text_hidden: Tensor
    """(B, L, D): hidden states after the text model's last norm, unlike those of Stage C v3."""


@dataclass(frozen=True)
class StageCV2Prepared(Prepared):
    """A condition after everything that does not change from step to step."""

    tokens: Tensor
    """(B, L, hidden_channels)."""


class StageCV2Block(nn.Module):
    """Residual block, time modulation, attention."""

    def __init__(self, config: StageCV2Config) -> None:
        """Build one block of the stack."""
        super().__init__()
        width = config.hidden_channels
        self.residual = ResBlock(width, 0, config.kernel_size, config.dropout)
        self.modulation = TimestepBlock(width, config.time_channels)
        self.attention = AttnBlock(width, width, config.num_heads, config.dropout)

    def forward(self, x: Tensor, time: Time, told: Told) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        assert told is not None, "the prior attends in every block"
        return self.attention(self.modulation(self.residual(x), time), told)


class StageCV2(nn.Module):
    """The text-conditional prior of Würstchen v2."""

    def __init__(self, config: StageCV2Config) -> None:
        """Build the prior of ``config`` with the published initialisation."""
        super().__init__()
        self.config = config
        width = config.hidden_channels
        self.text_expand = Linear(config.text_channels, width)
        self.text_project = Linear(width, width)
        self.embedding = nn.Conv2d(config.latent_channels, width, kernel_size=1)
        self.blocks = nn.ModuleList(StageCV2Block(config) for _ in range(config.num_blocks))
        self.out_norm = LayerNorm2d(width)
        self.out = nn.Conv2d(width, 2 * config.latent_channels, kernel_size=1)
        self.recompute = False
        """Whether the backward pass runs each block again instead of keeping what is in it."""
        self._init_weights()

    def _init_weights(self) -> None:
        init_weights(self)
        for layer in (self.text_expand, self.text_project, self.embedding):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.out.weight)
        scale_residual_outputs(self, self.config.num_blocks)

    @property
    def _blocks(self) -> list[StageCV2Block]:
        return [cast(StageCV2Block, block) for block in self.blocks]

    def prepare(self, cond: StageCV2Condition) -> StageCV2Prepared:
        """Compute what does not change from step to step, once per picture."""
        prepared = self._mapped(cond)
        attentions = [block.attention for block in self._blocks]
        return replace(prepared, asked=keys_values(attentions, prepared.tokens))

    def at_times(self, prepared: StageCV2Prepared, times: Tensor) -> list[StageCV2Prepared]:
        """Compute what depends on the time alone, for all steps at once.

        Args:
            prepared: The result of ``prepare``.
            times: Times ``(S,)`` as ``forward`` takes them, float32.

        Returns:
            For each time the condition at it; with it ``forward`` does not look at its ``t``.
        """
        blocks = [block.modulation for block in self._blocks]
        channels = self.config.time_channels
        return at_times(blocks, prepared, times, self._no_extras(times), channels)

    def _no_extras(self, times: Tensor) -> Tensor:
        return times.new_empty(1, 0, self.config.time_channels)

    def _mapped(self, cond: StageCV2Condition) -> StageCV2Prepared:
        """Map the condition's tokens."""
        text = cond.text_hidden.to(self.text_expand.weight.dtype)
        hidden = F.leaky_relu(self.text_expand(text), _LEAKY_SLOPE)
        return StageCV2Prepared(self.text_project(hidden))

    def forward(self, x: Tensor, t: Tensor, cond: StageCV2Condition | StageCV2Prepared) -> Tensor:
        """Predict.

        Args:
            x: Noised compressed latents, ``(B, 16, h, w)``.
            t: Diffusion time, ``(B,)``, float32.
            cond: A condition, or the result of ``prepare`` or ``at_times``.

        Returns:
            The prediction (epsilon in the published checkpoint), ``(B, 16, h, w)``: the network's
            two outputs ``a, b`` give ``(x - a) / (|1 - b| + 1e-5)``, in float32 until the end.
        """
        # Of a bare condition each block asks by itself: it is told once, and may be recomputed.
        prepared = self._mapped(cond) if isinstance(cond, StageCV2Condition) else cond
        h = self.embedding(x.contiguous(memory_format=torch.channels_last))
        for block, inputs in zip(self.blocks, self._inputs(prepared, t), strict=True):
            h = run(block, h, *inputs, recompute=self.recompute)
        a, b = self.out(self.out_norm(h)).float().chunk(2, dim=1)
        return ((x.float() - a) / ((1 - b).abs() + _MIN_DIVISOR)).to(x.dtype)

    def _inputs(self, prepared: StageCV2Prepared, t: Tensor) -> Iterator[tuple[Time, Told]]:
        """Give each block what it is told of the time and of the condition."""
        count = len(self.blocks)
        channels = self.config.time_channels
        extras = self._no_extras(t)
        return block_inputs(prepared, prepared.tokens, t, extras, channels, count)
