"""A CLIP model folder as yardstick: pictures and prompts to vectors that can be compared.

The folder is a transformers ``CLIPModel`` with both towers and a tokenizer, plus
``preprocessor.json``, which says how pictures enter the picture tower: the side in pixels, and the
mean and standard deviation that pixels in ``[0, 1]`` are normalised with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder


class ClipScorer:
    """Embeds pictures and prompts into CLIP's common space, as unit vectors in float32.

    Prompts are read by the same code as in the cascade.
    """

    def __init__(self, picture_encoder: PictureEncoder, text_encoder: TextEncoder) -> None:
        """Take both towers."""
        self.picture_encoder = picture_encoder
        self.text_encoder = text_encoder

    @classmethod
    def from_folder(cls, folder: Path | str, device: torch.device | str = "cpu") -> ClipScorer:
        """Load a local folder; nothing is downloaded.

        Raises:
            UserError: If the folder or one of its parts is missing or unreadable.
        """
        text = TextEncoder.from_folder(folder, TextConfig(), device=device)
        return cls(PictureEncoder.from_folder(folder, device), text)

    @torch.inference_mode()
    def embed_pictures(self, pixels: Tensor, batch_size: int = 32) -> Tensor:
        """Embed pictures.

        Args:
            pixels: ``(N, 3, H, W)`` in ``[0, 1]``.
            batch_size: Pictures at a time.

        Returns:
            ``(N, D)`` unit vectors on the CPU.
        """
        starts = range(0, len(pixels), batch_size)
        rows = [self.picture_encoder(pixels[i : i + batch_size]).cpu() for i in starts]
        return F.normalize(torch.cat(rows), dim=1)

    @torch.inference_mode()
    def embed_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Embed prompts; a prompt beyond the text tower's window is cut with a warning.

        Args:
            prompts: ``N`` prompts.
            batch_size: Prompts at a time.

        Returns:
            ``(N, D)`` unit vectors on the CPU.
        """
        rows = []
        for start in range(0, len(prompts), batch_size):
            features = self.text_encoder.encode(prompts[start : start + batch_size])
            rows.append(F.normalize(features.pooled, dim=1).cpu())
        return torch.cat(rows)
