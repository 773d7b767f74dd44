"""A stage that learns its teacher's guidance in one pass, or its whole path in a few steps.

References: Meng et al., 2023, arXiv:2210.03142, section 3.1 (guidance); Lu & Song, 2024,
arXiv:2410.11081 (continuous-time consistency); Sauer et al., 2024, arXiv:2403.12015 (the
adversarial term).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.diffusion.trigflow import clean, turned
from cascade.pipelines.few_steps import distilled_metadata
from cascade.pipelines.spec import Stage, StageSampling
from cascade.text.encoder import TextConfig
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from train.callbacks.pictures import PicturesConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.distill.stage_teacher import StageTeacher, TaughtPath, evenly
from train.draws import StepDraws, step_draws
from train.losses.consistency import (
    TangentConfig,
    TimeWeight,
    consistency_errors,
    consistency_tangent,
    draw_angles,
    normalized,
)
from train.losses.latent_heads import LatentHeads, heads_loss, student_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class GuidanceConfig:
    """The teacher's guidance, which the student has within."""

    low: float = 1.0
    """Smallest scale that is drawn; 1 is no guidance."""
    high: float = 8.0
    """Largest; where both are the same the student is not told the scale."""
    default: float = 4.0
    """Scale that pictures are drawn with unless the user says otherwise."""

    def __post_init__(self) -> None:
        """Refuse an empty range, and a default outside."""
        if not 1 <= self.low <= self.default <= self.high:
            raise ValueError(
                f"low={self.low}, default={self.default} and high={self.high} must satisfy "
                "1 <= low <= default <= high"
            )

    @property
    def is_told(self) -> bool:
        """Whether the student is told the scale."""
        return self.low < self.high


@dataclass(frozen=True)
class AnglesConfig:
    """Which noise levels are drawn: the log of the tangent of their angle is normal."""

    mean: float = 0.0
    """Mean of ``log(tan t)``, which is ``log(sigma / alpha)`` (0.2 in SANA-Sprint at 0.5)."""
    spread: float = 1.6
    """Its standard deviation."""
    last_share: float = 0.1
    """Share that is drawn at pure noise, where sampling begins."""

    def __post_init__(self) -> None:
        """Refuse what is no distribution."""
        if not self.spread > 0 or not 0 <= self.last_share <= 1:
            raise ValueError(
                f"spread={self.spread} must be positive, last_share={self.last_share} in [0, 1]"
            )


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator of latents beside the consistency loss; off unless it has a weight."""

    weight: float = 0.0
    """Of the student's adversarial loss (0.5 in SANA-Sprint); 0: there is no discriminator."""
    blocks: int = 4
    """Blocks of the teacher whose features are judged, evenly spread."""
    mean: float = 0.0
    """Mean of ``log(tan t)`` of the noise under which latents are judged."""
    spread: float = 1.0
    """Its standard deviation."""

    def __post_init__(self) -> None:
        """Refuse what judges nothing."""
        if self.weight < 0 or self.blocks < 1 or not self.spread > 0:
            raise ValueError(
                f"weight={self.weight} must not be negative, blocks={self.blocks} at least 1, "
                f"spread={self.spread} positive"
            )


@dataclass(frozen=True)
class StepsConfig:
    """What the student's file says of its sampling."""

    steps: int = 4
    """Steps unless the user says otherwise."""
    max_steps: int = 8
    """Most steps that it takes; a model's plain network takes more."""
    times: tuple[float, ...] = ()
    """Decreasing times in [0, 1], one more than steps; empty: equally spaced."""


