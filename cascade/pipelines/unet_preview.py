"""Rough pictures of a U-Net's latents while it draws: colours linear in the latents, no network.

A pixel stands for a latent cell. The factors belong to the two published latent spaces, which are
told apart by their scales; of an autoencoder that was trained anew they would show wrong colours.

Sources: SD, keturn, 2022, "Decoding latents to RGB without upscaling", discuss.huggingface.co,
thread 23204; SDXL, Timothy Alexis Vass, 2023, "Explaining the SDXL latent space", as diffusers'
documentation of callbacks has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKLConfig

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class LatentColours:
    """What each latent channel adds to red, green and blue, which are ``full`` at their most."""

    channels: tuple[Colour, Colour, Colour, Colour]
    """Of one unit of each channel."""
    zero: Colour
    """Of a cell whose channels are 0."""
    full: float

    def pixels(self, latents: Tensor) -> Tensor:
        """Turn latents ``(B, 4, h, w)`` into rough pixels ``(B, 3, h, w)``, about [0, 1]."""
        channels, zero = (latents.new_tensor(one) for one in (self.channels, self.zero))
        colours = torch.einsum("bchw,cr->brhw", latents, channels) + zero[:, None, None]
        return colours / self.full


SD = LatentColours(
    # Published for levels from -1 to 1: 1 is added here, and 2 is their width.
    channels=(
        (0.298, 0.207, 0.208),
        (0.187, 0.286, 0.173),
        (-0.158, 0.189, 0.264),
        (-0.184, -0.271, -0.473),
    ),
    zero=(1.0, 1.0, 1.0),
    full=2.0,
)
SDXL = LatentColours(
    channels=((60, 60, 60), (-60, -5, 10), (25, 15, -5), (-70, -50, -35)),
    zero=(150, 140, 130),
    full=255,
)


def colours_of(config: AutoencoderKLConfig, where: object) -> LatentColours:
    """Return the colours of an autoencoder's latents.

    Args:
        config: The autoencoder's.
        where: The model, for the message.

    Raises:
        UserError: If its latents are neither SD's nor SDXL's.
    """
    for known, colours in (
        (AutoencoderKLConfig.sd(), SD),
        (AutoencoderKLConfig.sdxl(), SDXL),
    ):
        space = (known.latent_channels, known.scale, known.shift)
        if (config.latent_channels, config.scale, config.shift) == space:
            return colours
    raise UserError(
        f"{where}: no previews: its latents, scaled by {config.scale:g}, are neither SD's nor "
        "SDXL's, whose colours are known"
    )
