"""Stage C: learn the compressed latents of a picture from its caption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.text.encoder import TextConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from train.callbacks.pictures import PicturesConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import StepDraws, step_draws
from train.losses.denoising import DiffusionConfig, denoising_loss, errors_by_noise, noise_batch
from train.networks import configure_networks
from train.optim import make_optimizer
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class StageCRun:
    """The training of Stage C on cached latents and text states."""

    run: RunConfig
    data: DataConfig
    model: StageCConfig
    text: str
    """Text encoder's folder; the cache must come from it."""
    compressor: str
    """Semantic compressor's file; the cache must come from it."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """Which hidden states the network reads; the cache must hold these, and the model folder's
    ``model.json`` must name them under ``text``."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    caption_dropout: float = 0.05
    """Share of samples, drawn one by one, that see the null prompt (0.05 in the papers)."""
    image_share: float = 0.0
    """Share of samples that are told the CLIP embedding of their own picture as well (0.1 in
    Stable Cascade); the others see zeros. It is what picture variations need."""
    image_caption_dropout: float = 0.5
    """Share of those that see the null prompt beside it."""
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""
    init_from: str | None = None
    """Exported Stage C file whose weights the run starts with."""

    def __post_init__(self) -> None:
        """Refuse a picture for a network that takes none."""
        if self.image_share > 0 and self.model.image_channels is None:
            raise ValueError(
                f"image_share is {self.image_share} but model.image_channels is null: the network "
                "takes no picture"
            )


class StageCSystem(LightningModule):
    """Wires Stage C, its loss and its optimizer."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(self, config: StageCRun, null_text: tuple[Tensor, Tensor]) -> None:
        """Build the network; ``null_text`` is the hidden (L, D) and pooled (P,) of ""."""
        super().__init__()
        self.config = config
        self.network = StageC(config.model)
        self.register_buffer("null_hidden", null_text[0].float(), persistent=False)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"stage_c": self.network}

    def condition(self, batch: CachedBatch, draws: StepDraws) -> StageCCondition:
        """Build the condition; each sample loses its caption, or its picture, on its own draw."""
        config = self.config
        hidden, pooled = batch.require("text_hidden"), batch.require("text_pooled")
        drop = draws.uniform("caption dropout", len(batch)) < config.caption_dropout
        image = None
        if config.image_share > 0:
            given = draws.uniform("image", len(batch)) < config.image_share
            beside = draws.uniform("caption beside an image", len(batch))
            drop = torch.where(given, beside < config.image_caption_dropout, drop)
            embeds = batch.require("image_embeds")
            image = (given.to(embeds)[:, None] * embeds)[:, None]  # (B, 1, E)
        drop = drop.to(hidden.device)
        return StageCCondition(
            image=image,
            text_hidden=torch.where(drop[:, None, None], self.null_hidden, hidden),
            text_pooled=torch.where(drop[:, None], self.null_pooled, pooled),
        )

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the latents, predict, compare."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        noised = noise_batch(batch.require("stage_c_latents"), self.config.diffusion, draws)
        cond = self.condition(batch, draws)
        predicted = self.network(noised.x_t, noised.network_time, cond)
        loss, mse = denoising_loss(predicted, noised)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        self.log("mse", mse, sync_dist=True)
        if (self.global_step + 1) % self.config.run.log_every_steps == 0:
            self.log_dict(errors_by_noise(predicted, noised))
        return loss

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