@dataclass(frozen=True)
class StepDistilRun:
    """The distillation of a stage's guidance, or of its steps, into a student of its own shape."""

    run: RunConfig
    data: DataConfig
    stage: Stage
    """Which stage."""
    teacher: str
    """A trained stage of v3: a file or folder in any layout, a model, or a hub id."""
    text: str
    """Text encoder's folder, or a model with one; a cache must come from it."""
    compressor: str
    """Semantic compressor's file, or a model with one; a cache must come from it."""
    stage_a: str | None = None
    """Stage A's file, or a model with one, for Stage B's latents."""
    stage_a_scale: float | None = None
    """What Stage A's latents are divided by, where its file does not say it."""
    text_states: TextConfig = field(default_factory=TextConfig)
    """Which hidden states the teacher reads."""
    objective: Literal["consistency", "guidance"] = "consistency"
    """"consistency": the end of the teacher's guided path, from anywhere on it. "guidance": what
    the teacher says under guidance, in one pass; the student keeps its steps."""
    init_from: str | None = None
    """What the student starts from instead of its teacher: an earlier student's weights."""
    taught: TaughtPath | None = None
    """What the teacher predicts, where neither its file nor its model says it."""
    teacher_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format in which the teacher runs."""
    time_unit: float = 1e-3
    """Unit of the student's time. Of the published embedding, 1, the slope in time is noise: see
    ``train/distill/few_steps_student.py``."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    angles: AnglesConfig = field(default_factory=AnglesConfig)
    tangent: TangentConfig = field(default_factory=TangentConfig)
    adaptive_weight: bool = False
    """Learn the weight of each noise level beside the student."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    sampling: StepsConfig = field(default_factory=StepsConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    pictures: PicturesConfig | None = None
    """Pictures of fixed prompts while it learns; null draws none."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.stage == "stage_b" and self.stage_a is None:
            raise ValueError("stage is stage_b but stage_a is missing: name Stage A's file")
        if self.stage == "stage_c" and self.stage_a is not None:
            raise ValueError("stage is stage_c, which knows no stage_a; leave it out")
        if self.adversarial.weight > 0 and self.objective != "consistency":
            raise ValueError(
                f"adversarial.weight is {self.adversarial.weight} but objective is "
                f"{self.objective}: only a student for few steps is judged"
            )
        if self.run.strategy == "fsdp" and self.objective == "consistency":
            raise ValueError(
                "run.strategy is fsdp: the student's derivative is taken of whole weights; use ddp"
            )
        if not 0 < self.time_unit <= 1:
            raise ValueError(f"time_unit is {self.time_unit}; it lies in (0, 1]")
        self.sampled(StageSampling())

    def sampled(self, sampling: StageSampling, path: TaughtPath | None = None) -> StageSampling:
        """Return how the student is sampled; ``path`` is its teacher's."""
        guidance = self.guidance
        if path is not None:
            sampling = replace(sampling, **vars(path))
        sampling = replace(
            sampling,
            guidance=guidance.default,
            rescale=0.0,
            guidance_range=(guidance.low, guidance.high),
        )
        if self.objective == "guidance":
            return sampling
        steps = self.sampling
        return replace(
            sampling,
            sampler="lcm",
            steps=steps.steps,
            max_steps=steps.max_steps,
            times=steps.times,
        )


@dataclass(frozen=True)
class Told:
    """What a batch's networks are told."""

    cond: StageBCondition | StageCCondition
    uncond: StageBCondition | StageCCondition
    """What guidance leads away from, as in sampling."""
    text_pooled: Tensor
    """``(B, P)``."""


