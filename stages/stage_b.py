"""Stage B of Stable Cascade (v3): denoises Stage A's latent, told by Stage C's latent.

A U-Net whose two fine levels are convolutional and whose coarse levels attend to a few text tokens.
The compressed latent enters once, at the input.

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

TIME_CONDS = ("sca", "cfg")
"""Scalar conditions that the network can be told beside the time: scale, as published, and the
guidance scale that is distilled into it."""


@dataclass(frozen=True)
class StageBConfig:
    """Sizes of Stage B; the defaults are the published large one (1,562,941,136 parameters)."""

    latent_channels: int = 4
    """Channels of Stage A's latent."""
    patch_size: int = 2
    """Side of the latent squares that become one position of the first level."""
    time_channels: int = 64
    """Size of the embedding of the time and of each extra scalar."""
    cond_channels: int = 1280
    """Width of the text tokens and of the mappers of the other conditions."""
    hidden_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width by level; each level after the first halves height and width."""
    num_heads: tuple[int, ...] = (0, 0, 20, 20)
    """Attention heads by level; 0: the level has no attention."""
    down_blocks: tuple[int, ...] = (2, 6, 28, 6)
    """Blocks by level on the way down."""
    up_blocks: tuple[int, ...] = (6, 28, 6, 2)
    """Blocks by level on the way up, deepest level first."""
    up_repeats: tuple[int, ...] = (3, 3, 2, 2)
    """How often the blocks of an up level run, deepest level first; they share their weights."""
    compressed_channels: int = 16
    """Channels of the Stage C latent."""
    text_pooled_channels: int = 1280
    """Width of the text model's pooled projection."""
    pooled_tokens: int = 4
    """Tokens made of it."""
    pixel_condition: bool = True
    """Whether there is a mapper for a small picture; published, and only ever fed zeros."""
    kernel_size: int = 3
    """Side of the depthwise kernels."""
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    """Dropout in training by level."""
    time_conds: tuple[str, ...] = ("sca",)
    """Extra scalar conditions of every time modulation."""
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
        for name in ("num_heads", "down_blocks", "up_blocks", "up_repeats", "dropout"):
            values = getattr(self, name)
            if len(values) != levels:
                raise ValueError(
                    f"{name}={values} and hidden_channels={self.hidden_channels} must have one "
                    "entry per level"
                )
        for width, heads in zip(self.hidden_channels, self.num_heads, strict=True):
            if heads and width % heads:
                raise ValueError(
                    f"num_heads={self.num_heads} does not divide "
                    f"hidden_channels={self.hidden_channels}"
                )

    @property
    def latent_multiple(self) -> int:
        """What both sides of the latent must be multiples of; odd levels are resized on the way."""
        return self.patch_size

    @property
    def sites(self) -> dict[str, BlockSite]:
        """The blocks whose outputs can be asked for, by name in running order."""
        return block_sites(self.hidden_channels, self.down_blocks, self.up_blocks)

    @classmethod
    def full(cls) -> StageBConfig:
        """Return the published large Stage B."""
        return cls()

    @classmethod
    def lite(cls) -> StageBConfig:
        """Return the published small Stage B (699,471,248 parameters)."""
        return cls(
            hidden_channels=(320, 576, 1152, 1152),
            num_heads=(0, 0, 18, 18),
            down_blocks=(2, 4, 14, 4),
            up_blocks=(4, 14, 4, 2),
            up_repeats=(2, 2, 2, 2),
        )


@dataclass(frozen=True)
class StageBCondition:
    """What Stage B is told."""

    stage_c_latents: Tensor
    """(B, 16, h, w): the compressed latent, as ``SemanticCompressor.encode`` gives it."""
    text_pooled: Tensor
    """(B, P): the projected pooled text state."""
    pixels: Tensor | None = None
    """(B, 3, h', w'): a small picture; None is told as zeros of 8 x 8."""
    sca: Tensor | None = None
    """(B,): scale condition; None is 0, as in all published use."""
    cfg: Tensor | None = None
    """(B,): guidance scale, for a network that guidance was distilled into; None is 1, no
    guidance."""


@dataclass(frozen=True)
class StageBPrepared(Prepared):
    """A condition after everything that does not change from step to step."""

    tokens: Tensor
    """(B, pooled_tokens, cond_channels), normed."""
    mapped: Tensor
    """(B, hidden_channels[0], H, W): Stage C's latent and the small picture, mapped, summed."""
    extra_embeddings: Tensor
    """(B, num_extra, time_channels), float32; one row if all pictures are told the same."""


