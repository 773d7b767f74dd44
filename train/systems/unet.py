"""A U-Net of SD or SDXL, or a student of theirs: from data alone, or from data and a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.adapters.lora import LoraConfig
from cascade.checkpoints.files import save_network
from cascade.errors import UserError
from cascade.pipelines.unet_spec import UNET_TEACHER_KEY
from cascade.text.encoder import TextConfig
from stages.unet.compress import StudentPlan
from stages.unet.config import NUM_SIZES, UNetConfig
from stages.unet.features import Features
from stages.unet.unet import UNet, UNetCondition
from train.adapters import TrainedLora
from train.callbacks.ema import WeightAverage
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.callbacks.pictures import PicturesConfig
from train.callbacks.posthoc_ema import PosthocEmaConfig
from train.callbacks.validation import ValidationConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.data.paired import PriorConfig
from train.distill.plans import STUDENT_KEY, plan_metadata
from train.distill.teacher import FrozenTeacher, TeacherDtype
from train.draws import StepDraws, step_draws
from train.initial import check_architecture
from train.losses.denoising import Noised, denoising_loss, errors_by_noise
from train.losses.distillation import (
    FeatureConfig,
    SitePair,
    feature_losses,
    output_loss,
    total,
)
from train.losses.unet_denoising import (
    UNetDiffusionConfig,
    noise_unet_batch,
    published_unet_errors,
)
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig

BASE_KEY = "base_hash"
"""In a checkpoint of a LoRA: the hash of the weights that it was trained over."""


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns from its teacher, and how much each part counts."""

    teacher: str
    """The teacher's U-Net: a file or folder in any layout, a model, or a hub id."""
    recipe: str | None = None
    """Name of a recipe, or its YAML, by which the student was cut out of this teacher; null: as
    the student's own file says (``python -m train.distill make-student`` notes it)."""
    dtype: TeacherDtype = "bfloat16"
    """Number format of the teacher."""
    task_weight: float = 1.0
    """Of the denoising loss."""
    output_weight: float = 1.0
    """Of the distance to the teacher's output (1 in BK-SDM and KOALA, 0.5 in Segmind's)."""
    feature_weight: float = 1.0
    """Of the sum of the distances to the teacher's features."""
    features: FeatureConfig | None = None
    """Which features; null: none."""

    def __post_init__(self) -> None:
        """Refuse weights that teach nothing."""
        weights = (self.task_weight, self.output_weight, self.feature_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"task_weight, output_weight and feature_weight are {weights}; none may be "
                "negative, and one must be positive"
            )


@dataclass(frozen=True)
class UNetRun:
    """The training of a U-Net on its autoencoder's latents and text states."""

    run: RunConfig
    data: DataConfig
    autoencoder: str
    """The autoencoder, a file or a model; a cache must come from it."""
    text: str
    """Text encoder's folder, or a model with one; a cache must come from it."""
    text_2: str | None = None
    """SDXL's second text encoder, whose pooled state the network is told as well; null: the first
    one's pooled state."""
    text_states: TextConfig | None = None
    """Which hidden states are read; null: by the network's kind, penultimate for SDXL and post_norm
    for SD, both with padding in the attention."""
    model: UNetConfig | None = None
    """Sizes of the U-Net; null: those of ``init_from``."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    diffusion: UNetDiffusionConfig = field(default_factory=UNetDiffusionConfig)
    caption_dropout: float = 0.1
    """Share of samples that see no caption, without which guidance does not work. BK-SDM and
    Segmind trained with 0, and inherit guidance from their teachers."""
    empty_caption: Literal["zeros", "encoded"] | None = None
    """What no caption is: zeros (SDXL), or the states of the empty prompt (SD); null: by the
    network's kind."""
    distill: DistillConfig | None = None
    """The teacher; null: there is none."""
    lora: LoraConfig | None = None
    """Train low-rank updates of ``init_from`` alone, which are exported as ``lora.safetensors``;
    null: all of the network."""
    prior: PriorConfig | None = None
    """DreamBooth's second set, beside a subject's few pictures; null: there is none."""
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""
    validation: ValidationConfig | None = None
    """Held-out pictures on which the run is judged while it learns; null judges on none."""
    posthoc_ema: PosthocEmaConfig | None = None
    """Snapshots from which ``python -m train.posthoc_ema`` makes averages of any length."""
    init_from: str | None = None
    """U-Net that the run starts with: a file or folder in any layout, a model, or a hub id."""

    def __post_init__(self) -> None:
        """Refuse a run of no network, and shares that are none."""
        check_architecture(self)
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora is set but init_from is missing: name what it updates")
        if self.lora is not None and self.posthoc_ema is not None:
            raise ValueError("posthoc_ema averages networks, and lora trains updates of one")
        if self.lora is not None and self.run.strategy == "fsdp":
            raise ValueError("run.strategy is fsdp: a LoRA is small; use ddp")
        if self.text_states is not None and self.text_states.overflow == "chunk":
            raise ValueError("text_states.overflow is chunk: a U-Net learns from one window; warn")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout}; it lies in [0, 1)")

    @property
    def sizes(self) -> UNetConfig:
        """The network's, once they are known."""
        assert self.model is not None, "with_architecture comes first"
        return self.model

    @property
    def text_read(self) -> TextConfig:
        """Which hidden states are read, once the network's kind is known."""
        if self.text_states is not None:
            return self.text_states
        is_sdxl = self.sizes.text_pooled_channels is not None
        return TextConfig("penultimate" if is_sdxl else "post_norm", masks_padding=False)

    @property
    def drops_to_zeros(self) -> bool:
        """Whether no caption is zeros."""
        if self.empty_caption is not None:
            return self.empty_caption == "zeros"
        return self.sizes.text_pooled_channels is not None