class StepDistilSystem(LightningModule):
    """Wires student, teacher, losses and optimizer."""

    null_hidden: Tensor
    null_pooled: Tensor

    def __init__(
        self,
        config: StepDistilRun,
        sizes: StageBConfig | StageCConfig,
        teacher: StageTeacher,
        null_text: tuple[Tensor, Tensor],
    ) -> None:
        """Build the student, and heads if there are some.

        Args:
            config: The run.
            sizes: The student's.
            teacher: Not loaded yet.
            null_text: The hidden (L, D) and pooled (P,) states of "".

        Raises:
            ValueError: The teacher has fewer blocks than are to be judged.
        """
        super().__init__()
        self.config = config
        self.network: StageB | StageC = (
            StageB(sizes) if isinstance(sizes, StageBConfig) else StageC(sizes)
        )
        self.teacher = teacher
        self.time_weight = TimeWeight() if config.adaptive_weight else None
        self.heads: LatentHeads | None = None
        self.judged: list[str] = []
        if config.adversarial.weight > 0:
            self.judged = evenly(self.network, config.adversarial.blocks)
            widths = [_width(self.network.get_submodule(name)) for name in self.judged]
            self.heads = LatentHeads(widths, sizes.text_pooled_channels)
        self.register_buffer("null_hidden", null_text[0].float(), persistent=False)
        self.register_buffer("null_pooled", null_text[1].float(), persistent=False)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {self.config.stage: self.network}

    def export_metadata(self, name: str) -> dict[str, str]:
        """Return what the student's file says beside its sizes."""
        path = self.teacher.path
        return path.metadata() | distilled_metadata(self.config.sampled(StageSampling(), path))

    def on_fit_start(self) -> None:
        """Load the teacher where the run trains."""
        self.teacher.load(self.device)

    def latents(self, batch: CachedBatch) -> Tensor:
        """Return the clean latents of the stage."""
        part = "stage_c_latents" if self.config.stage == "stage_c" else "stage_a_latents"
        return batch.require(part)

    def told(self, batch: CachedBatch) -> Told:
        """Return the conditions of a batch; guidance leads away from what sampling does."""
        pooled = batch.require("text_pooled")
        null_pooled = self.null_pooled.expand_as(pooled)
        if self.config.stage == "stage_b":
            latents = batch.require("stage_c_latents")
            return Told(
                StageBCondition(latents, pooled),
                StageBCondition(torch.zeros_like(latents), null_pooled),
                pooled,
            )
        hidden = batch.require("text_hidden")
        return Told(
            StageCCondition(hidden, pooled),
            StageCCondition(self.null_hidden.expand_as(hidden), null_pooled),
            pooled,
        )

    def student(self, cond: object) -> Any:
        """Return the student as TrigFlow: ``(x, angle) -> v``, float32 or wider."""

        def velocity(x: Tensor, angle: Tensor) -> Tensor:
            given, time = self.teacher.trigflow.told(x, angle)
            predicted = self.network(given, time, cond)
            wide = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            return self.teacher.trigflow.velocity(wide, x, angle)

        return velocity

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Noise the latents, ask the teacher, move the student."""
        config = self.config
        draws = step_draws(self, config.run.seed, batch_idx)
        x0, told = self.latents(batch).float(), self.told(batch)
        angle = self._angles("t", len(x0), config.angles.mean, config.angles.spread, draws)
        angle = angle.to(x0.device)
        x = turned(x0, draws.normal("noise", x0.shape).to(x0), angle)
        guidance = config.guidance
        drawn = draws.uniform("guidance", len(x0)).to(x0)
        scale = guidance.low + (guidance.high - guidance.low) * drawn
        taught = self.teacher.velocity(x, angle, told.cond, told.uncond, scale)
        cond = replace(told.cond, cfg=scale) if guidance.is_told else told.cond
        student = self.student(cond)
        predicted = student(x, angle)
        if config.objective == "guidance":
            errors = (predicted - taught).flatten(1).square().mean(dim=1)
        else:
            progress = min(1.0, draws.step / max(1, config.tangent.warmup_steps))
            tangent = consistency_tangent(student, x, angle, taught, config.tangent, progress)
            size = tangent.flatten(1).square().mean(dim=1).sqrt().mean()
            self.log("tangent", size, sync_dist=True)
            tangent = normalized(tangent, config.tangent.normalize)
            errors = consistency_errors(predicted, tangent)
        self.log("error", errors.mean().detach(), sync_dist=True)
        if self.time_weight is not None:
            errors = self.time_weight(errors, angle)
        loss = errors.mean()
        if self.heads is not None:
            loss = loss + self._judged(clean(predicted, x, angle), x0, told, draws)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _angles(
        self, name: str, count: int, mean: float, spread: float, draws: StepDraws
    ) -> Tensor:
        last = self.config.angles.last_share if name == "t" else 0.0

        def draw(number: int, generator: torch.Generator) -> Tensor:
            return draw_angles(number, generator, self.teacher.angles, mean, spread, last)

        return draws.share(name, count, draw)

    def _judged(self, x0_hat: Tensor, x0: Tensor, told: Told, draws: StepDraws) -> Tensor:
        """Return the weighted adversarial loss and the heads' own.

        One backward pass serves both: the student's term knows the heads as constants, the heads'
        term the features as constants.
        """
        config, heads = self.config.adversarial, self.heads
        assert heads is not None
        angle = self._angles("judged t", len(x0), config.mean, config.spread, draws).to(x0.device)
        fake_noise, real_noise = (
            draws.normal(f"judged {name} noise", x0.shape).to(x0) for name in ("fake", "real")
        )
        shown: Sequence[Tensor] = self.teacher.features(
            turned(x0_hat, fake_noise, angle), angle, told.cond, self.judged
        )
        with torch.no_grad():
            real = self.teacher.features(
                turned(x0, real_noise, angle), angle, told.cond, self.judged
            )
        own = heads_loss(
            heads(real, told.text_pooled),
            heads([one.detach() for one in shown], told.text_pooled),
        )
        adversarial = student_loss(heads.fixed(shown, told.text_pooled))
        self.log("adversarial", adversarial, sync_dist=True)
        self.log("heads", own, sync_dist=True)
        return config.weight * adversarial + own

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        optimizer, schedule = make_optimizer(
            self.parameters(), self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _width(block: nn.Module) -> int:
    return int(block.residual.project.out_features)  # type: ignore[union-attr,arg-type]
