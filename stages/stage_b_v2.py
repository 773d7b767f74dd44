"""Stage B of Würstchen v2 (DiffNeXt): denoises Stage A's latent, told by Stage C's latent.

A U-Net that attends to the text tokens in all levels but the finest, and reads the compressed
latent, resized to the level, in every residual block of those levels.

Reference: Pernias et al., 2023, Würstchen, arXiv:2306.00637; sizes are those of the published v2
checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import (
    NORM_EPS,
    AttnBlock,
    Folded,
    LayerNorm2d,
    ResBlock,
    TimestepBlock,
    init_weights,
    run,
    scale_residual_outputs,
)
from stages.linear import Linear
from stages.prepared import Prepared, Time, Told, at_times, block_inputs, keys_values
from stages.stage_b import Resample

_MIN_DIVISOR = 1e-3


@dataclass(frozen=True)
class StageBV2Config:
    """Sizes of Stage B; the defaults are the published one (1,055,365,280 parameters)."""

    latent_channels: int = 4
    """Channels of Stage A's latent."""
    patch_size: int = 2
    """Side of the latent squares that become one position of the first level."""
    time_channels: int = 64
    """Size of the embedding of the time."""
    cond_channels: int = 1024
    """Width of the text tokens and of the mapped compressed latent."""
    hidden_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width by level; each level after the first halves height and width."""
    num_heads: tuple[int, ...] = (0, 10, 20, 20)
    """Attention heads by level; 0: the level has no attention."""
    num_blocks: tuple[int, ...] = (4, 4, 14, 4)
    """Blocks by level, as many on the way down as on the way up."""
    reads_compressed: tuple[bool, ...] = (False, True, True, True)
    """Which levels' residual blocks read the compressed latent."""
    compressed_channels: int = 16
    """Channels of the Stage C latent."""
    text_channels: int = 1024
    """Width of the text model's hidden states."""
    kernel_size: int = 3
    """Side of the depthwise kernels."""
    dropout: tuple[float, ...] = (0.1, 0.1, 0.1, 0.1)
    """Dropout in training by level."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        levels = len(self.hidden_channels)
        for name in ("num_heads", "num_blocks", "reads_compressed", "dropout"):
            values = getattr(self, name)
            if len(values) != levels:
                raise ValueError(
                    f"{name}={values} and hidden_channels={self.hidden_channels} must have one "
                    "entry per level"
                )
        for width, heads in zip(self.hidden_channels, self.num_heads, strict=True):
            if heads < 0 or (heads and width % heads):
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide "
                    f"hidden_channels={self.hidden_channels}"
                )
        if self.time_channels < 4 or self.time_channels % 2:
            raise ValueError(f"time_channels={self.time_channels} must be even and at least 4")

    @classmethod
    def full(cls) -> StageBV2Config:
        """Return the published Stage B."""
        return cls()

    @property
    def latent_multiple(self) -> int:
        """What both sides of the latent must be multiples of: every level halves them."""
        return self.patch_size * 2 ** (len(self.hidden_channels) - 1)


@dataclass(frozen=True)
class StageBV2Condition:
    """What Stage B is told."""

    stage_c_latents: Tensor
    """(B, 16, h, w): the compressed latent, as ``SemanticCompressor.encode`` gives it."""
    text_hidden: Tensor
    """(B, L, D): hidden states after the text model's last norm."""


@dataclass(frozen=True)
class StageBV2Prepared(Prepared):
    """A condition after everything that does not change from step to step."""

    tokens: Tensor
    """(B, L, cond_channels), normed."""
    down_mapped: tuple[Tensor | None, ...]
    """(B, cond_channels, H_i, W_i) by level, finest first; None in levels that read nothing."""
    up_mapped: tuple[Tensor | None, ...]
    """The same for the way up, by level, deepest first."""
    folded: tuple[Folded | None, ...] | None = None
    """In place of both: the few channels that each block reads, in running order, and what it makes
    of them."""


class StageBV2Block(nn.Module):
    """Residual block, time modulation and, in all levels but the finest, attention."""

    def __init__(self, config: StageBV2Config, level: int, unet_skip_channels: int = 0) -> None:
        """Build a block of ``level``; it reads the level's compressed latent besides the skip."""
        super().__init__()
        width, dropout = config.hidden_channels[level], config.dropout[level]
        skip = unet_skip_channels
        if config.reads_compressed[level]:
            skip += config.cond_channels
        self.residual = ResBlock(width, skip, config.kernel_size, dropout)
        self.modulation = TimestepBlock(width, config.time_channels)
        self.attention: AttnBlock | None = None
        if config.num_heads[level]:
            self.attention = AttnBlock(
                width, config.cond_channels, config.num_heads[level], dropout
            )

    def forward(
        self, x: Tensor, skip: Tensor | None, folded: Folded | None, time: Time, told: Told
    ) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        x = self.modulation(self.residual(x, skip, folded), time)
        if self.attention is None:
            return x
        assert told is not None, "a block that attends is told of the condition"
        return self.attention(x, told)


