"""Sizes of the published networks that studies name, so that a plan needs no download.

Text and picture towers are CLIP's; their operations follow from their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.autoencoder_kl import AutoencoderKLConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_a import StageAConfig
from stages.unet.config import UNetConfig


@dataclass(frozen=True)
class Tower:
    """One of CLIP's transformers."""

    channels: int
    layers: int
    inner_channels: int
    projection: int | None
    """Channels of the projection; None: there is none."""

    def flops(self, tokens: int, embedded: int = 0) -> float:
        """Return the operations of one input, two for a multiply-accumulate.

        Args:
            tokens: That attend to each other.
            embedded: Numbers of each patch that a picture tower embeds; a text tower looks up.
        """
        width = self.channels
        products = 4 * width * width + 2 * width * self.inner_channels
        attention = 2 * tokens * width
        projected = 0 if self.projection is None else width * self.projection
        patches = embedded * (tokens - 1) * width
        return 2.0 * (self.layers * tokens * (products + attention) + projected + patches)


CLIP_L_TEXT = Tower(768, 12, 3072, None)
CLIP_H_TEXT = Tower(1024, 24, 4096, 1024)
BIG_G_TEXT = Tower(1280, 32, 5120, 1280)
CLIP_L_PICTURES = Tower(1024, 24, 4096, 768)
CLIP_TOKENS = 77
PATCH, PICTURE_SIDE = 14, 224
"""Of CLIP ViT-L/14, in pixels."""

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
STABLE_CASCADE = "stabilityai/stable-cascade"
NETWORKS: dict[tuple[str, str], Any] = {
    (SDXL, "unet"): UNetConfig.sdxl(),
    ("sdxl_lightning_4step_unet.safetensors", "unet"): UNetConfig.sdxl(),
    ("stabilityai/sdxl-turbo", "unet"): UNetConfig.sdxl(),
    (SDXL, "autoencoder_kl"): AutoencoderKLConfig.sdxl(),
    ("stabilityai/sdxl-turbo", "autoencoder_kl"): AutoencoderKLConfig.sdxl(),
    (STABLE_CASCADE, "stage_a"): replace(StageAConfig.v2(), scale=0.43),
    ("runs/published/stage_a/stage_a.safetensors", "stage_a"): replace(
        StageAConfig.v2(), scale=0.43
    ),
    (STABLE_CASCADE, "compressor"): CompressorConfig(),
    ("CompVis/stable-diffusion-v1-4", "unet"): UNetConfig.sd15(),
    ("CompVis/stable-diffusion-v1-4", "autoencoder_kl"): AutoencoderKLConfig.sd(),
}
"""(name, kind) -> its configuration. A file of ours that is not trained yet is named by its path in
the shipped configurations."""
TEXT_TOWERS: dict[str, tuple[Tower, ...]] = {
    SDXL: (CLIP_L_TEXT, BIG_G_TEXT),
    STABLE_CASCADE: (BIG_G_TEXT,),
    "warp-ai/wuerstchen-prior": (BIG_G_TEXT,),
    "warp-ai/wuerstchen": (CLIP_H_TEXT,),
    "CompVis/stable-diffusion-v1-4": (CLIP_L_TEXT,),
}
"""Name of a model -> its text encoders."""
PICTURE_TOWERS = {STABLE_CASCADE: CLIP_L_PICTURES, "clip-vit-large-patch14": CLIP_L_PICTURES}
"""Name of a model, or of the folder that it lies in -> its picture tower."""


def picture_tower_flops(tower: Tower, side: int) -> float:
    """Return the operations of a picture tower of patches of 14 pixels on a square."""
    tokens = (side // PATCH) ** 2 + 1
    return tower.flops(tokens, embedded=3 * PATCH * PATCH)


def last_name(name: str) -> str:
    """Return a folder's own name, by which published weights are known wherever they lie."""
    return Path(name).name
