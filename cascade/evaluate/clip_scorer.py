"""A CLIP model folder as yardstick: pictures and prompts to vectors that can be compared.

The folder is a transformers ``CLIPModel`` with both towers and a tokenizer, plus
``preprocessor.json``, which says how pictures enter the picture tower: the side in pixels, and the
mean and standard deviation that pixels in ``[0, 1]`` are normalised with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from cascade.config import from_dict
from cascade.errors import UserError
from cascade.text.encoder import TextConfig, TextEncoder


@dataclass(frozen=True)
class PicturePreprocessing:
    """How pictures enter the picture tower; the content of ``preprocessor.json``."""

    image_size: int
    """Side of the square picture that the tower takes, in pixels."""
    mean: tuple[float, float, float]
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, for pixels in [0, 1]."""

    def __post_init__(self) -> None:
        """Refuse values that would divide by zero or make an empty picture."""
        if self.image_size < 1 or min(self.std) <= 0:
            raise ValueError(f"image_size {self.image_size} and std {self.std} must be positive")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Resize (antialiased, only if the size differs) and normalise.

        Args:
            pixels: ``(B, 3, H, W)`` in ``[0, 1]``; square, since nothing is cropped.

        Returns:
            ``(B, 3, image_size, image_size)``, normalised.

        Raises:
            ValueError: If the pictures are not square.
        """
        if pixels.shape[-1] != pixels.shape[-2]:
            raise ValueError(f"the yardstick takes square pictures, got {tuple(pixels.shape)}")
        if pixels.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True).clamp(0, 1)
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return (pixels - mean) / std


class ClipScorer:
    """Embeds pictures and prompts into CLIP's common space, as unit vectors in float32.

    Prompts are read by the same code as in the cascade.
    """

    def __init__(
        self, model: CLIPModel, text_encoder: TextEncoder, preprocessing: PicturePreprocessing
    ) -> None:
        """Take both towers (the text one as an encoder of prompts) and the preprocessing."""
        self.vision_model = model.vision_model.eval().requires_grad_(False)
        self.visual_projection = model.visual_projection.requires_grad_(False)
        self.text_encoder = text_encoder
        self.preprocessing = preprocessing

    @classmethod
    def from_folder(cls, folder: Path | str, device: torch.device | str = "cpu") -> ClipScorer:
        """Load a local folder; nothing is downloaded.

        Raises:
            UserError: If the folder or one of its parts is missing or unreadable.
        """
        folder = Path(folder)
        preprocessing = read_preprocessing(folder / "preprocessor.json")
        text_encoder = TextEncoder.from_folder(folder, TextConfig(), device=device)
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a CLIP with both towers: {error}") from error
        model.float().to(device)
        return cls(model, text_encoder, preprocessing)

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
        rows = [self.project_pictures(pixels[i : i + batch_size]).cpu() for i in starts]
        return F.normalize(torch.cat(rows), dim=1)

    @torch.inference_mode()
    def project_pictures(self, pixels: Tensor) -> Tensor:
        """Return CLIP's embeddings of pictures ``(B, 3, H, W)`` as they come: ``(B, D)`` float32.

        These, not of unit length, are what Stage C is told of a picture.
        """
        prepared = self.preprocessing(pixels.float().to(self.visual_projection.weight.device))
        projected: Tensor = self.visual_projection(
            self.vision_model(pixel_values=prepared).pooler_output
        )
        return projected

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


def read_preprocessing(path: Path) -> PicturePreprocessing:
    """Read a ``preprocessor.json``.

    Raises:
        UserError: If it is missing or not valid.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; it says how pictures enter the CLIP picture tower")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    return from_dict(PicturePreprocessing, content, str(path))
