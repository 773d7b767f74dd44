"""Stage C of Stable Cascade (v3): denoises the strongly compressed latent, told by text.

A U-shaped stack whose levels all work at the latent's own resolution (24 x 24 for 1024 px), each
block a convolutional residual block, a time modulation and an attention to picture and text.

Reference: Pernias et al., 2023, Würstchen, arXiv:2306.00637; sizes are those of the published
Stable Cascade checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.block_features import BlockOutput, BlockSite, BlockTaps, block_sites
from stages.embeddings import scalar_embeddings
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

TIME_CONDS = ("sca", "crp", "cfg")
"""Scalar conditions that the network can be told beside the time: scale and crop, as published, and
the guidance scale that is distilled into it."""


@dataclass(frozen=True)
class StageCConfig:
    """Sizes of Stage C; the defaults are the published 3.6B (3,589,103,632 parameters)."""

    latent_channels: int = 16
    """Channels of the compressed latent."""
    patch_size: int = 1
    """Side of the latent squares that become one position."""
    time_channels: int = 64
    """Size of the embedding of the time and of each extra scalar."""
    cond_channels: int = 2048
    """Width of the condition's tokens."""
    hidden_channels: tuple[int, ...] = (2048, 2048)
    """Width by level."""
    num_heads: tuple[int, ...] = (32, 32)
    """Attention heads by level."""
    down_blocks: tuple[int, ...] = (8, 24)
    """Blocks by level on the way down."""
    up_blocks: tuple[int, ...] = (24, 8)
    """Blocks by level on the way up, deepest level first."""
    text_channels: int = 1280
    """Width of the text model's hidden states."""
    text_pooled_channels: int = 1280
    """Width of the text model's pooled projection."""
    pooled_tokens: int = 4
    """Tokens made of the pooled projection, and of each image embedding."""
    image_channels: int | None = 768
    """Width of image embeddings; None: the network takes none and has no tokens for them."""
    kernel_size: int = 3
    """Side of the depthwise kernels."""
    dropout: float = 0.1
    """Dropout in training."""
    time_conds: tuple[str, ...] = ("sca", "crp")
    """Extra scalar conditions of every time modulation; published: scale and crop."""
    qk_norm: bool = False
    """Norm the queries and keys of every head; no published checkpoint does."""
    time_unit: float = 1.0
    """What the time is multiplied by before it is embedded; 1 as published. Far below 1 the network
    is smooth in time, as step distillation needs it."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        unknown = [name for name in self.time_conds if name not in TIME_CONDS]
        if unknown:
            raise ValueError(
                f"time_conds={self.time_conds}: {unknown[0]!r} is none of {TIME_CONDS}"
            )
        if not 0 < self.time_unit <= 1:
            raise ValueError(f"time_unit={self.time_unit} must lie in (0, 1]")
        if self.time_channels < 4 or self.time_channels % 2:
            raise ValueError(f"time_channels={self.time_channels} must be even and at least 4")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size} must be odd")
        levels = len(self.hidden_channels)
        for name in ("num_heads", "down_blocks", "up_blocks"):
            values = getattr(self, name)
            if len(values) != levels:
                raise ValueError(
                    f"{name}={values} and hidden_channels={self.hidden_channels} must have one "
                    "entry per level"
                )
        for width, heads in zip(self.hidden_channels, self.num_heads, strict=True):
            if heads < 1 or width % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide "
                    f"hidden_channels={self.hidden_channels}"
                )

    @property
    def block_channels(self) -> tuple[int, ...]:
        """Width of each residual block in running order: all the way down, then up."""
        down = zip(self.hidden_channels, self.down_blocks, strict=True)
        up = zip(reversed(self.hidden_channels), self.up_blocks, strict=True)
        return tuple(width for width, blocks in (*down, *up) for _ in range(blocks))

    @property
    def sites(self) -> dict[str, BlockSite]:
        """The blocks whose outputs can be asked for, by name in running order."""
        return block_sites(self.hidden_channels, self.down_blocks, self.up_blocks)

    @classmethod
    def full(cls) -> StageCConfig:
        """Return the published 3.6B."""
        return cls()

    @classmethod
    def lite(cls) -> StageCConfig:
        """Return the published 1B (1,030,785,040 parameters)."""
        return cls(
            cond_channels=1536,
            hidden_channels=(1536, 1536),
            num_heads=(24, 24),
            down_blocks=(4, 12),
            up_blocks=(12, 4),
        )


@dataclass(frozen=True)
class StageCCondition:
    """What Stage C is told."""

    text_hidden: Tensor
    """(B, L, D): hidden states before the text model's last norm, as published."""
    text_pooled: Tensor
    """(B, P): the projected pooled state."""
    image: Tensor | None = None
    """(B, n, 768): CLIP embeddings of pictures to vary; None is told as one of zeros."""
    sca: Tensor | None = None
    """(B,): scale condition; None is 0, as in all published use."""
    crp: Tensor | None = None
    """(B,): crop condition; None is 0."""
    cfg: Tensor | None = None
    """(B,): guidance scale, for a network that guidance was distilled into; None is 1, no
    guidance."""
    control: tuple[Tensor | None, ...] | None = None
    """What a ControlNet returned: for each residual block in running order (B, C, h, w), any
    size, or None; blocks after the last entry get nothing."""


