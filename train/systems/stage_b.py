"""Stage B together with the semantic compressor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.diffusion.schedules import CosineSchedule
from cascade.text.encoder import TextConfig
from stages.block_features import BlockOutput
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Condition, StageBV2Config
from train.callbacks.pictures import PicturesConfig
from train.callbacks.posthoc_ema import PosthocEmaConfig
from train.callbacks.validation import ValidationConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import StepDraws, step_draws
from train.initial import check_architecture
from train.losses.adaptive import AdaptiveWeight
from train.losses.denoising import (
    DiffusionConfig,
    Noised,
    denoising_loss,
    errors_by_noise,
    errors_by_sample,
    noise_batch,
    published_errors,
)
from train.losses.pyramid import pyramid_noise
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means, summed
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class StageBRun:
    """The training of Stage B, jointly with the semantic compressor or on a finished one's latents.

    Name one of ``compressor`` and ``frozen_compressor``.
    """

    run: RunConfig
    data: DataConfig
    text: str
    """Text encoder's folder, or a model with one; a cache must come from it."""
    stage_a: str
    """Stage A's file, or a model with one; a cache must come from it."""
    model: StageBConfig | None = None
    """Sizes of Stage B."""
    model_v2: StageBV2Config | None = None
    """Sizes of Würstchen v2's Stage B instead. Neither: those of ``init_from``."""
    stage_a_scale: float | None = None
    """What Stage A's latents are divided by, where its file does not say it: 0.43 for the
    published one of Stable Cascade, 0.3764 for that of Würstchen v2."""
    compressor: CompressorConfig | None = None
    """Sizes of the semantic compressor that is trained with Stage B."""
    compressor_init_from: str | None = None
    """What that compressor starts with: a compressor's weights in any layout, or torchvision's
    EfficientNetV2-S for ImageNet, whose trunk it takes. null: random weights."""
    frozen_compressor: str | None = None
    """A finished compressor instead, a file or a model: Stage B learns on its latents, and a
    Stage C that was trained on them stays valid."""
    compressor_input: tuple[float, float] | None = None
    """Range of the fraction of the picture's size that the finished compressor sees, drawn once
    a step and rounded down to its stride (0.5 to 1 in Stable Cascade): Stage B then takes latents
    of several sizes. It needs a stream of pictures. null: the compressor's own fraction."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """How the cache read the text encoder; the network itself sees the pooled states only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    caption_dropout: float = 0.05
    """Share of samples that see the null prompt."""
    noise: Literal["white", "pyramid"] = "white"
    """Kind of noise on the Stage A latents; "pyramid", with coarser noise on top, in Stable
    Cascade."""
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
    """What the run starts with: a run's folder with stage_b.safetensors and, if the compressor
    learns too, compressor.safetensors; or weights of Stage B alone in any layout, a model, or a
    hub id."""

    def __post_init__(self) -> None:
        """Refuse two networks or two compressors, or none."""
        check_architecture(self)
        if (self.compressor is None) == (self.frozen_compressor is None):
            raise ValueError(
                "name compressor (sizes of one to train) or frozen_compressor (a finished one's "
                "file), one of the two"
            )
        if self.compressor is None and self.compressor_init_from is not None:
            raise ValueError("compressor_init_from is set but no compressor is trained")
        if self.compressor_input is not None:
            low, high = self.compressor_input
            if not 0 < low <= high <= 1:
                raise ValueError(f"compressor_input is [{low}, {high}]; 0 < low <= high <= 1")
            if self.frozen_compressor is None:
                raise ValueError(
                    "compressor_input is set but the compressor is trained, at its own "
                    "compressor.input_fraction"
                )

    @property
    def sizes(self) -> StageBConfig | StageBV2Config:
        """The network's, once they are known."""
        sizes = self.model_v2 if self.model is None else self.model
        assert sizes is not None, "with_architecture comes first"
        return sizes


