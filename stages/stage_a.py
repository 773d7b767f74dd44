"""Stage A: the VQ autoencoder between pixels and the latents that Stage B denoises.

Pixels in [0, 1] at (H, W) <-> 4 channels at (H/4, W/4). The codebook shapes the latent space during
training; at inference the continuous latents are used, without quantisation.

Reference: Pernias et al., 2023, Wuerstchen, arXiv:2306.00637; the network is Paella's VQGAN f4,
Rampas et al., 2022, arXiv:2211.07292.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.linear import Linear, linear
from stages.overwrite import add, gelu
from stages.quantize import VectorQuantizer


@dataclass(frozen=True)
class StageAConfig:
    """Sizes of Stage A; the defaults are the published network (18,406,894 parameters)."""

    channels: tuple[int, ...] = (192, 384)
    """Width of each level, finest first. Every level after the first halves height and width."""
    encoder_blocks: tuple[int, ...] = (1, 1)
    """Residual blocks per encoder level, finest first (execution order)."""
    decoder_blocks: tuple[int, ...] = (12, 1)
    """Residual blocks per decoder level, coarsest first (execution order)."""
    patch_size: int = 2
    """Side of the pixel square that is folded into channels before the first level."""
    expansion: int = 4
    """Hidden width of a block's MLP, in multiples of the level's width."""
    latent_channels: int = 4
    """Channels of the latents, and values per code."""
    codebook_size: int = 8192
    """Number of codes."""
    scale: float = 0.43
    """Divides the encoder's output, so that latents suit diffusion. It is a constant that travels
    with the checkpoint: Stage B is trained on latents divided by it, so it must never be changed
    alone. Published: 0.43 for v3 (Stable Cascade), 0.3764 for v2."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        levels = len(self.channels)
        if levels < 1 or len(self.encoder_blocks) != levels or len(self.decoder_blocks) != levels:
            raise ValueError(
                f"channels={self.channels}, encoder_blocks={self.encoder_blocks} and "
                f"decoder_blocks={self.decoder_blocks} must have one entry per level"
            )
        if min(self.channels) < 1 or min(*self.encoder_blocks, *self.decoder_blocks) < 0:
            raise ValueError(
                f"channels={self.channels} must be positive; encoder_blocks={self.encoder_blocks} "
                f"and decoder_blocks={self.decoder_blocks} must not be negative"
            )
        if min(self.patch_size, self.expansion, self.latent_channels, self.codebook_size) < 1:
            raise ValueError(
                f"patch_size={self.patch_size}, expansion={self.expansion}, latent_channels="
                f"{self.latent_channels} and codebook_size={self.codebook_size} must be at least 1"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be positive")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 4 for the published network."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def decoder_reach(self) -> int:
        """Latent cells to each side of its own that a decoded pixel depends on: 13 as published.

        Every block looks one cell of its level further, and every transposed convolution (4 wide,
        stride 2) halves the distance and adds one cell of the coarser level.
        """
        reach = 0  # in cells of the level, from the finest, where pixels are, to the coarsest
        for level, blocks in enumerate(reversed(self.decoder_blocks)):
            if level > 0:
                reach = reach // 2 + 1
            reach += blocks
        return reach

    @property
    def encoder_reach(self) -> int:
        """Latent cells to each side of its own whose pixels a latent depends on: 2 as published.

        Every block looks one cell of its level further, and every strided convolution (4 wide,
        stride 2) doubles the distance and adds one cell of the finer level.
        """
        reach = 0  # in cells of the level, from the coarsest, where latents are, to the finest
        for level in range(len(self.channels) - 1, -1, -1):
            reach += self.encoder_blocks[level]
            if level > 0:
                reach = 2 * reach + 1
        return -(-reach // 2 ** (len(self.channels) - 1))

    @classmethod
    def v3(cls) -> StageAConfig:
        """Published Stage A with Stable Cascade's scale, 0.43."""
        return cls(scale=0.43)

    @classmethod
    def v2(cls) -> StageAConfig:
        """Published Stage A with Wuerstchen v2's scale, 0.3764."""
        return cls(scale=0.3764)


@dataclass(frozen=True)
class StageAOutput:
    """A reconstruction with what its training loss needs."""

    pixels: Tensor
    """(B, 3, H, W), about [0, 1], not clamped."""
    latents: Tensor
    """(B, 4, H/4, W/4), the encoder's continuous output as the codebook sees it: before
    quantisation and *not* divided by ``scale``."""
    codebook_loss: Tensor
    """Scalar float32; 0 without quantisation."""
    commitment_loss: Tensor
    """Scalar float32; 0 without quantisation."""
    indices: Tensor | None
    """(B, H/4, W/4) int64, the codes taken; None without quantisation."""


class StageABlock(nn.Module):
    """A depthwise and a channelwise residual branch, modulated by six learned scalars.

    Each branch is ``x + f(norm(x) * (1 + gain) + shift) * size``. All scalars start at zero, so
    that a new block is the identity.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        """Build a block of ``channels`` channels whose MLP is ``expansion`` times wider."""
        super().__init__()
        self.gammas = nn.Parameter(torch.zeros(6))
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=3, groups=channels)
        self.expand = Linear(channels, channels * expansion)
        self.project = Linear(channels * expansion, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; norms are computed in float32."""
        gain_1, shift_1, size_1, gain_2, shift_2, size_2 = self.gammas.float().unbind()
        # What scales and shifts a norm goes into the weights of the layer that reads it, and a
        # branch's size into those of its last: the same, and far fewer numbers are touched.
        h = _norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        h = F.pad(h, (1, 1, 1, 1), mode="replicate")  # the shift of an edge, too, is the edge's
        weight, bias = _told(self.depthwise, gain_1, shift_1, size_1)
        x = add(F.conv2d(h, weight, bias, groups=self.depthwise.groups), x)
        h = _norm(x.permute(0, 2, 3, 1))  # (B, H, W, C)
        h = gelu(linear(h, *_told(self.expand, gain_2, shift_2)))
        h = linear(h, *_told(self.project, size=size_2))
        return add(h.permute(0, 3, 1, 2), x)


def _norm(x: Tensor) -> Tensor:
    """Normalise the last axis; statistics are float32 inside the kernel."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def _told(
    layer: nn.Conv2d | nn.Linear,
    gain: Tensor | float = 0.0,
    shift: Tensor | float = 0.0,
    size: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer of ``x * (1 + gain) + shift`` whose output is times ``size``.

    They are put together in float32 and rounded once.
    """
    assert layer.bias is not None, "the layers of a block have biases"
    weight = layer.weight.float()
    bias = layer.bias.float() + shift * weight.flatten(1).sum(dim=1)
    dtype = layer.weight.dtype
    return (weight * ((1 + gain) * size)).to(dtype), (bias * size).to(dtype)


class EncoderLevel(nn.Module):
    """Halve height and width (every level but the first), then refine."""

    def __init__(self, config: StageAConfig, level: int) -> None:
        """Build level ``level``, 0 being the finest."""
        super().__init__()
        width = config.channels[level]
        self.downsample: nn.Module = nn.Identity()
        if level > 0:
            self.downsample = nn.Conv2d(config.channels[level - 1], width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            *(StageABlock(width, config.expansion) for _ in range(config.encoder_blocks[level]))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H/2, W/2), or the same size in the first level."""
        return self.blocks(self.downsample(x))


class DecoderLevel(nn.Module):
    """Refine, then double height and width (every level but the last)."""

    def __init__(self, config: StageAConfig, level: int) -> None:
        """Build level ``level`` in execution order, 0 being the coarsest."""
        super().__init__()
        widths = config.channels[::-1]
        blocks = config.decoder_blocks[level]
        self.blocks = nn.Sequential(
            *(StageABlock(widths[level], config.expansion) for _ in range(blocks))
        )
        self.upsample: nn.Module = nn.Identity()
        if level + 1 < len(widths):
            self.upsample = nn.ConvTranspose2d(
                widths[level], widths[level + 1], kernel_size=4, stride=2, padding=1
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, 2H, 2W), or the same size in the last level."""
        return self.upsample(self.blocks(x))


class Encoder(nn.Module):
    """Pixels -> batch-normed continuous latents."""

    def __init__(self, config: StageAConfig) -> None:
        """Build the encoder of ``config``."""
        super().__init__()
        levels = range(len(config.channels))
        self.unshuffle = nn.PixelUnshuffle(config.patch_size)
        self.stem = nn.Conv2d(3 * config.patch_size**2, config.channels[0], kernel_size=1)
        self.levels = nn.Sequential(*(EncoderLevel(config, level) for level in levels))
        self.to_latents = nn.Conv2d(
            config.channels[-1], config.latent_channels, kernel_size=1, bias=False
        )
        self.norm = nn.BatchNorm2d(config.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 4, H/4, W/4)."""
        patches = self.unshuffle(pixels.contiguous(memory_format=torch.channels_last))
        x = self.stem(patches.contiguous(memory_format=torch.channels_last))
        return self.norm(self.to_latents(self.levels(x)))


class Decoder(nn.Module):
    """Latents, quantised or not -> pixels."""

    def __init__(self, config: StageAConfig) -> None:
        """Build the decoder of ``config``."""
        super().__init__()
        levels = range(len(config.channels))
        self.from_latents = nn.Conv2d(config.latent_channels, config.channels[-1], kernel_size=1)
        self.levels = nn.Sequential(*(DecoderLevel(config, level) for level in levels))
        self.to_patches = nn.Conv2d(config.channels[0], 3 * config.patch_size**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 4h, 4w), not clamped."""
        x = self.from_latents(latents.contiguous(memory_format=torch.channels_last))
        pixels = self.shuffle(self.to_patches(self.levels(x)))
        return pixels.contiguous(memory_format=torch.channels_last)


class StageA(nn.Module):
    """The VQ autoencoder. It alone multiplies and divides by ``scale``; nobody outside does."""

    def __init__(self, config: StageAConfig) -> None:
        """Build Stage A of ``config``."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(config.codebook_size, config.latent_channels)
        self.decoder: nn.Module = Decoder(config)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return self.config.downscale

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels into latents ready for diffusion.

        Args:
            pixels: (B, 3, H, W) in [0, 1]; H and W multiples of ``downscale``.

        Returns:
            (B, 4, H/4, W/4), continuous (not quantised) and divided by ``scale``.

        Raises:
            ValueError: If H or W is not a multiple of ``downscale``.
        """
        return self._encode_unscaled(pixels) / self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents as ``encode`` returns them, (B, 4, h, w), into pixels (B, 3, 4h, 4w).

        Pixels are about [0, 1]; they are not clamped here.
        """
        return self.decoder(latents * self.config.scale)

    def forward(self, pixels: Tensor, quantize: bool = True) -> StageAOutput:
        """Reconstruct pixels (B, 3, H, W) in [0, 1], for training.

        Raises:
            ValueError: If H or W is not a multiple of ``downscale``.
        """
        latents = self._encode_unscaled(pixels)
        if not quantize:
            zero = torch.zeros((), device=latents.device)
            return StageAOutput(self.decoder(latents), latents, zero, zero, None)
        codes = self.quantizer(latents)
        return StageAOutput(
            pixels=self.decoder(codes.quantized),
            latents=latents,
            codebook_loss=codes.codebook_loss,
            commitment_loss=codes.commitment_loss,
            indices=codes.indices,
        )

    def _encode_unscaled(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"pixels of {height}x{width}: both sides must be multiples of {self.downscale}"
            )
        return self.encoder(pixels)