class StageBBlock(nn.Module):
    """Residual block, time modulation and, in the coarse levels, attention."""

    def __init__(self, config: StageBConfig, level: int, skip_channels: int = 0) -> None:
        """Build a block of ``level``; ``skip_channels`` is the width of the skip it reads."""
        super().__init__()
        width, dropout = config.hidden_channels[level], config.dropout[level]
        self.residual = ResBlock(width, skip_channels, config.kernel_size, dropout)
        self.modulation = TimestepBlock(width, config.time_channels, config.time_conds)
        self.attention: AttnBlock | None = None
        if config.num_heads[level]:
            self.attention = AttnBlock(
                width, config.cond_channels, config.num_heads[level], dropout
            )

    def forward(self, x: Tensor, skip: Tensor | None, time: Time, told: Told) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        x = self.modulation(self.residual(x, skip), time)
        if self.attention is None:
            return x
        assert told is not None, "a block that attends is told of the condition"
        return self.attention(x, told)


class Resample(nn.Module):
    """Norm, then a 2x2 convolution (down) or transposed convolution (up) of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, up: bool) -> None:
        """Take both widths and the direction."""
        super().__init__()
        self.norm = LayerNorm2d(in_channels)
        self.conv: nn.Module
        if up:
            self.conv = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H/2, W/2) or (B, C_out, 2H, 2W)."""
        return self.conv(self.norm(x))


class ConditionMapper(nn.Module):
    """Two 1x1 convolutions and a norm: maps a picture-shaped condition to the first level."""

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        """Take the three widths."""
        super().__init__()
        self.expand = nn.Conv2d(in_channels, channels, kernel_size=1)
        self.project = nn.Conv2d(channels, out_channels, kernel_size=1)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        return self.norm(self.project(F.gelu(self.expand(x))))


