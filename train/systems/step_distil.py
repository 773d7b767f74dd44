"""A stage that learns its teacher's guidance in one pass, or its whole path in a few steps.

References: Meng et al., 2023, arXiv:2210.03142, section 3.1 (guidance); Lu & Song, 2024,
arXiv:2410.11081 (continuous-time consistency); Sauer et al., 2024, arXiv:2403.12015 (the
adversarial term).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from cascade.diffusion.trigflow import along, clean, turned
from cascade.pipelines.few_steps import distilled_metadata
from cascade.pipelines.spec import StageSampling
from stages.conditions import concat
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig
from train.data.cached import CachedBatch
from train.distill.stage_teacher import StageTeacher, evenly
from train.distill.teacher_walk import walked
from train.draws import StepDraws, step_draws
from train.losses.consistency import (
    TimeWeight,
    consistency_errors,
    consistency_tangent,
    draw_angles,
    normalized,
)
from train.losses.latent_heads import LatentHeads, heads_loss, student_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.systems.step_distil_config import StepDistilRun

_WARMUP_STEPS = 1000


@dataclass(frozen=True)
class Told:
    """What a batch's networks are told."""

    cond: StageBCondition | StageCCondition
    uncond: StageBCondition | StageCCondition | None
    """What guidance leads away from, as in sampling; None: guidance is off."""
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
        cond: StageBCondition | StageCCondition
        uncond: StageBCondition | StageCCondition
        if self.config.stage == "stage_b":
            latents = batch.require("stage_c_latents")
            cond = StageBCondition(latents, pooled)
            uncond = StageBCondition(torch.zeros_like(latents), null_pooled)
        else:
            hidden = batch.require("text_hidden")
            cond = StageCCondition(hidden, pooled)
            uncond = StageCCondition(self.null_hidden.expand_as(hidden), null_pooled)
        return Told(cond, None if self.config.guidance.high == 1 else uncond, pooled)

    def student(self, cond: object) -> Any:
        """Return the student as TrigFlow: ``(x, angle) -> v``, float32 or wider."""

        def velocity(x: Tensor, angle: Tensor) -> Tensor:
            given, time = self.teacher.trigflow.told(x, angle)
            predicted = self.network(given, time, cond)
            wide = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
            return self.teacher.trigflow.velocity(wide, x, angle)

        return velocity

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Ask the teacher, move the student."""
        config = self.config
        draws = step_draws(self, config.run.seed, batch_idx)
        x0, told = self.latents(batch).float(), self.told(batch)
        noise = draws.normal("noise", x0.shape).to(x0)
        guidance = config.guidance
        drawn = draws.uniform("guidance", len(x0)).to(x0)
        scale = guidance.low + (guidance.high - guidance.low) * drawn
        if config.objective == "multistep":
            loss = self._steps_loss(noise, told, scale)
        else:
            loss = self._path_loss(x0, noise, told, scale, draws)
        log_means(self, {"loss": loss})
        return loss

    def _path_loss(
        self, x0: Tensor, noise: Tensor, told: Told, scale: Tensor, draws: StepDraws
    ) -> Tensor:
        """Compare at noised latents: what the student says there, or how its jump's end changes."""
        config = self.config
        angle = self._angles("t", len(x0), config.angles.mean, config.angles.spread, draws)
        angle = angle.to(x0.device)
        x = turned(x0, noise, angle)
        taught = self.teacher.velocity(x, angle, told.cond, told.uncond, scale)
        student = self.student(self._scaled(told.cond, scale))
        predicted = student(x, angle)
        if config.objective == "guidance":
            errors = (predicted - taught).flatten(1).square().mean(dim=1)
        else:
            progress = min(1.0, draws.step / max(1, self._warmup_steps))
            tangent = consistency_tangent(student, x, angle, taught, config.tangent, progress)
            size = tangent.flatten(1).square().mean(dim=1).sqrt().mean()
            log_means(self, {"tangent": size})
            tangent = normalized(tangent, config.tangent.normalize)
            errors = consistency_errors(predicted, tangent)
        loss = self._mean(errors, angle)
        if self.heads is not None:
            loss = loss + self._judged(clean(predicted, x, angle), x0, told, draws)
        return loss

    def _steps_loss(self, noise: Tensor, told: Told, scale: Tensor) -> Tensor:
        """Walk the teacher's path from noise, and compare the student's jump from every step.

        Reference: Luhman & Luhman, 2021, arXiv:2101.02388, step by step as in Salimans & Ho, 2022,
        arXiv:2202.00512, but in one go and from where sampling itself comes past.
        """
        bounds, count = self.bounds(), self.config.sampling.steps

        def teacher(x: Tensor, angle: Tensor) -> Tensor:
            return self.teacher.velocity(x, angle, told.cond, told.uncond, scale)

        points = walked(teacher, noise, bounds, self.config.small_steps)  # (n + 1, B, ...)
        x, there = points[:-1].flatten(0, 1), points[1:].flatten(0, 1)  # (n B, ...)
        angle, end = (one.repeat_interleave(len(noise)).to(x) for one in (bounds[:-1], bounds[1:]))
        cond = self._scaled(concat([told.cond] * count), scale.repeat(count))
        predicted = self.student(cond)(x, angle)
        left = angle - end  # there = cos(left) x - sin(left) v
        taught = (along(left.cos(), x) * x - there) / along(left.sin(), x)
        errors = (predicted - taught).flatten(1).square().mean(dim=1)
        by_step = errors.detach().unflatten(0, (count, -1)).mean(dim=1)  # (n,)
        log_means(self, {f"error_of_step_{n}": one for n, one in enumerate(by_step, start=1)})
        return self._mean(errors, angle)

    def _scaled(
        self, cond: StageBCondition | StageCCondition, scale: Tensor
    ) -> StageBCondition | StageCCondition:
        return replace(cond, cfg=scale) if self.config.guidance.is_told else cond

    def _mean(self, errors: Tensor, angle: Tensor) -> Tensor:
        log_means(self, {"error": errors.mean()})
        if self.time_weight is not None:
            errors = self.time_weight(errors, angle)
        return errors.mean()

    @property
    def _warmup_steps(self) -> int:
        given = self.config.tangent.warmup_steps
        if given is not None:
            return given
        return 0 if self.config.init_from else _WARMUP_STEPS

    def bounds(self) -> Tensor:
        """Return the angles between which sampling's steps lie, falling, ``(steps + 1,)``."""
        steps = self.config.sampling
        times = steps.times or torch.linspace(1.0, 0.0, steps.steps + 1).tolist()
        angles = self.teacher.trigflow.angle_of(torch.tensor(times))
        low, high = self.teacher.angles
        return torch.where(angles <= low, 0.0, angles.clamp(max=high))

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
        log_means(self, {"adversarial": adversarial, "heads": own})
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
