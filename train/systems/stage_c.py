"""Stage C: learn the compressed latents of a picture from its caption."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.text.encoder import TextConfig
from stages.block_features import BlockOutput
from stages.stage_c import StageC, StageCCondition, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Condition, StageCV2Config
from train.callbacks.pictures import PicturesConfig
from train.callbacks.posthoc_ema import PosthocEmaConfig
from train.callbacks.validation import ValidationConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import StepDraws, step_draws
from train.initial import check_architecture
from train.losses.adaptive import AdaptiveWeight
from train.losses.denoising import (
    Noised,
    denoising_loss,
    errors_by_noise,
    errors_by_sample,
    noise_batch,
    published_errors,
)
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means, summed
from train.settings import RunConfig
from train.systems.stage_c_defaults import NewStageC, StageCDiffusion, StageCOptim


@dataclass(frozen=True)
class StageCRun:
    """The training of Stage C on cached latents and text states."""

    run: RunConfig
    data: DataConfig
    text: str
    """Text encoder's folder, or a model with one; a cache must come from it."""
    compressor: str
    """Semantic compressor's file, or a model with one; a cache must come from it. The file of a KL
    autoencoder, written here, has Stage C learn its latents instead: see ``train.assemble_latent``.
    """
    model: NewStageC | None = None
    """Sizes of Stage C."""
    model_v2: StageCV2Config | None = None
    """Sizes of Würstchen v2's Stage C instead. Neither: those of ``init_from``."""
    image: str | None = None
    """CLIP's picture tower, or a model with one, for ``image_share``; null: ``text`` has it."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """Which hidden states the network reads; the cache must hold these, and the model folder's
    ``model.json`` must name them under ``text``."""
    optim: StageCOptim = field(default_factory=StageCOptim)
    """Keys that are left out have the values that won ``benchmarks/RECIPES.md``."""
    diffusion: StageCDiffusion = field(default_factory=StageCDiffusion)
    """Keys that are left out have the values that won there, whatever ``init_from`` learned."""
    caption_dropout: float = 0.05
    """Share of samples, drawn one by one, that see the null prompt (0.05 in the papers)."""
    image_share: float = 0.0
    """Share of samples that are told the CLIP embedding of their own picture as well (0.1 in
    Stable Cascade); the others see zeros. It is what picture variations need."""
    image_caption_dropout: float = 0.5
    """Share of those that see the null prompt beside it."""
    mask_share: float = 0.0
    """Share of the positions of each sample that the network does not see and is not asked for
    (masked-token training). Convolutions still run over all of them: it saves no compute here."""
    mask_until: float = 0.8
    """Part of the run after which nothing is masked, so that the network ends on whole inputs."""
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""
    validation: ValidationConfig | None = None
    """Held-out pictures on which the run is judged while it learns; null judges on none."""
    posthoc_ema: PosthocEmaConfig | None = None
    """Snapshots from which ``python -m train.posthoc_ema`` makes averages of any length."""
    init_from: str | None = None
    """Stage C that the run starts with: a file or folder in any layout, a model, or a hub id."""

    def __post_init__(self) -> None:
        """Refuse two networks, what a network does not take, and masks that hide all."""
        check_architecture(self)
        if not (0 <= self.mask_share < 1 and 0 <= self.mask_until <= 1):
            raise ValueError(
                f"mask_share={self.mask_share} lies in [0, 1), mask_until={self.mask_until} in "
                "[0, 1]"
            )
        for name in ("image_share", "mask_share"):
            if getattr(self, name) > 0 and self.model_v2 is not None:
                raise ValueError(
                    f"{name} is {getattr(self, name)} but Stage C of Würstchen v2 takes no "
                    f"{name.removesuffix('_share').replace('image', 'picture')}"
                )
        if self.image_share > 0 and self.model is not None and self.model.image_channels is None:
            raise ValueError(
                f"image_share is {self.image_share} but model.image_channels is null: the network "
                "takes no picture"
            )

    @property
    def sizes(self) -> StageCConfig | StageCV2Config:
        """The network's, once they are known."""
        sizes: StageCConfig | StageCV2Config | None = self.model_v2
        if self.model is not None:
            # Those of other weights are plain already.
            sizes = self.model.plain() if isinstance(self.model, NewStageC) else self.model
        assert sizes is not None, "with_architecture comes first"
        return sizes