class StageBSystem(LightningModule):
    """Wires Stage B, the compressor if it learns too, their loss and optimizer."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(
        self,
        config: StageBRun,
        null_text: tuple[Tensor, Tensor],
        frozen_compressor: CompressorConfig | None = None,
    ) -> None:
        """Build the networks.

        Args:
            config: The run.
            null_text: The hidden (L, D) and pooled (P,) states of "".
            frozen_compressor: Of a finished compressor: how its latents were shifted and scaled,
                which Stage B of v2 is told without.
        """
        super().__init__()
        self.config = config
        sizes = config.sizes
        self.network: StageB | StageBV2 = (
            StageBV2(sizes) if isinstance(sizes, StageBV2Config) else StageB(sizes)
        )
        self.adaptive = AdaptiveWeight() if config.diffusion.weight == "adaptive" else None
        self.latents_of = frozen_compressor or config.compressor
        self.compressor: SemanticCompressor | None = None
        if config.compressor is not None:
            self.compressor = SemanticCompressor(config.compressor)
        self.register_buffer("null_hidden", null_text[0].float(), persistent=False)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        if self.compressor is None:
            return {"stage_b": self.network}
        return {"stage_b": self.network, "compressor": self.compressor}

    def export_metadata(self, name: str) -> dict[str, str]:
        """Return what a network's file says beside its sizes."""
        return self.config.diffusion.metadata() if name == "stage_b" else {}

    def condition(
        self, batch: CachedBatch, draws: StepDraws
    ) -> StageBCondition | StageBV2Condition:
        """Compress the pictures, then noise and drop the result sample by sample."""
        latents = corrupt_latents(
            self.compressed(batch),
            drop=self.config.condition_dropout,
            noise=self.config.condition_noise,
            noise_t=self.config.condition_noise_t,
            draws=draws,
        )
        drop = draws.uniform("caption dropout", len(batch)) < self.config.caption_dropout
        return self.told(batch, latents, drop.to(latents.device))

    def compressed(self, batch: CachedBatch) -> Tensor:
        """Return the compressor's latents (B, 16, h, w) as the network is told them."""
        if self.compressor is None:
            latents = batch.require("stage_c_latents")
        else:
            latents = self.compressor.encode(batch.require("pixels")).float()
        if isinstance(self.network, StageBV2):  # raw values, as the pipeline tells them
            assert self.latents_of is not None, "a run has a compressor"
            latents = latents * self.latents_of.scale - self.latents_of.shift
        return latents

    def told(
        self, batch: CachedBatch, latents: Tensor, drop: Tensor | None = None
    ) -> StageBCondition | StageBV2Condition:
        """Return the network's condition; samples of ``drop`` (B,) lose their caption."""
        if isinstance(self.network, StageBV2):
            hidden = batch.require("text_hidden")
            if drop is not None:
                hidden = torch.where(drop[:, None, None], self.null_hidden, hidden)
            return StageBV2Condition(stage_c_latents=latents, text_hidden=hidden)
        pooled = batch.require("text_pooled")
        if drop is not None:
            pooled = torch.where(drop[:, None], self.null_pooled, pooled)
        return StageBCondition(stage_c_latents=latents, text_pooled=pooled)

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the Stage A latents, predict, compare."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        x0 = batch.require("stage_a_latents")
        noise = None
        if self.config.noise == "pyramid":
            batch_size, channels, height, width = x0.shape
            noise = pyramid_noise((batch_size, channels, height, width), draws)
        noised = noise_batch(x0, self.config.diffusion, draws, noise)
        cond = self.condition(batch, draws)
        output = self.predict(noised, cond)
        predicted = output.prediction
        if self.adaptive is not None:
            noised = self.adaptive.reweigh(
                noised,
                errors_by_sample(predicted.detach(), noised),
                self.config.diffusion.noise_schedule().log_snr(noised.t),
                ends_step=draws.micro == draws.micros - 1,
                summed=summed,
            )
        loss, mse = denoising_loss(predicted, noised)
        loss = self.taught(loss, noised, cond, output)
        log_means(self, {"loss": loss, "mse": mse})
        if (self.global_step + 1) % self.config.run.log_every_steps == 0:
            self.log_dict(errors_by_noise(predicted, noised))
        return loss

    def predict(self, noised: Noised, cond: StageBCondition | StageBV2Condition) -> BlockOutput:
        """Return what the network says, with the outputs of ``blocks``."""
        x_t, time = noised.x_t, noised.network_time
        if isinstance(self.network, StageB):
            return self.network(x_t, time, cond, features=self.blocks)
        return BlockOutput(self.network(x_t, time, cond), {})

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks whose outputs ``taught`` is given."""
        return ()

    def taught(
        self,
        loss: Tensor,
        noised: Noised,
        cond: StageBCondition | StageBV2Condition,
        output: BlockOutput,
    ) -> Tensor:
        """Return the step's loss: the denoising loss, and what a teacher adds to it."""
        return loss

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer steps."""
        return [p for one in self.exported_networks().values() for p in one.parameters()]

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def validation_errors(self, batch: CachedBatch, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return each sample's published loss and time, on whole and clean conditions."""
        cond = self.told(batch, self.compressed(batch))

        def network(x_t: Tensor, time: Tensor) -> Tensor:
            return self.network(x_t, time, cond)

        return published_errors(
            network, batch.require("stage_a_latents"), self.config.diffusion, draws
        )

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        optimizer, schedule = make_optimizer(
            self.trained_parameters(), self.config.optim, self.config.run.max_steps
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
