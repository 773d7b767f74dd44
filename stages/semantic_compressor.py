"""Semantic compressor: pixels -> the small latents that Stage C denoises and Stage B is told.

An EfficientNetV2-S trunk (ours, written out here) and a 1x1 mapper to 16 batch-normed channels. It
sees the picture at 3/4 of its size and divides that by 32: 1024 px -> 768 px -> 24 x 24, a factor
of 42.67. There is no decoder: Stage B is the decoder.

Reference: Pernias et al., 2023, Wuerstchen, arXiv:2306.00637, section 3.1; Tan and Le, 2021,
EfficientNetV2, arXiv:2104.00298, tables 4 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torchvision's value for EfficientNetV2, which the published weights were trained with.
_NORM_EPS = 1e-3


@dataclass(frozen=True)
class TrunkStage:
    """A run of equal blocks in the trunk; the first of them changes width and size."""

    kind: Literal["fused", "mb"]
    """"fused": one dense spatial convolution. "mb": depthwise, with squeeze and excitation."""
    expand: int
    """Hidden width of a block in multiples of its input width. 1: no separate projection."""
    kernel: int
    """Side of the spatial kernel, odd."""
    stride: int
    """Stride of the first block."""
    out_channels: int
    """Width after the stage."""
    layers: int
    """Number of blocks."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if self.kind not in ("fused", "mb"):
            raise ValueError(f"kind={self.kind!r} must be 'fused' or 'mb'")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd")
        if min(self.expand, self.kernel, self.stride, self.out_channels, self.layers) < 1:
            raise ValueError(f"every size of a trunk stage must be at least 1: {self}")


EFFICIENTNET_V2_S = (
    TrunkStage("fused", 1, 3, 1, 24, 2),
    TrunkStage("fused", 4, 3, 2, 48, 4),
    TrunkStage("fused", 4, 3, 2, 64, 4),
    TrunkStage("mb", 4, 3, 2, 128, 6),
    TrunkStage("mb", 6, 3, 1, 160, 9),
    TrunkStage("mb", 6, 3, 2, 256, 15),
)
"""The published trunk, behind a stem of 24 channels: 20,177,488 parameters with its head."""