@dataclass(frozen=True)
class Lesson:
    """A teacher, and the pairs of places whose features are compared."""

    teacher: FrozenTeacher
    pairs: tuple[SitePair, ...] = ()
    plan: StudentPlan | None = None
    """Where the student's modules came from; its exported file says it on."""


class UNetSystem(LightningModule):
    """Wires a U-Net, its losses and its optimizer."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(
        self,
        config: UNetRun,
        null_text: tuple[Tensor, Tensor],
        pixels_per_latent: int,
        lesson: Lesson | None = None,
    ) -> None:
        """Build the network.

        Args:
            config: Of the run.
            null_text: Hidden (L, D) and pooled (P,) states of no caption.
            pixels_per_latent: Along one side, for the sizes that SDXL is told.
            lesson: The teacher; None: there is none.
        """
        super().__init__()
        self.config = config
        self.network = UNet(config.sizes)
        self.pixels_per_latent = pixels_per_latent
        self.lesson = lesson
        self.started_from: dict[str, str] = {}
        """What is said of the weights that the run started from: a checkpoint keeps it, so that a
        run goes on without their file, and refuses to go on over others."""
        self._lora: list[TrainedLora] = []
        self.register_buffer("null_hidden", null_text[0].float(), persistent=False)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def attach(self, lora: LoraConfig) -> None:
        """Train low-rank updates of the network, which has its weights by now, and freeze it.

        Raises:
            UserError: A target is no layer's.
        """
        try:
            trained = TrainedLora.attached(self.network, lora, self.config.run.seed)
        except ValueError as error:
            raise UserError(f"lora: {error}") from error
        # In a list: its parameters are the network's, whose part they stay.
        self._lora = [trained]

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"lora": self._lora[0]} if self._lora else {"unet": self.network}

    def export_network(
        self,
        out: Path,
        name: str,
        network: nn.Module,
        dtype: torch.dtype,
        metadata: dict[str, str],
    ) -> None:
        """Write a U-Net, or a LoRA of one."""
        if isinstance(network, TrainedLora):
            network.write(out, dtype, metadata)
        else:
            save_network(out / f"{name}.safetensors", network, dtype=dtype, metadata=metadata)

    def averaged_state(self, average: WeightAverage) -> dict[str, Tensor]:
        """Return the network's whole state with averaged weights."""
        if not self._lora:
            return average.whole("unet")
        updates = self._lora[0].keys_in(average.whole("lora"))
        return {**self.network.state_dict(), **updates}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave a frozen network out of the checkpoint; ``init_from`` has it."""
        for key in self._frozen_keys():
            del checkpoint["state_dict"][key]
        checkpoint["started_from"] = self.started_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give it back, so that loading stays strict.

        Raises:
            UserError: It is not the one that the checkpoint's LoRA was trained over.
        """
        noted = checkpoint.get("started_from", {})
        then, now = noted.get(BASE_KEY), self.started_from.get(BASE_KEY)
        if self._lora and then != now:
            raise UserError(
                f"{self.config.run.out}: its LoRA was trained over other weights ({then}) than "
                f"init_from {self.config.init_from} has now ({now}); give those back, or start "
                "anew in another run.out"
            )
        self.started_from = noted
        own = self.state_dict()
        checkpoint["state_dict"].update({key: own[key] for key in self._frozen_keys()})

    def _frozen_keys(self) -> list[str]:
        if not self._lora:
            return []
        updates = self._lora[0].keys_in(self._lora[0].state_dict())
        return [f"network.{key}" for key in self.network.state_dict() if key not in updates]

    def export_metadata(self, name: str) -> dict[str, str]:
        """Return what the network's file says beside its sizes."""
        cut = (STUDENT_KEY, UNET_TEACHER_KEY)
        kept = {key: text for key, text in self.started_from.items() if key in cut}
        plan = None if self.lesson is None else self.lesson.plan
        return self.config.diffusion.metadata() | kept | (plan_metadata(plan) if plan else {})

    def clean_latents(self, batch: CachedBatch, draws: StepDraws) -> Tensor:
        """Draw latents ``(B, 4, h, w)`` from the autoencoder's Gaussians."""
        mean, std = batch.require("autoencoder_mean"), batch.require("autoencoder_std")
        return mean + std * draws.normal("latents", mean.shape).to(mean.device)

    def told(self, batch: CachedBatch, drop: Tensor | None = None) -> UNetCondition:
        """Return the network's condition.

        Args:
            batch: With text states.
            drop: Samples that see no caption, ``(B,)``; None: none.
        """
        hidden, pooled = batch.require("text_hidden"), batch.require("text_pooled")
        if drop is not None:
            drop = drop.to(hidden.device)
            hidden = torch.where(drop[:, None, None], self.null_hidden, hidden)
            pooled = torch.where(drop[:, None], self.null_pooled, pooled)
        if self.config.sizes.text_pooled_channels is None:
            return UNetCondition(hidden)
        return UNetCondition(hidden, pooled, self.size_condition(batch))

    def size_condition(self, batch: CachedBatch) -> Tensor:
        """Return ``(B, 6)``: what SDXL is told of sizes, in pixels."""
        latents = batch.require("autoencoder_mean")
        target = torch.tensor(latents.shape[-2:], device=latents.device) * self.pixels_per_latent
        target = target.expand(len(batch), 2)
        # A set in memory is served as it is: no picture was resized or cropped.
        original = target if batch.original_sizes is None else batch.original_sizes.to(target)
        crops = torch.zeros_like(target) if batch.crops is None else batch.crops.to(target)
        sizes = torch.cat([original, crops, target], dim=1)
        assert sizes.shape[1] == NUM_SIZES
        return sizes

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the latents, predict, compare with the noise and with the teacher."""
        config = self.config
        draws = step_draws(self, config.run.seed, batch_idx)
        noised = noise_unet_batch(self.clean_latents(batch, draws), config.diffusion, draws)
        if batch.loss_weights is not None:
            noised = replace(noised, weight=noised.weight * batch.loss_weights)
        drop = draws.uniform("caption dropout", len(batch)) < config.caption_dropout
        cond = self.told(batch, drop)
        if self.lesson is None:
            predicted = self.network(noised.x_t, noised.network_time, cond)
            loss, mse = denoising_loss(predicted, noised)
        else:
            names = [pair.student for pair in self.lesson.pairs]
            output = self.network(noised.x_t, noised.network_time, cond, names)
            predicted = output.prediction
            task, mse = denoising_loss(predicted, noised)
            loss = self._taught(predicted, output.features, task, noised, cond, batch.loss_weights)
        log_means(self, {"loss": loss, "mse": mse})
        if (self.global_step + 1) % config.run.log_every_steps == 0:
            self.log_dict(errors_by_noise(predicted, noised))
        return loss

    def _taught(
        self,
        predicted: Tensor,
        features: Features,
        task: Tensor,
        noised: Noised,
        cond: UNetCondition,
        weights: Tensor | None,
    ) -> Tensor:
        """Return the loss with the teacher's part; every term is logged by itself."""
        distill, lesson = self.config.distill, self.lesson
        assert distill is not None and lesson is not None
        wanted = [pair.teacher for pair in lesson.pairs]
        taught = lesson.teacher(noised.x_t, noised.network_time, cond, wanted)
        output = output_loss(predicted, taught.prediction, noised.weight)
        terms = {
            "task": distill.task_weight * task,
            "kd_output": distill.output_weight * output,
        }
        if lesson.pairs:
            normalize = distill.features is not None and distill.features.normalize
            by_place = feature_losses(
                features, taught.features, lesson.pairs, weights, normalize=normalize
            )
            terms["kd_features"] = distill.feature_weight * total(by_place)
            if (self.global_step + 1) % self.config.run.log_every_steps == 0:
                self.log_dict({f"kd/{name}": value for name, value in by_place.items()})
        log_means(self, terms)
        return total(terms)

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def validation_errors(self, batch: CachedBatch, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return each sample's published loss and time, with its caption."""
        config = self.config.diffusion
        x0 = self.clean_latents(batch, draws)
        evenly = UNetDiffusionConfig(
            config.prediction, config.beta_start, config.beta_end, stratified=True
        )
        noised = noise_unet_batch(x0, evenly, draws)
        predicted = self.network(noised.x_t, noised.network_time, self.told(batch))
        return published_unet_errors(predicted, x0, noised, config), noised.t

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        optimizer, schedule = make_optimizer(
            self.network.parameters(), self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class LoadTeacher(Callback):
    """Loads the teacher where the run trains, and gives it the run's clock."""

    def __init__(self, teacher: FrozenTeacher) -> None:
        """Take the teacher."""
        self.teacher = teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load it."""
        self.teacher.load(pl_module.device)
        ledger = find_callback(trainer, Ledger)
        if ledger is not None:
            self.teacher.clock = ledger.clock
