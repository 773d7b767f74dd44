"""A small, fast decoder of Stage A's latents: residual convolutions and pixel shuffles.

Latents as ``StageA.encode`` returns them -> pixels (3, 4H, 4W). It is taught by Stage A's own
decoder (``python -m train stage_a_decoder``); the encoder, and with it Stage B, stays as it is.

Reference: Shi et al., 2016, arXiv:1609.05158 (pixel shuffle); a tiny decoder of a large
autoencoder's latents is common practice for previews, this one's sizes are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import run
from stages.stage_a import StageA, StageAConfig


@dataclass(frozen=True)
class StageAFastConfig:
    """Sizes of the fast decoder; the defaults decode the published latents (600,140 parameters)."""

    latent_channels: int = 4
    """Channels of the latents."""
    channels: tuple[int, ...] = (64, 64)
    """Width of each level in execution order, the latents' own resolution first; every level ends
    in a pixel shuffle, the last in one to pixels. Two levels decode 4 pixels a cell."""
    blocks: tuple[int, ...] = (4, 2)
    """Residual blocks of each level."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not self.channels or len(self.channels) != len(self.blocks):
            raise ValueError(
                f"channels={self.channels} and blocks={self.blocks} must have one entry per level"
            )
        if min(self.latent_channels, *self.channels) < 1 or min(self.blocks) < 0:
            raise ValueError(
                f"latent_channels={self.latent_channels} and channels={self.channels} must be "
                f"positive, blocks={self.blocks} not negative"
            )

    @property
    def upscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** len(self.channels)

    @property
    def reach(self) -> int:
        """Latent cells to each side of its own that a decoded pixel depends on."""
        reach = 0  # in cells of the level, from the finest to the coarsest
        for level in range(len(self.blocks) - 1, -1, -1):
            # A cell of the finer level lies in half of one here; then the convolution that fills
            # it, and two of each block.
            reach = -(-reach // 2) + 1 + 2 * self.blocks[level]
        return reach + 1  # the first convolution


class FastBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        """Start as the identity."""
        super().__init__()
        self.expand = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.project = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return x + self.project(F.silu(self.expand(x)))


class FastLevel(nn.Module):
    """Refine, then double height and width."""

    def __init__(self, channels: int, out_channels: int, blocks: int) -> None:
        """Take the widths and the number of blocks."""
        super().__init__()
        self.blocks = nn.ModuleList(FastBlock(channels) for _ in range(blocks))
        self.widen = nn.Conv2d(channels, 4 * out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """(B, C, h, w) -> (B, C_out, 2h, 2w)."""
        for block in self.blocks:
            x = run(block, x, recompute=recompute)
        return F.pixel_shuffle(self.widen(x), 2)


class StageAFast(nn.Module):
    """The fast decoder."""

    def __init__(self, config: StageAFastConfig) -> None:
        """Build the decoder of ``config``."""
        super().__init__()
        self.config = config
        widths = (*config.channels, 3)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], kernel_size=3, padding=1)
        self.levels = nn.ModuleList(
            FastLevel(widths[level], widths[level + 1], blocks)
            for level, blocks in enumerate(config.blocks)
        )
        self.recompute = False
        """Whether the backward pass runs each block again instead of keeping what is in it."""

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents (B, 4, h, w), as ``StageA.encode`` returns them, into (B, 3, 4h, 4w).

        Pixels are about [0, 1]; they are not clamped.
        """
        x = F.silu(self.conv_in(latents.contiguous(memory_format=torch.channels_last)))
        for level in self.levels:
            x = level(x, recompute=self.recompute)
        return x.contiguous(memory_format=torch.channels_last) + 0.5


@dataclass(frozen=True)
class FastDecodedConfig(StageAConfig):
    """Sizes of a Stage A whose decoder is the fast one."""

    fast: StageAFastConfig = field(default_factory=StageAFastConfig)
    """Of the decoder; ``decoder_blocks`` is not used."""

    @property
    def decoder_reach(self) -> int:
        """See ``StageAConfig``."""
        return self.fast.reach


class FastDecodedStageA(StageA):
    """A Stage A whose decoder is the fast one: what a pipeline runs in its place."""

    def __init__(self, config: FastDecodedConfig) -> None:
        """Build both.

        Raises:
            ValueError: They do not decode the same latents to the same size.
        """
        if config.fast.latent_channels != config.latent_channels:
            raise ValueError(
                f"the fast decoder reads latents of {config.fast.latent_channels} channels, but "
                f"Stage A's have {config.latent_channels}"
            )
        if config.fast.upscale != config.downscale:
            raise ValueError(
                f"the fast decoder makes {config.fast.upscale} pixels of a cell's side, but Stage "
                f"A's cells have {config.downscale}"
            )
        super().__init__(config)
        self.decoder = StageAFast(config.fast)

    @classmethod
    def of(cls, stage_a: StageA, fast: StageAFast) -> FastDecodedStageA:
        """Join the encoder of one and the other, without a copy.

        Raises:
            ValueError: They do not belong together.
        """
        own = {one.name: getattr(stage_a.config, one.name) for one in fields(stage_a.config)}
        with torch.device("meta"):
            joined = cls(FastDecodedConfig(**own, fast=fast.config))
        joined.encoder, joined.quantizer, joined.decoder = stage_a.encoder, stage_a.quantizer, fast
        return joined.train(stage_a.training)

    def decode(self, latents: Tensor) -> Tensor:
        """See ``StageA.decode``; the fast decoder knows the latents' scale by itself."""
        return self.decoder(latents)