@dataclass(frozen=True)
class CompressorConfig:
    """Sizes and constants of the compressor; the defaults are v3's (20,197,968 parameters)."""

    stem_channels: int = 24
    """Width after the stem, a 3x3 convolution of stride 2."""
    stages: tuple[TrunkStage, ...] = EFFICIENTNET_V2_S
    """The trunk's stages in execution order."""
    head_channels: int = 1280
    """Width of the trunk's last 1x1 convolution."""
    latent_channels: int = 16
    """Channels of the latents."""
    affine: bool = False
    """Whether the last batch norm has a learned gain and shift: v2 yes, v3 no."""
    stochastic_depth: float = 0.2
    """Probability that training skips the last block's branch for a picture; it grows linearly
    from 0 over the blocks. 0 turns it off."""
    input_fraction: float = 0.75
    """``encode`` shrinks pictures to this fraction of their size first."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the pixels; ImageNet's mean, as the trunk was trained."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides the pixels after that; ImageNet's standard deviation."""
    shift: float = 0.0
    """Added to the network's output: latents ready for diffusion are ``(z + shift) / scale``."""
    scale: float = 1.0
    """Divides the output after ``shift``. v2 is (z + 1) / 42; v3 leaves z as it is."""

    def __post_init__(self) -> None:
        """Refuse values that do not fit together."""
        if not self.stages:
            raise ValueError("stages=() must have at least one stage")
        if min(self.stem_channels, self.head_channels, self.latent_channels) < 1:
            raise ValueError(
                f"stem_channels={self.stem_channels}, head_channels={self.head_channels} and "
                f"latent_channels={self.latent_channels} must be at least 1"
            )
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(f"stochastic_depth={self.stochastic_depth} must be in [0, 1)")
        if not 0 < self.input_fraction <= 1:
            raise ValueError(f"input_fraction={self.input_fraction} must be in (0, 1]")
        if not (self.scale > 0 and min(self.pixel_std) > 0):
            raise ValueError(f"scale={self.scale} and pixel_std={self.pixel_std} must be positive")

    @classmethod
    def v3(cls) -> CompressorConfig:
        """Published compressor of Stable Cascade."""
        return cls()

    @classmethod
    def v2(cls) -> CompressorConfig:
        """Published compressor of Wuerstchen v2 (20,198,000 parameters)."""
        return cls(affine=True, shift=1.0, scale=42.0)

    @property
    def stride(self) -> int:
        """Pixels of the (already shrunk) input per latent cell along one side: 32 as published."""
        stride = 2
        for stage in self.stages:
            stride *= stage.stride
        return stride

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that ``encode`` shrinks a picture of this height and width to."""
        height, width = (max(1, round(side * self.input_fraction)) for side in image_size)
        return height, width

    def latent_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents that ``encode`` makes of a picture of this size."""
        height, width = (-(-side // self.stride) for side in self.input_size(image_size))
        return height, width


class ConvNorm(nn.Module):
    """Convolution, batch norm and, if asked for, SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        """Build the layer; the padding keeps ``ceil(size / stride)`` cells."""
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=_NORM_EPS)
        self.activation = nn.SiLU(inplace=True) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return self.activation(self.norm(self.conv(x)))


class SqueezeExcitation(nn.Module):
    """Rescale every channel by a gate that sees the mean over the picture.

    Reference: Hu et al., 2018, arXiv:1709.01507.
    """

    def __init__(self, channels: int, squeezed_channels: int) -> None:
        """Build gates for ``channels`` channels through ``squeezed_channels``."""
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed_channels, kernel_size=1)
        self.excite = nn.Conv2d(squeezed_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(means))))


class TrunkBlock(nn.Module):
    """One EfficientNetV2 block; layers that its kind does not have are identities."""

    def __init__(self, in_channels: int, stage: TrunkStage, stride: int, drop: float) -> None:
        """Build a block of ``stage``.

        Args:
            in_channels: Width of the input.
            stage: The stage that the block belongs to.
            stride: Stride of this block.
            drop: Probability that training skips the branch for a picture.
        """
        super().__init__()
        self.residual = stride == 1 and in_channels == stage.out_channels
        self.drop = drop
        hidden = in_channels * stage.expand
        narrow = stage.expand == 1
        self.expand: nn.Module = nn.Identity()
        self.gate: nn.Module = nn.Identity()
        self.project: nn.Module = nn.Identity()
        if stage.kind == "fused":
            spatial_out = stage.out_channels if narrow else hidden
            self.spatial = ConvNorm(in_channels, spatial_out, stage.kernel, stride)
            if not narrow:
                self.project = ConvNorm(hidden, stage.out_channels, activation=False)
        else:
            if not narrow:
                self.expand = ConvNorm(in_channels, hidden)
            self.spatial = ConvNorm(hidden, hidden, stage.kernel, stride, groups=hidden)
            self.gate = SqueezeExcitation(hidden, max(1, in_channels // 4))
            self.project = ConvNorm(hidden, stage.out_channels, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride))."""
        h = self.project(self.gate(self.spatial(self.expand(x))))
        if not self.residual:
            return h
        if self.training and self.drop > 0:
            # Stochastic depth: a picture keeps its whole branch or loses it.
            h = h * F.dropout(h.new_ones(h.shape[0], 1, 1, 1), self.drop)
        return x + h


class Trunk(nn.Module):
    """EfficientNetV2 without its classifier."""

    def __init__(self, config: CompressorConfig) -> None:
        """Build the trunk of ``config``."""
        super().__init__()
        num_blocks = sum(stage.layers for stage in config.stages)
        self.stem = ConvNorm(3, config.stem_channels, kernel=3, stride=2)
        self.stages = nn.Sequential()
        channels, index = config.stem_channels, 0
        for stage in config.stages:
            blocks = nn.Sequential()
            for layer in range(stage.layers):
                drop = config.stochastic_depth * index / num_blocks
                blocks.append(TrunkBlock(channels, stage, 1 if layer else stage.stride, drop))
                channels, index = stage.out_channels, index + 1
            self.stages.append(blocks)
        self.head = ConvNorm(channels, config.head_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, 1280, ceil(H / 32), ceil(W / 32))."""
        return self.head(self.stages(self.stem(x)))


class SemanticCompressor(nn.Module):
    """The compressor; it alone normalises pixels and applies ``shift`` and ``scale``."""

    def __init__(self, config: CompressorConfig) -> None:
        """Build the compressor of ``config`` with random weights."""
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.mapper = nn.Conv2d(
            config.head_channels, config.latent_channels, kernel_size=1, bias=False
        )
        self.norm = nn.BatchNorm2d(config.latent_channels, affine=config.affine)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def stride(self) -> int:
        """Pixels of ``forward``'s input per latent cell along one side."""
        return self.config.stride

    def encode(self, pixels: Tensor) -> Tensor:
        """Shrink full-size pixels (B, 3, H, W) in [0, 1] by ``input_fraction``, then compress them.

        Returns:
            (B, 16, h, w), ready for diffusion, of size ``config.latent_size((H, W))``.
        """
        height, width = pixels.shape[-2:]
        size = self.config.input_size((height, width))
        if size != (height, width):
            # In float32: half precision has no antialiased resize on every device.
            pixels = F.interpolate(
                pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False
            )
        return self(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compress pixels that already have the compressor's size.

        Args:
            pixels: (B, 3, H, W) in [0, 1], any size; float32 whatever the weights are, since
                half precision would round them before they are normalised.

        Returns:
            (B, 16, ceil(H / stride), ceil(W / stride)), ready for diffusion.
        """
        x = pixels.contiguous(memory_format=torch.channels_last)
        mean = x.new_tensor(self.config.pixel_mean).view(1, 3, 1, 1)
        std = x.new_tensor(self.config.pixel_std).view(1, 3, 1, 1)
        x = ((x - mean) / std).to(self.mapper.weight.dtype)
        z = self.norm(self.mapper(self.trunk(x)))
        return (z + self.config.shift) / self.config.scale

    def raw(self, latents: Tensor) -> Tensor:
        """Undo ``shift`` and ``scale``: v2's Stage B is conditioned on the network's own output."""
        return latents * self.config.scale - self.config.shift
