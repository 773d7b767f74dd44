"""AutoencoderKL: the autoencoder of SD and SDXL, between pixels and the latents of their U-Nets.

Pixels in [0, 1] at (H, W) <-> 4 channels at (H/8, W/8). The encoder gives a Gaussian for each
latent value; diffusion models learn its samples, scaled to a deviation of about 1.

Attributes are named as in the published diffusers files, which therefore load without renaming.

Reference: Rombach et al., 2022, arXiv:2112.10752, section 3.1; Podell et al., 2023, SDXL,
arXiv:2307.01952, section 2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from stages.layers import attend
from stages.linear import Linear
from stages.overwrite import add, silu
from stages.unet.resnet import Downsample, ResnetBlock, Upsample

NORM_EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """Sizes of the autoencoder; the defaults are SD's and SDXL's (83,653,863 parameters)."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level, finest first. Every level after the first halves height and width."""
    blocks_per_level: int = 2
    """Resnets in each level of the encoder; the decoder's have one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    quant_convs: bool = True
    """Whether a 1x1 convolution stands on each side of the latents; False in later ones."""
    norm_groups: int = 32
    """Groups of every group norm."""
    scale: float = 0.18215
    """Multiplies the encoder's latents, so that they suit diffusion. It travels with the
    checkpoint: U-Nets are trained on latents multiplied by it, so it must never be changed alone.
    Published: 0.18215 for SD, 0.13025 for SDXL."""
    shift: float = 0.0
    """Is taken from the encoder's latents before they are multiplied; 0 for SD and SDXL."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels={self.channels} must be positive, one for each level")
        if self.norm_groups < 1 or any(width % self.norm_groups for width in self.channels):
            raise ValueError(
                f"norm_groups={self.norm_groups} does not divide channels={self.channels}"
            )
        if min(self.blocks_per_level, self.latent_channels) < 1:
            raise ValueError(
                f"blocks_per_level={self.blocks_per_level} and latent_channels="
                f"{self.latent_channels} must be at least 1"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be positive")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 8 as published."""
        return 2 ** (len(self.channels) - 1)

    @classmethod
    def sd(cls) -> AutoencoderKLConfig:
        """Return the autoencoder of SD 1.x and 2.x."""
        return cls()

    @classmethod
    def sdxl(cls) -> AutoencoderKLConfig:
        """Return SDXL's: the same network with a scale of its own.

        Its published weights overflow in float16, where pictures turn black: run it in float32 or
        bfloat16, or load the weights that were mended for float16.
        """
        return replace(cls.sd(), scale=0.13025)


@dataclass(frozen=True)
class DiagonalGaussian:
    """A Gaussian for each latent value, independent of the others, before scale and shift."""

    mean: Tensor
    """(B, latent_channels, h, w), float32."""
    log_variance: Tensor
    """Same shape, float32, within [-30, 20]."""

    @classmethod
    def of_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Make it of the encoder's output, ``(B, 2 * latent_channels, h, w)``."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """Standard deviation, as ``mean``."""
        return torch.exp(0.5 * self.log_variance)

    def sample(self, randn_like: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """Draw from it; ``randn_like`` is the source of noise."""
        return self.mean + self.std * randn_like(self.mean)


class AttentionBlock(nn.Module):
    """Self-attention of all positions, with one head and a residual."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        """Take the width."""
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = nn.ModuleList([Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # (B, 1, H * W, C)
        attended = attend(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        attended = self.to_out[0](attended[:, 0]).unflatten(1, x.shape[-2:])  # (B, H, W, C)
        # The first summand's memory layout is the sum's: channels last, for the layers after it.
        return add(attended.permute(0, 3, 1, 2), x)


class MidBlock(nn.Module):
    """Two resnets with an attention between them."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        """Take the width."""
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, norm_groups)
        self.attentions = nn.ModuleList([AttentionBlock(channels, norm_groups)])

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` as it came."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def _resnets(in_channels: int, channels: int, count: int, norm_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResnetBlock(channels if block else in_channels, channels, norm_groups, eps=NORM_EPS)
        for block in range(count)
    )


class EncoderLevel(nn.Module):
    """Resnets, then half the height and width (every level but the last)."""

    def __init__(self, config: AutoencoderKLConfig, level: int) -> None:
        """Build ``level``, 0 being the finest."""
        super().__init__()
        width, before = config.channels[level], config.channels[max(level - 1, 0)]
        self.resnets = _resnets(before, width, config.blocks_per_level, config.norm_groups)
        self.downsamplers: nn.ModuleList | None = None
        if level + 1 < len(config.channels):
            self.downsamplers = nn.ModuleList([Downsample(width, asymmetric=True)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H/2, W/2), or the same size in the last level."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class DecoderLevel(nn.Module):
    """Resnets, then twice the height and width (every level but the last)."""

    def __init__(self, config: AutoencoderKLConfig, index: int) -> None:
        """Build the level of ``index`` in running order, 0 being the coarsest."""
        super().__init__()
        widths = config.channels[::-1]
        width, before = widths[index], widths[max(index - 1, 0)]
        self.resnets = _resnets(before, width, config.blocks_per_level + 1, config.norm_groups)
        self.upsamplers: nn.ModuleList | None = None
        if index + 1 < len(widths):
            self.upsamplers = nn.ModuleList([Upsample(width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, 2H, 2W), or the same size in the last level."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsamplers is None:
            return x
        height, width = x.shape[-2:]
        return cast(Upsample, self.upsamplers[0])(x, (2 * height, 2 * width))


class Encoder(nn.Module):
    """Pixels in [-1, 1] -> moments, before their 1x1 convolution."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        """Build the encoder of ``config``."""
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(3, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.Sequential(*(EncoderLevel(config, i) for i in range(len(widths))))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 * latent_channels, H/8, W/8)."""
        x = self.mid_block(self.down_blocks(self.conv_in(x)))
        return self.conv_out(silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents, after their 1x1 convolution -> pixels in about [-1, 1]."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        """Build the decoder of ``config``."""
        super().__init__()
        widths, groups = config.channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], kernel_size=3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups)
        self.up_blocks = nn.Sequential(*(DecoderLevel(config, i) for i in range(len(widths))))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, 3, 8h, 8w)."""
        x = self.up_blocks(self.mid_block(self.conv_in(x)))
        return self.conv_out(silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """The autoencoder. It alone applies scale and shift; nobody outside does."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        """Build the autoencoder of ``config``."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv: nn.Conv2d | None = None
        self.post_quant_conv: nn.Conv2d | None = None
        if config.quant_convs:
            channels = config.latent_channels
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, kernel_size=1)
            self.post_quant_conv = nn.Conv2d(channels, channels, kernel_size=1)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return self.config.downscale

    def posterior(self, pixels: Tensor) -> DiagonalGaussian:
        """Return the Gaussian of the latents, before scale and shift.

        Args:
            pixels: (B, 3, H, W) in [0, 1], float32 whatever the weights are; H and W multiples of
                ``downscale``.

        Raises:
            ValueError: If H or W is not a multiple of ``downscale``.
        """
        height, width = pixels.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"pixels of {height}x{width}: both sides must be multiples of {self.downscale}"
            )
        # In float32: bfloat16 has fewer levels between -1 and 1 than a picture has.
        centred = (2 * pixels.float() - 1).to(self.encoder.conv_in.weight.dtype)
        moments = self.encoder(centred)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return DiagonalGaussian.of_moments(moments)

    def latent_gaussian(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents of ``encode``, shifted and scaled.

        Arguments and errors are those of ``posterior``; both are ``(B, 4, H/8, W/8)``, float32.
        """
        posterior = self.posterior(pixels)
        mean = (posterior.mean - self.config.shift) * self.config.scale
        return mean, posterior.std * self.config.scale

    def encode(
        self, pixels: Tensor, randn_like: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Turn pixels into latents ready for diffusion.

        Args:
            pixels: (B, 3, H, W) in [0, 1]; H and W multiples of ``downscale``.
            randn_like: Source of the noise of a sample, which U-Nets are trained on; None takes
                the mean.

        Returns:
            (B, 4, H/8, W/8), float32, shifted and scaled.

        Raises:
            ValueError: If H or W is not a multiple of ``downscale``.
        """
        return self.latents_of(self.posterior(pixels), randn_like)

    def latents_of(
        self, posterior: DiagonalGaussian, randn_like: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Draw latents ready for diffusion, as ``encode`` does, of a picture that is encoded once.

        Args:
            posterior: Of (B, 3, H, W) pixels.
            randn_like: See ``encode``; for a B of 1 it may return noise of more pictures, (N, 4,
                H/8, W/8), of each of which a sample is drawn.

        Returns:
            (B, 4, H/8, W/8) or (N, 4, H/8, W/8), float32, shifted and scaled.
        """
        latents = posterior.mean if randn_like is None else posterior.sample(randn_like)
        return (latents - self.config.shift) * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents as ``encode`` returns them, (B, 4, h, w), into pixels (B, 3, 8h, 8w).

        Pixels are float32 and about [0, 1]; they are not clamped here.
        """
        unscaled = latents.float() / self.config.scale + self.config.shift
        x = unscaled.to(self.decoder.conv_in.weight.dtype)
        if self.post_quant_conv is not None:
            x = self.post_quant_conv(x)
        return self.decoder(x).float() / 2 + 0.5
