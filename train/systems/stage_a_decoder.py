"""The fast decoder of Stage A: taught by Stage A's own decoder, and by the pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.checkpoints.found import FoundNetwork
from stages.stage_a import StageA
from stages.stage_a_fast import StageAFast, StageAFastConfig
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.clock import PhaseClock
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import step_draws
from train.encode import load_frozen
from train.losses.reconstruction import feature_distance, pixel_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig
from train.systems.adversarial import random_crops
from train.systems.clip_features import FrozenClipFeatures


@dataclass(frozen=True)
class StageADecoderLoss:
    """Weights of the terms; 0: off."""

    pixels: float = 1.0
    """Mean absolute distance to the pictures."""
    teacher: float = 1.0
    """Mean absolute distance to what Stage A's decoder makes of the same latents."""
    perceptual: float = 0.1
    """Distance of the features of a CLIP vision tower, to the pictures."""
    perceptual_layers: tuple[int, ...] = (1, 3)
    """Hidden states of the vision tower that are compared."""

    def __post_init__(self) -> None:
        """Refuse weights that teach nothing."""
        weights = (self.pixels, self.teacher, self.perceptual)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"pixels, teacher and perceptual are {weights}; none may be negative, and one must "
                "be positive"
            )


@dataclass(frozen=True)
class StageADecoderRun:
    """The training of the fast decoder."""

    run: RunConfig
    data: DataConfig
    stage_a: str
    """Stage A, a file or a model: it encodes, and its decoder is the teacher."""
    stage_a_scale: float | None = None
    """What its latents are divided by, where its file does not say it."""
    model: StageAFastConfig = field(default_factory=StageAFastConfig)
    """Sizes of the fast decoder."""
    loss: StageADecoderLoss = field(default_factory=StageADecoderLoss)
    latent_noise: float = 0.0
    """Deviation of noise on the latents, drawn from 0 up to this for each sample, so that the
    decoder forgives what Stage B gets wrong; Stage A's decoder sees none of it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    crop: int = 128
    """Side of the random crops that are trained on."""
    clip: str | None = None
    """CLIP folder for the perceptual term; needed unless its weight is 0."""
    init_from: str | None = None
    """Fast decoder to start with: a run's or a model's folder, or a file."""

    def __post_init__(self) -> None:
        """The perceptual term needs a network."""
        if self.loss.perceptual > 0 and self.clip is None:
            raise ValueError(f"loss.perceptual is {self.loss.perceptual} but clip names no folder")
        if self.latent_noise < 0:
            raise ValueError(f"latent_noise is {self.latent_noise}; it must not be negative")


@dataclass
class DecoderTeacher:
    """Stage A, frozen, outside of the system."""

    found: FoundNetwork
    clock: PhaseClock = field(default_factory=PhaseClock)
    network: StageA | None = None

    def load(self, device: torch.device) -> None:
        """Load it onto a device, in float32."""
        self.network = cast(StageA, load_frozen(self.found, device).eval())

    @torch.no_grad()
    def __call__(self, pixels: Tensor, *, decode: bool) -> tuple[Tensor, Tensor | None]:
        """Return the latents (B, 4, h, w) of pixels, and what its decoder makes of them."""
        assert self.network is not None, "load() comes first"
        with (
            self.clock.within("teacher", pixels.device),
            torch.autocast(pixels.device.type, enabled=False),
        ):
            latents = self.network.encode(pixels)
            return latents, self.network.decode(latents) if decode else None


class LoadDecoderTeacher(Callback):
    """Loads Stage A where the run trains, and gives it the run's clock."""

    def __init__(self, teacher: DecoderTeacher) -> None:
        """Take the teacher."""
        self.teacher = teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load it."""
        self.teacher.load(pl_module.device)
        ledger = find_callback(trainer, Ledger)
        if ledger is not None:
            self.teacher.clock = ledger.clock


class StageADecoderSystem(LightningModule):
    """Wires the fast decoder, its losses and its optimizer."""

    def __init__(self, config: StageADecoderRun, teacher: DecoderTeacher) -> None:
        """Build the decoder."""
        super().__init__()
        self.config = config
        self.network = StageAFast(config.model)
        self.teacher = teacher
        self.features: FrozenClipFeatures | None = None
        if config.clip is not None and config.loss.perceptual > 0:
            self.features = FrozenClipFeatures(config.clip, config.loss.perceptual_layers)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"stage_a_fast": self.network}

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Decode the latents of crops; compare with the crops and with Stage A's decoder."""
        config, loss = self.config, self.config.loss
        draws = step_draws(self, config.run.seed, batch_idx)
        pixels = random_crops(batch.require("pixels"), config.crop, draws)
        latents, taught = self.teacher(pixels, decode=loss.teacher > 0)
        if config.latent_noise > 0:
            sizes = draws.uniform("latent noise size", len(pixels)) * config.latent_noise
            noise = draws.normal("latent noise", latents.shape).to(latents)
            latents = latents + sizes.to(latents).view(-1, 1, 1, 1) * noise
        decoded = self.network(latents)
        terms = {}
        if loss.pixels > 0:
            terms["pixels"] = loss.pixels * pixel_loss(decoded, pixels, "l1")
        if taught is not None:
            terms["kd_pixels"] = loss.teacher * pixel_loss(decoded, taught, "l1")
        if self.features is not None:
            distance = feature_distance(self.features(decoded), self.features(pixels))
            terms["perceptual"] = loss.perceptual * distance
        total = torch.stack(list(terms.values())).sum()
        log_means(self, {"loss": total, **terms})
        return total

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen feature network out of the checkpoint."""
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith("features.")]:
            del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the feature network back, so that loading stays strict."""
        own = {key: one for key, one in self.state_dict().items() if key.startswith("features.")}
        checkpoint["state_dict"].update(own)