@dataclass(frozen=True)
class StageCPrepared(Prepared):
    """A condition after everything that does not change from step to step."""

    tokens: Tensor
    """(B, L + pooled_tokens [+ n * pooled_tokens], cond_channels), normed."""
    extra_embeddings: Tensor
    """(B, num_extra, time_channels), float32; one row if all pictures are told the same."""
    control: tuple[Tensor | None, ...] | None = None
    """As in the condition, with one entry for every residual block."""


class StageCBlock(nn.Module):
    """Residual block, time modulation, attention."""

    def __init__(self, config: StageCConfig, level: int, skip_channels: int = 0) -> None:
        """Build a block of ``level``; ``skip_channels`` is the width of the skip it reads."""
        super().__init__()
        width = config.hidden_channels[level]
        self.residual = ResBlock(width, skip_channels, config.kernel_size, config.dropout)
        self.modulation = TimestepBlock(width, config.time_channels, config.time_conds)
        self.attention = AttnBlock(
            width,
            config.cond_channels,
            config.num_heads[level],
            config.dropout,
            qk_norm=config.qk_norm,
        )

    def forward(self, x: Tensor, skip: Tensor | None, time: Time, told: Told) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        assert told is not None, "Stage C attends in every block"
        return self.attention(self.modulation(self.residual(x, skip), time), told)


def _steered(x: Tensor, control: Tensor | None) -> Tensor:
    """Add a ControlNet's map, brought to the size of ``x`` in float32."""
    if control is None:
        return x
    if control.shape[-2:] != x.shape[-2:]:
        size = x.shape[-2:]
        control = F.interpolate(control.float(), size=size, mode="bilinear", align_corners=True)
    return x + control.to(x.dtype)


class LevelChange(nn.Module):
    """Norm and 1x1 convolution between two levels of the same resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Take both widths."""
        super().__init__()
        self.norm = LayerNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        return self.conv(self.norm(x))


