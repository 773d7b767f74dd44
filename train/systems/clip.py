"""A small CLIP: the demonstration's text encoder and its yardstick for prompt agreement."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from cascade.checkpoints.files import atomic_path, atomic_write_text
from cascade.checkpoints.written_tensors import save_tensors
from cascade.errors import UserError
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import step_draws
from train.losses.contrastive import contrastive_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class ClipModelConfig:
    """Sizes of the two towers (transformers' ``CLIPModel``)."""

    vocab_size: int = 4096
    """Most entries of the tokenizer that is learned from the captions."""
    max_tokens: int = 32
    """Context length, with the two special tokens."""
    text_width: int = 192
    """Channels of the text tower."""
    text_layers: int = 4
    """Layers of the text tower."""
    text_heads: int = 3
    """Attention heads of the text tower; they divide its channels."""
    vision_width: int = 192
    """Channels of the vision tower."""
    vision_layers: int = 6
    """Layers of the vision tower."""
    vision_heads: int = 3
    """Attention heads of the vision tower; they divide its channels."""
    image_size: int = 96
    """Pixels that the vision tower sees; pictures are resized to it."""
    patch_size: int = 16
    """Side in pixels of a patch; it divides ``image_size``."""
    projection: int = 192
    """Channels of the space in which texts and pictures are compared."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of red, green and blue in [0, 1]; taken off a picture first."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Of red, green and blue in [0, 1]; what is left is divided by it."""

    def build(self, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
        """Return a model with fresh weights."""
        tower = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
        text = {
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": self.max_tokens,
            "hidden_size": self.text_width,
            "intermediate_size": 4 * self.text_width,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.text_heads,
            "projection_dim": self.projection,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        vision = {
            **tower,
            "hidden_size": self.vision_width,
            "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers,
            "num_attention_heads": self.vision_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "projection_dim": self.projection,
        }
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=self.projection)
        return CLIPModel._from_config(config, attn_implementation=attention_kernel())


@dataclass(frozen=True)
class ClipRun:
    """The contrastive training of the small CLIP."""

    run: RunConfig
    data: DataConfig
    model: ClipModelConfig = field(default_factory=ClipModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    smallest_crop: float = 0.85
    """Pictures are cropped to a random square of at least this share of the side."""
    init_from: str | None = None
    """Exported CLIP folder to start with."""


class ClipSystem(LightningModule):
    """Wires the two towers, the contrastive loss and the optimizer."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ClipRun, tokenizer: PreTrainedTokenizerFast) -> None:
        """Build the towers for the tokenizer's vocabulary."""
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.network = config.model.build(tokenizer)
        self.register_buffer("mean", torch.tensor(config.model.mean).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(config.model.std).view(3, 1, 1), False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"text": self.network}

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Crop, tokenize, compare every picture with every caption."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        crop = draws.generator("crop")
        pixels = random_crop(batch.require("pixels"), self.config.smallest_crop, crop)
        pixels = F.interpolate(
            pixels, size=self.config.model.image_size, mode="bilinear", antialias=True
        )
        tokens = self.tokenizer(
            batch.captions,
            padding="max_length",
            truncation=True,
            max_length=self.config.model.max_tokens,
            return_tensors="pt",
        ).to(pixels.device)
        output = self.network(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=(pixels - self.mean) / self.std,
        )
        loss = contrastive_loss(output.logits_per_image, batch.groups)
        best = output.logits_per_image.argmax(dim=1)
        top1 = (batch.groups[best] == batch.groups).float().mean()
        log_means(self, {"loss": loss, "top1_in_batch": top1})
        return loss

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the temperature in CLIP's range (at most 100)."""
        self.network.logit_scale.data.clamp_(0.0, 4.6052)

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        optimizer, schedule = make_optimizer(
            self.network.parameters(), self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def export_network(
        self,
        out: Path,
        name: str,
        network: CLIPModel,
        dtype: torch.dtype,
        metadata: dict[str, str],
    ) -> None:
        """Write a transformers folder: both towers, tokenizer, picture preprocessing."""
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        # transformers 5 writes a class name that transformers 4 does not know; both know this one.
        described = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        described |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        described.pop("backend", None)
        atomic_write_text(folder / "tokenizer_config.json", json.dumps(described, indent=2) + "\n")
        atomic_write_text(folder / "config.json", network.config.to_json_string())
        preprocessing = {
            "image_size": self.config.model.image_size,
            "mean": list(self.config.model.mean),
            "std": list(self.config.model.std),
        }
        atomic_write_text(folder / "preprocessor.json", json.dumps(preprocessing, indent=2) + "\n")
        state = {
            key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
            for key, value in network.state_dict().items()
        }
        with atomic_path(folder / "model.safetensors") as temporary:
            save_tensors(state, temporary, {"format": "pt", **metadata})


def load_clip(folder: str | Path, attention: str | None = None) -> CLIPModel:
    """Load a CLIP with both towers from a transformers folder, in float32.

    Raises:
        UserError: It is not there or not readable.
    """
    try:
        return CLIPModel.from_pretrained(
            Path(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=attention,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a CLIP with both towers: {error}") from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer of an exported CLIP.

    Raises:
        UserError: It is not there or not readable.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise UserError(f"{folder}: no tokenizer.json in it; a CLIP's folder needs one")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not a readable tokenizer: {error}") from error


def attention_kernel() -> str:
    """Return transformers' name of the attention that trains a small CLIP fastest here.

    On CPUs fused attention in bfloat16 is slow for so few tokens: a step took twice as long.
    """
    return "sdpa" if torch.cuda.is_available() else "eager"


def random_crop(pixels: Tensor, smallest: float, generator: torch.Generator) -> Tensor:
    """Cut one random square out of the whole batch: side ``U(smallest, 1)`` of the picture's."""
    height, width = pixels.shape[-2:]
    draw = torch.rand(3, generator=generator).tolist()
    share = smallest + (1.0 - smallest) * draw[0]
    rows, columns = int(height * share), int(width * share)
    top, left = int((height - rows) * draw[1]), int((width - columns) * draw[2])
    return pixels[..., top : top + rows, left : left + columns]