class StageBV2(nn.Module):
    """The latent upsampler of Würstchen v2."""

    def __init__(self, config: StageBV2Config) -> None:
        """Build Stage B of ``config`` with the published initialisation."""
        super().__init__()
        self.config = config
        widths = config.hidden_channels
        levels = range(len(widths))

        self.text_mapper = Linear(config.text_channels, config.cond_channels)
        # Keyed by level: a level that does not read the compressed latent has no mapper.
        self.down_mappers = self._compressed_mappers()
        self.up_mappers = self._compressed_mappers()
        self.embedding = nn.Conv2d(
            config.latent_channels * config.patch_size**2, widths[0], kernel_size=1
        )
        self.in_norm = LayerNorm2d(widths[0])
        self.down_samplers = nn.ModuleList(
            Resample(widths[level - 1], widths[level], up=False) for level in levels if level > 0
        )
        self.down_blocks = nn.ModuleList(
            nn.ModuleList(StageBV2Block(config, level) for _ in range(config.num_blocks[level]))
            for level in levels
        )
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(
                # The first block of an up level reads the skip, in all levels but the deepest.
                StageBV2Block(config, level, widths[level] if index > 0 and block == 0 else 0)
                for block in range(config.num_blocks[level])
            )
            for index, level in enumerate(reversed(levels))
        )
        self.up_samplers = nn.ModuleList(
            Resample(widths[level], widths[level - 1], up=True)
            for level in reversed(levels)
            if level > 0
        )
        self.out_norm = LayerNorm2d(widths[0])
        self.out = nn.Conv2d(
            widths[0], 2 * config.latent_channels * config.patch_size**2, kernel_size=1
        )
        self.recompute = False
        """Whether the backward pass runs each block again instead of keeping what is in it."""
        self._init_weights()

    def _compressed_mappers(self) -> nn.ModuleDict:
        config = self.config
        return nn.ModuleDict(
            {
                str(level): nn.Conv2d(config.compressed_channels, config.cond_channels, 1)
                for level, reads in enumerate(config.reads_compressed)
                if reads
            }
        )

    def _init_weights(self) -> None:
        init_weights(self)
        nn.init.normal_(self.text_mapper.weight, std=0.02)
        for mapper in (*self.down_mappers.values(), *self.up_mappers.values()):
            nn.init.normal_(mapper.get_parameter("weight"), std=0.02)
        nn.init.xavier_uniform_(self.embedding.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)
        scale_residual_outputs(self, sum(self.config.num_blocks))

    @property
    def _blocks(self) -> list[StageBV2Block]:
        """All blocks in running order."""
        return [
            cast(StageBV2Block, block)
            for blocks in (*self.down_blocks, *self.up_blocks)
            for block in cast(nn.ModuleList, blocks)
        ]

    def prepare(self, cond: StageBV2Condition, latent_size: tuple[int, int]) -> StageBV2Prepared:
        """Compute what does not change from step to step, once per picture.

        Args:
            cond: The condition.
            latent_size: Height and width of the Stage A latent.

        Raises:
            ValueError: A side is no multiple of ``latent_multiple``.
        """
        # Weights that come layer by layer are not here to be folded, and on meta nothing is.
        if self.embedding.weight.is_meta:
            prepared = self._mapped(cond, latent_size)
        else:
            prepared = self._folded(cond, latent_size)
        attentions = [block.attention for block in self._blocks]
        return replace(prepared, asked=keys_values(attentions, prepared.tokens))

    def at_times(self, prepared: StageBV2Prepared, times: Tensor) -> list[StageBV2Prepared]:
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

    def _folded(self, cond: StageBV2Condition, latent_size: tuple[int, int]) -> StageBV2Prepared:
        """Resize the compressed latent, and fold its mappers into the blocks that read it."""
        tokens, sizes = self._tokens(cond), self._level_sizes(latent_size)
        resized = [
            self._resized(cond.stage_c_latents, size) if reads else None
            for size, reads in zip(sizes, self.config.reads_compressed, strict=True)
        ]
        levels = range(len(sizes))
        ways = [(self.down_blocks, self.down_mappers, levels)]
        ways.append((self.up_blocks, self.up_mappers, levels[::-1]))
        folded: list[Folded | None] = []
        for way, mappers, order in ways:
            for level, blocks in zip(order, way, strict=True):
                source = resized[level]
                for block in cast("list[StageBV2Block]", blocks):
                    if source is None:
                        folded.append(None)
                    else:
                        mapper = cast(nn.Conv2d, mappers[str(level)])
                        folded.append(block.residual.fold(source, mapper))
        nothing = (None,) * len(sizes)
        return StageBV2Prepared(tokens, nothing, nothing, tuple(folded))

    def _mapped(self, cond: StageBV2Condition, latent_size: tuple[int, int]) -> StageBV2Prepared:
        """Map the condition."""
        tokens = self._tokens(cond)
        down: list[Tensor | None] = []
        up: list[Tensor | None] = []
        for level, size in enumerate(self._level_sizes(latent_size)):
            if not self.config.reads_compressed[level]:
                down.append(None)
                up.append(None)
                continue
            resized = self._resized(cond.stage_c_latents, size)
            down.append(self.down_mappers[str(level)](resized))
            up.append(self.up_mappers[str(level)](resized))
        return StageBV2Prepared(tokens, tuple(down), tuple(reversed(up)))

    def _tokens(self, cond: StageBV2Condition) -> Tensor:
        tokens = self.text_mapper(cond.text_hidden.to(self.embedding.weight.dtype))
        return F.layer_norm(tokens, (self.config.cond_channels,), eps=NORM_EPS)

    def _level_sizes(self, latent_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each level, finest first."""
        height, width = latent_size
        multiple = self.config.latent_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"latents of {height}x{width}: both sides must be multiples of {multiple}"
            )
        scales = [self.config.patch_size * 2**level for level in range(len(self.down_blocks))]
        return [(height // scale, width // scale) for scale in scales]

    def _resized(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, h, w) -> (B, C, H_i, W_i), in float32 until the end."""
        resized = F.interpolate(
            latents.float(), size=size, mode="bicubic", antialias=True, align_corners=True
        )
        dtype = self.embedding.weight.dtype
        return resized.to(dtype).contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, cond: StageBV2Condition | StageBV2Prepared) -> Tensor:
        """Predict.

        Args:
            x: Noised Stage A latents, ``(B, 4, H, W)``; sides are multiples of
                ``config.latent_multiple``.
            t: Diffusion time, ``(B,)``, float32.
            cond: A condition, or the result of ``prepare`` or ``at_times``.

        Returns:
            The prediction (epsilon in the published checkpoint), ``(B, 4, H, W)``: the network's
            two outputs ``a, b`` give ``(x - a) / (0.001 + 0.998 * sigmoid(b))``, in float32 until
            the end.

        Raises:
            ValueError: A side is no multiple of ``config.latent_multiple``.
        """
        if isinstance(cond, StageBV2Condition):
            # Each block asks by itself: it is told once, and may be recomputed.
            cond = self._mapped(cond, (x.shape[-2], x.shape[-1]))
        inputs = self._inputs(cond, t)
        h = F.pixel_unshuffle(x, self.config.patch_size)
        h = h.contiguous(memory_format=torch.channels_last)
        h = self.in_norm(self.embedding(h))

        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                h = self.down_samplers[level - 1](h)
            for block in cast(nn.ModuleList, blocks):
                read = cond.down_mapped[level]
                h = run(block, h, read, *next(inputs), recompute=self.recompute)
            skips.append(h)
        h = skips.pop()
        for index, blocks in enumerate(self.up_blocks):
            mapped = cond.up_mapped[index]
            first = _joined(skips.pop() if index > 0 else None, mapped)
            for block_index, block in enumerate(cast(nn.ModuleList, blocks)):
                read = first if block_index == 0 else mapped
                h = run(block, h, read, *next(inputs), recompute=self.recompute)
            if index < len(self.up_samplers):
                h = self.up_samplers[index](h)
        out = F.pixel_shuffle(self.out(self.out_norm(h)), self.config.patch_size).float()
        a, b = out.chunk(2, dim=1)  # (B, 4, H, W) each
        divisor = b.sigmoid() * (1 - 2 * _MIN_DIVISOR) + _MIN_DIVISOR
        return ((x.float() - a) / divisor).to(x.dtype)

    def _inputs(
        self, prepared: StageBV2Prepared, t: Tensor
    ) -> Iterator[tuple[Folded | None, Time, Told]]:
        """Give each block what it is told beside the skip."""
        count = 2 * sum(self.config.num_blocks)
        channels = self.config.time_channels
        inputs = block_inputs(prepared, prepared.tokens, t, self._no_extras(t), channels, count)
        folded = prepared.folded or [None] * count
        return ((one, time, told) for one, (time, told) in zip(folded, inputs, strict=True))


def _joined(skip: Tensor | None, mapped: Tensor | None) -> Tensor | None:
    """Join the U-Net's skip and the mapped compressed latent on the channels, in this order."""
    given = [part for part in (skip, mapped) if part is not None]
    return torch.cat(given, dim=1) if given else None
