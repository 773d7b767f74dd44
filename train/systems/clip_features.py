"""Patch features of a CLIP vision tower, frozen: what a perceptual loss compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.text.picture_encoder import find_preprocessing
from train.systems.clip import attention_kernel, load_clip


class FrozenClipFeatures(nn.Module):
    """Patch features of a CLIP vision tower at a few depths, at any picture size."""

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str, layers: tuple[int, ...]) -> None:
        """Load the tower from a transformers folder with its ``preprocessor.json``."""
        super().__init__()
        whole = load_clip(folder, attention_kernel())
        self.tower = whole.vision_model
        self.tower.eval().requires_grad_(False)
        self.layers = layers
        preprocessing = find_preprocessing(Path(folder))
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1), False)
        vision: Any = whole.config.vision_config
        self.patch = int(vision.patch_size)

    def train(self, mode: bool = True) -> FrozenClipFeatures:
        """Stay in evaluation mode whatever the system does."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return the features of each layer, ``(B, L, D)``."""
        # Sides that are no multiple of the patch are cropped by the patch embedding itself.
        rows, columns = (side // self.patch * self.patch for side in pixels.shape[-2:])
        normalized = (pixels[..., :rows, :columns] - self.mean) / self.std
        output = self.tower(
            pixel_values=normalized, output_hidden_states=True, interpolate_pos_encoding=True
        )
        return [output.hidden_states[layer][:, 1:] for layer in self.layers]