class StageCSystem(LightningModule):
    """Wires Stage C, its loss and its optimizer."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(self, config: StageCRun, null_text: tuple[Tensor, Tensor]) -> None:
        """Build the network; ``null_text`` is the hidden (L, D) and pooled (P,) of ""."""
        super().__init__()
        self.config = config
        sizes = config.sizes
        self.network: StageC | StageCV2 = (
            StageCV2(sizes) if isinstance(sizes, StageCV2Config) else StageC(sizes)
        )
        self.patch_size = 1 if isinstance(sizes, StageCV2Config) else sizes.patch_size
        self.adaptive = AdaptiveWeight() if config.diffusion.weight == "adaptive" else None
        self.register_buffer("null_hidden", null_text[0].float(), persistent=False)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"stage_c": self.network}

    def export_metadata(self, name: str) -> dict[str, str]:
        """Return what a network's file says beside its sizes."""
        return self.config.diffusion.metadata() if name == "stage_c" else {}

    def condition(
        self, batch: CachedBatch, draws: StepDraws
    ) -> StageCCondition | StageCV2Condition:
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
        hidden = torch.where(drop[:, None, None], self.null_hidden, hidden)
        return self.told(hidden, torch.where(drop[:, None], self.null_pooled, pooled), image)

    def told(
        self, hidden: Tensor, pooled: Tensor, image: Tensor | None
    ) -> StageCCondition | StageCV2Condition:
        """Return the network's condition; that of v2 is told the hidden states alone."""
        if isinstance(self.network, StageCV2):
            return StageCV2Condition(text_hidden=hidden)
        return StageCCondition(text_hidden=hidden, text_pooled=pooled, image=image)

    def visible(self, latents: Tensor, draws: StepDraws) -> Tensor | None:
        """Draw which positions the network sees: ``(B, 1, H, W)`` of 0 and 1; None: all.

        Every sample hides the same number of positions, at least one stays.
        """
        share, until = self.config.mask_share, self.config.mask_until
        if share == 0 or draws.step >= until * self.config.run.max_steps:
            return None
        side = self.patch_size
        height, width = latents.shape[-2] // side, latents.shape[-1] // side
        hidden = min(round(share * height * width), height * width - 1)
        ranks = draws.share(
            "mask",
            len(latents),
            lambda n, generator: torch.rand(n, height * width, generator=generator),
        ).argsort(dim=1)
        return (ranks >= hidden).to(latents).view(-1, 1, height, width)

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the latents, predict, compare."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        noised = noise_batch(batch.require("stage_c_latents"), self.config.diffusion, draws)
        cond = self.condition(batch, draws)
        visible = self.visible(noised.x_t, draws)
        output = self.predict(noised, cond, visible)
        predicted = output.prediction
        if visible is not None:  # by patch -> by position
            visible = visible.repeat_interleave(self.patch_size, dim=2)
            visible = visible.repeat_interleave(self.patch_size, dim=3)
        if self.adaptive is not None:
            noised = self.adaptive.reweigh(
                noised,
                errors_by_sample(predicted.detach(), noised, visible),
                self.config.diffusion.noise_schedule().log_snr(noised.t),
                ends_step=draws.micro == draws.micros - 1,
                summed=summed,
            )
        loss, mse = denoising_loss(predicted, noised, visible)
        loss = self.taught(loss, batch, noised, output, draws)
        log_means(self, {"loss": loss, "mse": mse})
        if (self.global_step + 1) % self.config.run.log_every_steps == 0:
            self.log_dict(errors_by_noise(predicted, noised))
        return loss

    def predict(
        self,
        noised: Noised,
        cond: StageCCondition | StageCV2Condition,
        visible: Tensor | None,
    ) -> BlockOutput:
        """Return what the network says, with the outputs of ``blocks``."""
        x_t, time = noised.x_t, noised.network_time
        if isinstance(self.network, StageC):
            return self.network(x_t, time, cond, visible, features=self.blocks)
        return BlockOutput(self.network(x_t, time, cond), {})

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks whose outputs ``taught`` is given."""
        return ()

    def taught(
        self,
        loss: Tensor,
        batch: CachedBatch,
        noised: Noised,
        output: BlockOutput,
        draws: StepDraws,
    ) -> Tensor:
        """Return the step's loss: the denoising loss, and what a teacher adds to it."""
        return loss

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer steps."""
        return list(self.network.parameters())

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def validation_errors(self, batch: CachedBatch, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return each sample's published loss and time, with its caption and without a picture."""
        cond = self.told(batch.require("text_hidden"), batch.require("text_pooled"), None)

        def network(x_t: Tensor, time: Tensor) -> Tensor:
            return self.network(x_t, time, cond)

        return published_errors(
            network, batch.require("stage_c_latents"), self.config.diffusion, draws
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
