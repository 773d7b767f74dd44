"""Frozen networks whose output another network is trained on: paths, hashes, and their use.

A cache holds what they said once; a stream of pictures has them say it in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cascade.checkpoints.files import file_hash, load_network
from cascade.errors import UserError
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder
from stages.semantic_compressor import SemanticCompressor
from stages.stage_a import StageA
from train.data.cached import CachedBatch


def text_hash(folder: str | Path, config: TextConfig | None = None) -> str:
    """Return what names text states: the hash of the encoder's weights, and how it was read."""
    weights, config = file_hash(Path(folder) / "model.safetensors"), config or TextConfig()
    return weights if config == TextConfig() else f"{weights}/{config.hidden}/{config.pad_to}"


@dataclass(frozen=True)
class FrozenPaths:
    """The networks that a run reads the output of; None: it does not."""

    text: str | None = None
    """Text encoder's folder."""
    text_states: TextConfig | None = None
    """How it is read; None: as by default."""
    stage_a: str | None = None
    """Stage A's file."""
    compressor: str | None = None
    """Semantic compressor's file."""
    image: str | None = None
    """CLIP's folder, for embeddings of the pictures."""

    def hashes(self) -> dict[str, str]:
        """Return part ("text", "stage_a", "stage_c", "image") -> hash of what makes it.

        Raises:
            UserError: A file is missing.
        """
        found = {}
        if self.text is not None:
            found["text"] = text_hash(self.text, self.text_states)
        if self.stage_a is not None:
            found["stage_a"] = file_hash(Path(self.stage_a))
        if self.compressor is not None:
            found["stage_c"] = file_hash(Path(self.compressor))
        if self.image is not None:
            found["image"] = text_hash(self.image)
        return found


class FrozenEncoders:
    """The loaded networks, in evaluation mode and float32."""

    def __init__(self, paths: FrozenPaths, device: torch.device | str = "cpu") -> None:
        """Load what ``paths`` names.

        Raises:
            UserError: A file is missing or is another network's.
        """
        self.paths = paths
        self.device = torch.device(device)
        self.text: TextEncoder | None = None
        self.stage_a: StageA | None = None
        self.compressor: SemanticCompressor | None = None
        self.image: PictureEncoder | None = None
        if paths.text is not None:
            states = paths.text_states or TextConfig()
            self.text = TextEncoder.from_folder(paths.text, states, device=device)
        if paths.stage_a is not None:
            self.stage_a = load_network(
                paths.stage_a, expect=StageA, device=device, dtype=torch.float32
            )
        if paths.compressor is not None:
            self.compressor = load_network(
                paths.compressor, expect=SemanticCompressor, device=device, dtype=torch.float32
            )
        if paths.image is not None:
            self.image = PictureEncoder.from_folder(paths.image, torch.device(device))

    def null_text(self) -> tuple[Tensor, Tensor] | None:
        """Return the hidden (L, D) and pooled (P,) states of the empty prompt."""
        if self.text is None:
            return None
        null = self.text.null()
        return null.hidden[0].cpu(), null.pooled[0].cpu()

    @torch.inference_mode()
    def encode_pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return the parts of a batch that are made of its pixels (B, 3, H, W).

        Raises:
            UserError: A network does not take pictures of this size.
        """
        found = {}
        try:
            if self.stage_a is not None:
                found["stage_a_latents"] = self.stage_a.encode(pixels)
            if self.compressor is not None:
                found["stage_c_latents"] = self.compressor.encode(pixels)
            if self.image is not None:
                found["image_embeds"] = self.image(pixels)
        except ValueError as error:
            raise UserError(f"the network does not take these pictures: {error}") from error
        return found

    @torch.inference_mode()
    def encode_captions(self, captions: list[str]) -> dict[str, Tensor]:
        """Return the text states of captions."""
        if self.text is None:
            return {}
        features = self.text.encode(captions)
        return {"text_hidden": features.hidden, "text_pooled": features.pooled}


class EncodeBatch(Callback):
    """Fills in a batch what its stream does not hold, before the step that needs it."""

    def __init__(self, paths: FrozenPaths) -> None:
        """Take the networks' paths; they are loaded where the run trains."""
        self.paths = paths
        self.encoders: FrozenEncoders | None = None

    def load(self, device: torch.device) -> None:
        """Load the networks onto a device."""
        self.encoders = FrozenEncoders(self.paths, device)

    def unload(self) -> None:
        """Let go of the networks."""
        self.encoders = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the networks."""
        self.load(pl_module.device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Encode the batch of the step."""
        assert isinstance(batch, CachedBatch)
        self.fill(batch)

    def fill(self, batch: CachedBatch) -> None:
        """Encode; under no autocast, as a cache is made."""
        assert self.encoders is not None, "load() comes first"
        device = self.encoders.device
        parts = self.encoders.encode_pixels(batch.require("pixels").to(device))
        for name, tensor in {**parts, **self.encoders.encode_captions(batch.captions)}.items():
            # A tensor of inference mode can't take part in a step; a copy can.
            setattr(batch, name, tensor.clone().to(device))
