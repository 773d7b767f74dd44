"""Stage B together with the semantic compressor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.diffusion.schedules import CosineSchedule
from cascade.text.encoder import TextConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_b import StageB, StageBCondition, StageBConfig
from train.callbacks.pictures import PicturesConfig
from train.callbacks.posthoc_ema import PosthocEmaConfig
from train.callbacks.validation import ValidationConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import StepDraws, step_draws
from train.losses.denoising import (
    DiffusionConfig,
    denoising_loss,
    errors_by_noise,
    noise_batch,
    published_errors,
)
from train.networks import configure_networks
from train.optim import make_optimizer
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class StageBRun:
    """The training of Stage B, jointly with the semantic compressor or on a finished one's latents.

    Name one of ``compressor`` and ``frozen_compressor``.
    """

    run: RunConfig
    data: DataConfig
    model: StageBConfig
    text: str
    """Text encoder's folder; the cache must come from it."""
    stage_a: str
    """Stage A's file; the cache must come from it."""
    compressor: CompressorConfig | None = None
    """Sizes of the semantic compressor that is trained with Stage B."""
    frozen_compressor: str | None = None
    """File of a finished compressor instead: Stage B learns on its cached latents, and a Stage C
    that was trained on them stays valid."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """How the cache read the text encoder; the network itself sees the pooled states only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    caption_dropout: float = 0.05
    """Share of samples that see the null prompt."""
    condition_dropout: float = 0.05
    """Share of samples whose compressor latents are zero (0.05 in v1's code, 0.1 in v3's)."""
    condition_noise: float = 0.3
    """Share of the other samples whose compressor latents are diffused, so that Stage B forgives
    what Stage C gets wrong (0.3 in v1's code)."""
    condition_noise_t: float = 0.5
    """Largest diffusion time of that noise."""
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""
    validation: ValidationConfig | None = None
    """Held-out pictures on which the run is judged while it learns; null judges on none."""
    posthoc_ema: PosthocEmaConfig | None = None
    """Snapshots from which ``python -m train.posthoc_ema`` makes averages of any length."""
    init_from: str | None = None
    """Folder with exported stage_b and compressor files to start with."""

    def __post_init__(self) -> None:
        """Refuse two compressors, or none."""
        if (self.compressor is None) == (self.frozen_compressor is None):
            raise ValueError(
                "name compressor (sizes of one to train) or frozen_compressor (a finished one's "
                "file), one of the two"
            )


class StageBSystem(LightningModule):
    """Wires Stage B, the compressor if it learns too, their loss and optimizer."""

    null_pooled: Tensor

    def __init__(self, config: StageBRun, null_text: tuple[Tensor, Tensor]) -> None:
        """Build the networks; ``null_text`` is the hidden (L, D) and pooled (P,) of ""."""
        super().__init__()
        self.config = config
        self.network = StageB(config.model)
        self.compressor: SemanticCompressor | None = None
        if config.compressor is not None:
            self.compressor = SemanticCompressor(config.compressor)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        if self.compressor is None:
            return {"stage_b": self.network}
        return {"stage_b": self.network, "compressor": self.compressor}

    def export_metadata(self, name: str) -> dict[str, str]:
        """Return what a network's file says beside its sizes."""
        return self.config.diffusion.metadata() if name == "stage_b" else {}

    def condition(self, batch: CachedBatch, draws: StepDraws) -> StageBCondition:
        """Compress the pictures, then noise and drop the result sample by sample."""
        if self.compressor is None:
            latents = batch.require("stage_c_latents")  # (B, 16, h, w)
        else:
            latents = self.compressor.encode(batch.require("pixels")).float()
        latents = corrupt_latents(
            latents,
            drop=self.config.condition_dropout,
            noise=self.config.condition_noise,
            noise_t=self.config.condition_noise_t,
            draws=draws,
        )
        drop = draws.uniform("caption dropout", len(batch)) < self.config.caption_dropout
        drop = drop.to(latents.device)
        pooled = torch.where(drop[:, None], self.null_pooled, batch.require("text_pooled"))
        return StageBCondition(stage_c_latents=latents, text_pooled=pooled)

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the Stage A latents, predict, compare."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        noised = noise_batch(batch.require("stage_a_latents"), self.config.diffusion, draws)
        predicted = self.network(noised.x_t, noised.network_time, self.condition(batch, draws))
        loss, mse = denoising_loss(predicted, noised)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        self.log("mse", mse, sync_dist=True)
        if (self.global_step + 1) % self.config.run.log_every_steps == 0:
            self.log_dict(errors_by_noise(predicted, noised))
        return loss

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def validation_errors(self, batch: CachedBatch, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return each sample's published loss and time, on whole and clean conditions."""
        latents = (
            batch.require("stage_c_latents")
            if self.compressor is None
            else self.compressor.encode(batch.require("pixels")).float()
        )
        cond = StageBCondition(stage_c_latents=latents, text_pooled=batch.require("text_pooled"))

        def network(x_t: Tensor, time: Tensor) -> Tensor:
            return self.network(x_t, time, cond)

        return published_errors(
            network, batch.require("stage_a_latents"), self.config.diffusion, draws
        )

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        parameters = [p for one in self.exported_networks().values() for p in one.parameters()]
        optimizer, schedule = make_optimizer(
            parameters, self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def corrupt_latents(
    latents: Tensor, *, drop: float, noise: float, noise_t: float, draws: StepDraws
) -> Tensor:
    """Zero a share of the samples, diffuse a share of the others, each on its own draw.

    Args:
        latents: Compressor latents, shape ``(B, 16, h, w)``, about unit variance.
        drop: Share that becomes zero.
        noise: Share of the others that is diffused to a time drawn from ``U(0, noise_t)``.
        noise_t: Largest diffusion time.
        draws: Of this micro-batch.
    """
    count = len(latents)
    white = draws.normal("condition noise", latents.shape).to(latents)
    alpha, sigma = CosineSchedule()(draws.uniform("condition t", count) * noise_t)
    noised = (draws.uniform("condition noised", count) < noise).float()
    alpha = (alpha * noised + (1.0 - noised)).to(latents).view(-1, 1, 1, 1)
    sigma = (sigma * noised).to(latents).view(-1, 1, 1, 1)
    keep = (draws.uniform("condition dropped", count) >= drop).to(latents).view(-1, 1, 1, 1)
    return keep * (alpha * latents + sigma * white)