class StageC(nn.Module):
    """The text-conditional prior."""

    def __init__(self, config: StageCConfig) -> None:
        """Build Stage C of ``config`` with the published initialisation."""
        super().__init__()
        self.config = config
        widths = config.hidden_channels
        levels = range(len(widths))

        self.text_mapper = Linear(config.text_channels, config.cond_channels)
        self.pooled_mapper = Linear(
            config.text_pooled_channels, config.cond_channels * config.pooled_tokens
        )
        self.image_mapper: nn.Linear | None = None
        if config.image_channels is not None:
            self.image_mapper = Linear(
                config.image_channels, config.cond_channels * config.pooled_tokens
            )

        self.embedding = nn.Conv2d(
            config.latent_channels * config.patch_size**2, widths[0], kernel_size=1
        )
        self.in_norm = LayerNorm2d(widths[0])
        self.down_changes = nn.ModuleList(
            LevelChange(widths[level - 1], widths[level]) for level in levels if level > 0
        )
        self.down_blocks = nn.ModuleList(
            nn.ModuleList(StageCBlock(config, level) for _ in range(config.down_blocks[level]))
            for level in levels
        )
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(
                StageCBlock(config, level, widths[level] if reads_skip else 0)
                for reads_skip in self._reads_skip(index, config.up_blocks[index])
            )
            for index, level in enumerate(reversed(levels))
        )
        self.up_changes = nn.ModuleList(
            LevelChange(widths[level], widths[level - 1]) for level in reversed(levels) if level > 0
        )
        self.out = nn.Conv2d(
            widths[0], config.latent_channels * config.patch_size**2, kernel_size=1
        )
        self.out_norm = LayerNorm2d(widths[0])
        self.recompute = False
        """Whether the backward pass runs each block again instead of keeping what is in it."""
        self._init_weights()

    @staticmethod
    def _reads_skip(index: int, num_blocks: int) -> list[bool]:
        """Say which blocks of an up level read the skip: the first, in all but the deepest."""
        return [index > 0 and block == 0 for block in range(num_blocks)]

    def _init_weights(self) -> None:
        init_weights(self)
        for mapper in (self.text_mapper, self.pooled_mapper, self.image_mapper):
            if mapper is not None:
                nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)
        scale_residual_outputs(self, sum(self.config.down_blocks))

    @property
    def _blocks(self) -> list[StageCBlock]:
        """All blocks in running order."""
        return [
            cast(StageCBlock, block)
            for blocks in (*self.down_blocks, *self.up_blocks)
            for block in cast(nn.ModuleList, blocks)
        ]

    def prepare(self, cond: StageCCondition) -> StageCPrepared:
        """Compute what does not change from step to step, once per picture.

        Raises:
            ValueError: An image embedding for a network that takes none, or control maps for a
                network of other widths.
        """
        prepared = self._mapped(cond)
        attentions = [block.attention for block in self._blocks]
        return replace(prepared, asked=keys_values(attentions, prepared.tokens))

    def at_times(self, prepared: StageCPrepared, times: Tensor) -> list[StageCPrepared]:
        """Compute what depends on the time alone, for all steps at once.

        Args:
            prepared: The result of ``prepare``.
            times: Times ``(S,)`` as ``forward`` takes them, float32.

        Returns:
            For each time the condition at it; with it ``forward`` does not look at its ``t``.
        """
        blocks = [block.modulation for block in self._blocks]
        told = times * self.config.time_unit
        channels = self.config.time_channels
        return at_times(blocks, prepared, told, prepared.extra_embeddings, channels)

    def _mapped(self, cond: StageCCondition) -> StageCPrepared:
        """Map and norm the condition's tokens."""
        config = self.config
        dtype = self.text_mapper.weight.dtype
        text = self.text_mapper(cond.text_hidden.to(dtype))  # (B, L, C)
        pooled = self.pooled_mapper(cond.text_pooled.to(dtype))
        parts = [text, self._split_tokens(pooled, len(text))]
        if self.image_mapper is not None:
            image = cond.image
            if image is None:
                channels = self.image_mapper.in_features
                image = torch.zeros(len(text), 1, channels, device=text.device)
            parts.append(self._split_tokens(self.image_mapper(image.to(dtype)), len(text)))
        elif cond.image is not None:
            raise ValueError("this Stage C has image_channels=None and takes no image embedding")
        tokens = torch.cat(parts, dim=1)  # (B, M, C)
        tokens = F.layer_norm(tokens, (config.cond_channels,), eps=1e-6)
        extra = self._extra_embeddings(cond)
        return StageCPrepared(tokens, extra, self._control(cond.control))

    def _split_tokens(self, mapped: Tensor, batch: int) -> Tensor:
        """(B, [n,] tokens * C) -> (B, n * tokens, C)."""
        return mapped.reshape(batch, -1, self.config.cond_channels)

    def _control(self, maps: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...] | None:
        """Give every residual block an entry."""
        if maps is None:
            return None
        widths = self.config.block_channels
        if len(maps) > len(widths):
            raise ValueError(
                f"control maps for {len(maps)} residual blocks, but this Stage C has {len(widths)}"
            )
        for block, (control, width) in enumerate(zip(maps, widths, strict=False)):
            if control is not None and control.shape[1] != width:
                raise ValueError(
                    f"the control map of block {block} has {control.shape[1]} channels, but this "
                    f"Stage C has {width} there"
                )
        return maps + (None,) * (len(widths) - len(maps))

    def _extra_embeddings(self, cond: StageCCondition) -> Tensor:
        config = self.config
        told = {name: getattr(cond, name) for name in config.time_conds}
        return scalar_embeddings(told, config.time_channels, cond.text_hidden.device)

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: StageCCondition | StageCPrepared,
        visible: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: StageCCondition | StageCPrepared,
        visible: Tensor | None = None,
        *,
        features: Iterable[str],
    ) -> BlockOutput: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: StageCCondition | StageCPrepared,
        visible: Tensor | None = None,
        *,
        features: Iterable[str] | None = None,
    ) -> Tensor | BlockOutput:
        """Predict.

        Args:
            x: Noised Stage C latents, ``(B, 16, h, w)``.
            t: Diffusion time, ``(B,)``, float32.
            cond: A condition, or the result of ``prepare`` or ``at_times``.
            visible: ``(B, 1, h / patch, w / patch)``, 0 where the network must guess what lies
                there (masked training); None shows everything.
            features: Names of the blocks, see ``StageCConfig.sites``, whose outputs are returned
                as well.

        Returns:
            The raw prediction (epsilon in the published checkpoints), ``(B, 16, h, w)``; with
            ``features``, a ``BlockOutput``.

        Raises:
            ValueError: A name in ``features`` is no block.
        """
        taps = BlockTaps(() if features is None else features, self.config.sites)
        # Of a bare condition each block asks by itself: it is told once, and may be recomputed.
        prepared = self._mapped(cond) if isinstance(cond, StageCCondition) else cond
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.pixel_unshuffle(x, self.config.patch_size)
        x = self.in_norm(self.embedding(x))
        if visible is not None:  # a normed position is never 0, so 0 says "hidden"
            x = x * visible.to(x.dtype)

        inputs = self._inputs(prepared, t)
        count = len(self.config.block_channels)
        control = iter(prepared.control or (None,) * count)
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                x = self.down_changes[level - 1](x)
            for block_index, block in enumerate(cast(nn.ModuleList, blocks)):
                x = _steered(x, next(control))
                x = run(block, x, None, *next(inputs), recompute=self.recompute)
                taps.see("down_blocks", level, block_index, x)
            skips.append(x)
        x = skips.pop()
        for index, blocks in enumerate(self.up_blocks):
            skip = skips.pop() if index > 0 else None
            for block_index, block in enumerate(cast(nn.ModuleList, blocks)):
                x = _steered(x, next(control))
                read = skip if block_index == 0 else None
                x = run(block, x, read, *next(inputs), recompute=self.recompute)
                taps.see("up_blocks", index, block_index, x)
            if index < len(self.up_changes):
                x = self.up_changes[index](x)
        prediction = F.pixel_shuffle(self.out(self.out_norm(x)), self.config.patch_size)
        return prediction if features is None else BlockOutput(prediction, taps.found)

    def _inputs(self, prepared: StageCPrepared, t: Tensor) -> Iterator[tuple[Time, Told]]:
        """Give each block, in running order, what it is told of the time and of the condition."""
        count = len(self.config.block_channels)
        channels = self.config.time_channels
        told = t * self.config.time_unit
        extras = prepared.extra_embeddings
        return block_inputs(prepared, prepared.tokens, told, extras, channels, count)