class StageB(nn.Module):
    """The latent upsampler."""

    def __init__(self, config: StageBConfig) -> None:
        """Build Stage B of ``config`` with the published initialisation."""
        super().__init__()
        self.config = config
        widths = config.hidden_channels
        levels = range(len(widths))

        self.compressed_mapper = ConditionMapper(
            config.compressed_channels, 4 * widths[0], widths[0]
        )
        self.pixel_mapper: ConditionMapper | None = None
        if config.pixel_condition:
            self.pixel_mapper = ConditionMapper(3, 4 * widths[0], widths[0])
        self.pooled_mapper = Linear(
            config.text_pooled_channels, config.cond_channels * config.pooled_tokens
        )
        self.embedding = nn.Conv2d(
            config.latent_channels * config.patch_size**2, widths[0], kernel_size=1
        )
        self.in_norm = LayerNorm2d(widths[0])
        self.down_samplers = nn.ModuleList(
            Resample(widths[level - 1], widths[level], up=False) for level in levels if level > 0
        )
        self.down_blocks = nn.ModuleList(
            nn.ModuleList(StageBBlock(config, level) for _ in range(config.down_blocks[level]))
            for level in levels
        )
        self.up_blocks = nn.ModuleList(
            nn.ModuleList(
                # The first block of an up level reads the skip, in all levels but the deepest.
                StageBBlock(config, level, widths[level] if index > 0 and block == 0 else 0)
                for block in range(config.up_blocks[index])
            )
            for index, level in enumerate(reversed(levels))
        )
        self.repeat_mappers = nn.ModuleList(
            nn.ModuleList(
                nn.Conv2d(widths[level], widths[level], kernel_size=1)
                for _ in range(config.up_repeats[index] - 1)
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
            widths[0], config.latent_channels * config.patch_size**2, kernel_size=1
        )
        self.recompute = False
        """Whether the backward pass runs each block again instead of keeping what is in it."""
        self._init_weights()

    def _init_weights(self) -> None:
        init_weights(self)
        nn.init.normal_(self.pooled_mapper.weight, std=0.02)
        for mapper in (self.compressed_mapper, self.pixel_mapper):
            if mapper is not None:
                nn.init.normal_(mapper.expand.weight, std=0.02)
                nn.init.normal_(mapper.project.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding.weight, gain=0.02)
        nn.init.zeros_(self.out.weight)
        scale_residual_outputs(self, sum(self.config.down_blocks))

    @property
    def _blocks(self) -> list[StageBBlock]:
        """All blocks in running order, each as often as it runs."""
        down = [block for blocks in self.down_blocks for block in cast(nn.ModuleList, blocks)]
        up = [
            block
            for blocks, repeats in zip(self.up_blocks, self.config.up_repeats, strict=True)
            for block in [*cast(nn.ModuleList, blocks)] * repeats
        ]
        return [cast(StageBBlock, block) for block in (*down, *up)]

    def prepare(self, cond: StageBCondition, latent_size: tuple[int, int]) -> StageBPrepared:
        """Compute what does not change from step to step, once per picture.

        Args:
            cond: The condition.
            latent_size: Height and width of the Stage A latent; multiples of ``patch_size``.
        """
        prepared = self._mapped(cond, latent_size)
        attentions = [block.attention for block in self._blocks]
        return replace(prepared, asked=keys_values(attentions, prepared.tokens))

    def at_times(self, prepared: StageBPrepared, times: Tensor) -> list[StageBPrepared]:
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

    def _mapped(self, cond: StageBCondition, latent_size: tuple[int, int]) -> StageBPrepared:
        """Map the condition."""
        dtype = self.embedding.weight.dtype
        size = [side // self.config.patch_size for side in latent_size]
        resized = F.interpolate(
            cond.stage_c_latents.float(), size=size, mode="bilinear", align_corners=True
        )
        resized = resized.to(dtype).contiguous(memory_format=torch.channels_last)
        mapped = self.compressed_mapper(resized)  # (B, C, H, W)
        if self.pixel_mapper is not None:
            pixels = cond.pixels
            if pixels is None:
                pixels = mapped.new_zeros(len(mapped), 3, 8, 8)
            small = self.pixel_mapper(pixels.to(dtype)).float()
            grown = F.interpolate(small, size=size, mode="bilinear", align_corners=True)
            mapped = mapped + grown.to(mapped.dtype)
        tokens = self.pooled_mapper(cond.text_pooled.to(dtype))
        tokens = tokens.reshape(len(mapped), -1, self.config.cond_channels)  # (B, tokens, C)
        tokens = F.layer_norm(tokens, (self.config.cond_channels,), eps=1e-6)
        return StageBPrepared(tokens, mapped, self._extra_embeddings(cond))

    def _extra_embeddings(self, cond: StageBCondition) -> Tensor:
        config = self.config
        told = {name: getattr(cond, name) for name in config.time_conds}
        return scalar_embeddings(told, config.time_channels, cond.stage_c_latents.device)

    @overload
    def forward(self, x: Tensor, t: Tensor, cond: StageBCondition | StageBPrepared) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: StageBCondition | StageBPrepared,
        *,
        features: Iterable[str],
    ) -> BlockOutput: ...

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: StageBCondition | StageBPrepared,
        *,
        features: Iterable[str] | None = None,
    ) -> Tensor | BlockOutput:
        """Predict.

        Args:
            x: Noised Stage A latents, ``(B, 4, H, W)``; sides are multiples of ``patch_size``.
            t: Diffusion time, ``(B,)``, float32.
            cond: A condition, or the result of ``prepare`` or ``at_times``.
            features: Names of the blocks, see ``StageBConfig.sites``, whose outputs are returned
                as well.

        Returns:
            The raw prediction (epsilon in the published checkpoints), ``(B, 4, H, W)``; with
            ``features``, a ``BlockOutput``.

        Raises:
            ValueError: A side is no multiple of ``patch_size``, or a name no block.
        """
        taps = BlockTaps(() if features is None else features, self.config.sites)
        height, width = x.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {height}x{width}: both sides must be multiples of {patch}"
            )
        if isinstance(cond, StageBCondition):
            # Each block asks by itself: it is told once, and may be recomputed.
            cond = self._mapped(cond, (height, width))
        inputs = self._inputs(cond, t)
        x = F.pixel_unshuffle(x, patch).contiguous(memory_format=torch.channels_last)
        x = self.in_norm(self.embedding(x)) + cond.mapped

        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down_blocks):
            if level > 0:
                x = self.down_samplers[level - 1](x)
            for block_index, block in enumerate(cast(nn.ModuleList, blocks)):
                x = run(block, x, None, *next(inputs), recompute=self.recompute)
                taps.see("down_blocks", level, block_index, x)
            skips.append(x)
        x = skips.pop()
        for index in range(len(self.up_blocks)):
            skip = skips.pop() if index > 0 else None
            x = self._up_level(index, x, skip, inputs, taps)
            if index < len(self.up_samplers):
                x = self.up_samplers[index](x)
        prediction = F.pixel_shuffle(self.out(self.out_norm(x)), patch)
        return prediction if features is None else BlockOutput(prediction, taps.found)

    def _up_level(
        self,
        index: int,
        x: Tensor,
        skip: Tensor | None,
        inputs: Iterator[tuple[Time, Told]],
        taps: BlockTaps,
    ) -> Tensor:
        """Run an up level as often as it repeats; its first block reads the skip every time."""
        if skip is not None and x.shape[-2:] != skip.shape[-2:]:  # an odd size was halved
            resized = F.interpolate(
                x.float(), size=skip.shape[-2:], mode="bilinear", align_corners=True
            )
            x = resized.to(x.dtype).contiguous(memory_format=torch.channels_last)
        for repeat in range(self.config.up_repeats[index]):
            if repeat > 0:
                x = cast(nn.ModuleList, self.repeat_mappers[index])[repeat - 1](x)
            for block_index, block in enumerate(cast(nn.ModuleList, self.up_blocks[index])):
                read = skip if block_index == 0 else None
                x = run(block, x, read, *next(inputs), recompute=self.recompute)
                taps.see("up_blocks", index, block_index, x)
        return x

    def _inputs(self, prepared: StageBPrepared, t: Tensor) -> Iterator[tuple[Time, Told]]:
        """Give each block that runs what it is told of the time and of the condition."""
        count = len(self._blocks)
        channels = self.config.time_channels
        told = t * self.config.time_unit
        extras = prepared.extra_embeddings
        return block_inputs(prepared, prepared.tokens, told, extras, channels, count)
