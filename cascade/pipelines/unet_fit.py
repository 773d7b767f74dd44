"""Whether the parts of a U-Net's pipeline were made for each other: the widths where they meet."""

from __future__ import annotations

from cascade.errors import UserError
from cascade.pipelines.unet_parts import UNetParts


def check_unet_fit(parts: UNetParts, where: str) -> None:
    """Let parts pass whose outputs are as wide as the inputs that they go to.

    Args:
        parts: The loaded parts.
        where: The model's folder or file; an error begins with it.

    Raises:
        UserError: Naming both widths.
    """
    config, second = parts.unet.config, parts.text_2
    hidden = parts.text.hidden_channels + (0 if second is None else second.hidden_channels)
    latent = parts.autoencoder.config.latent_channels
    meetings = [
        ("the text encoders' states", hidden, "the U-Net", config.text_channels),
        ("the U-Net's latents", config.out_channels, "its autoencoder", latent),
    ]
    if config.text_pooled_channels is not None:
        what = "the text encoder's pooled state" if second is None else "the second text encoder's"
        pooled = (second or parts.text).pooled_channels
        meetings.append((what, pooled, "the U-Net", config.text_pooled_channels))
    for what, made, reader, wanted in meetings:
        if made != wanted:
            raise UserError(
                f"{where}: {what}: {made} channels, but {reader} was made for {wanted}; the files "
                "belong to different models"
            )
