"""Stage C with a U-Net as its teacher: the two share pictures, but no latents.

Three terms beside the denoising loss, each a switch with a weight, all off by default:

- ``align``: the middle of Stage C, projected, points where the teacher's features of the clean
  picture point (route C);
- ``relations``: positions of Stage C are as alike as those of the teacher, who sees the same
  picture at the same log-SNR in its own space (route D);
- ``estimate``: the teacher's estimate of the picture, decoded and compressed again, where it was
  measured not to be biased (route E).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.checkpoints.found import FoundNetwork
from cascade.diffusion.prediction import Prediction, to_x0
from cascade.evaluate.flops import FlopCounter
from stages.block_features import BlockOutput
from stages.semantic_compressor import SemanticCompressor
from stages.stage_c import StageCConfig
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.clock import PhaseClock
from train.data.cached import CachedBatch
from train.distill.bias_curve import BiasCurve
from train.distill.feature_target import FeatureSource, FeatureTarget
from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig
from train.draws import StepDraws
from train.encode import load_frozen
from train.losses.cascade_distillation import (
    FeatureProjector,
    cosine_distances,
    estimate_distances,
    mean_over_batch,
    relation_distances,
)
from train.losses.denoising import Noised
from train.reduction import log_means
from train.systems.stage_c import StageCRun, StageCSystem


@dataclass(frozen=True)
class AlignConfig:
    """Features of the clean picture that Stage C is to have in its middle, at any noise."""

    weight: float = 0.0
    """Of the term (0.5 in REPA); 0: off."""
    source: Literal["data", "latents"] = "data"
    """data: the features come with the batch, from a cache (``python -m train.data precompute
    --teacher-of``) or, of a stream of pictures, made in every step. latents: they are made in
    every step of the latents of the teacher's autoencoder, which the batch has."""
    block: str | None = None
    """Block of Stage C; null: the last on the way down, the middle of the network."""
    hidden_channels: int = 2048
    """Width of the projection's hidden layer."""
    site: str | None = None
    """See ``FeatureTarget``."""
    timestep: int = 200
    """See ``FeatureTarget``."""
    basis: str | None = None
    """See ``FeatureTarget``."""
    max_side: int | None = None
    """See ``FeatureTarget``."""

    def __post_init__(self) -> None:
        """Refuse what is no term."""
        if self.weight < 0 or self.hidden_channels < 1:
            raise ValueError(
                f"weight={self.weight} must not be negative, hidden_channels="
                f"{self.hidden_channels} at least 1"
            )
        if not 0 <= self.timestep <= 999:
            raise ValueError(f"timestep={self.timestep} lies in 0 to 999")
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"max_side={self.max_side} must be at least 1")

    def target(self, teacher: PictureTeacherConfig) -> FeatureTarget:
        """Return which features these are."""
        return FeatureTarget(teacher, self.site, self.timestep, self.basis, self.max_side)


@dataclass(frozen=True)
class RelationsConfig:
    """Which positions of a picture are alike, at the same noise for both."""

    weight: float = 0.0
    """Of the term; 0: off."""
    sites: dict[str, str] = field(default_factory=dict)
    """Blocks of Stage C -> places of the teacher; none: the middle of Stage C, and the place that
    ``FeatureTarget`` takes by default."""
    min_log_snr: float = 0.0
    """Least log-SNR at which the teacher is asked: at more noise, two noised pictures of different
    latent spaces tell of different contents."""

    def __post_init__(self) -> None:
        """Refuse what is no term."""
        if self.weight < 0:
            raise ValueError(f"weight={self.weight} must not be negative")


@dataclass(frozen=True)
class EstimateConfig:
    """The teacher's estimate of the picture as a target of Stage C's."""

    weight: float = 0.0
    """Of the term; 0: off."""
    curve: str | None = None
    """What ``python -m train.distill reencode-bias`` measured (JSON)."""
    min_ratio: float = 0.9
    """Least ratio of spreads, there, at which an estimate is a target."""

    def __post_init__(self) -> None:
        """Refuse an estimate of which nobody knows how biased it is."""
        if self.weight < 0 or not 0 < self.min_ratio <= 1:
            raise ValueError(
                f"weight={self.weight} must not be negative, min_ratio={self.min_ratio} in (0, 1]"
            )
        if self.weight > 0 and self.curve is None:
            raise ValueError(
                "curve is missing: an estimate is a target only where it was measured not to be "
                "biased; measure it with python -m train.distill reencode-bias"
            )


@dataclass(frozen=True)
class CascadeKDRun(StageCRun):
    """The training of Stage C with a U-Net as its teacher."""

    teacher: PictureTeacherConfig | None = None
    """The teacher; needed as soon as a term has a weight."""
    teacher_captions: bool = False
    """Tell the teacher the captions in ``relations`` and ``estimate``, if it reads the same text
    states as Stage C; else it is told none, which at little noise hardly matters."""
    align: AlignConfig = field(default_factory=AlignConfig)
    """Features of the clean picture."""
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    """Self-attention relations."""
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    """The teacher's estimates."""

    def __post_init__(self) -> None:
        """Refuse terms without a teacher, and a Stage C that returns no features."""
        super().__post_init__()
        on = self.terms
        if on and self.teacher is None:
            raise ValueError(f"{on[0]}.weight is set but teacher is missing: name the U-Net")
        if self.model_v2 is not None:
            raise ValueError("model_v2 is set: a teacher's features are for Stage C of v3 alone")

    @property
    def terms(self) -> tuple[str, ...]:
        """The sections that are on."""
        names = ("align", "relations", "estimate")
        return tuple(name for name in names if getattr(self, name).weight > 0)

    @property
    def reads_latents(self) -> bool:
        """Whether the teacher is asked in every step, of the latents of its autoencoder."""
        online = "align" in self.terms and self.align.source == "latents"
        return online or "relations" in self.terms or "estimate" in self.terms


@dataclass
class CascadeLesson:
    """A teacher and what is asked of it; no part of the system, of a checkpoint or a wrapper."""

    teacher: PictureTeacher
    align: FeatureSource | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    """Blocks of Stage C and the places whose relations they imitate."""
    curve: BiasCurve | None = None
    compressor: FoundNetwork | None = None
    """Of ``estimate``."""
    clock: PhaseClock = field(default_factory=PhaseClock)
    """The run's."""
    device: torch.device | None = None
    flops: float = 0.0
    """Operations of the teacher so far. Each step asks it of other samples, so that the first step
    does not tell what the others take: a sample of each question is counted once."""
    _flops_by_row: dict[tuple[str, torch.Size], float] = field(default_factory=dict)
    _compressor: SemanticCompressor | None = None

    def load(self, device: torch.device) -> None:
        """Load the frozen networks onto a device."""
        self.device = device
        self.teacher.load(device)
        if self.compressor is not None:
            self._compressor = load_frozen(self.compressor, device)

    @contextmanager
    def speaks(self, question: str, asked: Tensor) -> Iterator[None]:
        """Count time and operations as the teacher's; no gradient is wanted of what it says.

        Args:
            question: What it is asked.
            asked: Of which samples, ``(B, ...)``.
        """
        key = (question, asked.shape[1:])
        with self.clock.within("teacher", self.device), torch.no_grad():
            if key in self._flops_by_row:
                yield
            else:
                with FlopCounter() as counter:
                    yield
                self._flops_by_row[key] = counter.total / len(asked)
        self.flops += self._flops_by_row[key] * len(asked)

    def reencoded(self, latents: Tensor) -> Tensor:
        """Bring the teacher's latents (B, 4, h', w') into Stage C's space, (B, 16, h, w)."""
        assert self._compressor is not None, "load() comes first"
        pixels = self.teacher.pixels(latents)
        with torch.autocast(pixels.device.type, enabled=False):
            return self._compressor.encode(pixels)


class LoadLesson(Callback):
    """Loads the teacher where the run trains, and gives it the run's clock."""

    def __init__(self, lesson: CascadeLesson) -> None:
        """Take the lesson."""
        self.lesson = lesson

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load it."""
        self.lesson.load(pl_module.device)
        ledger = find_callback(trainer, Ledger)
        if ledger is not None:
            self.lesson.clock = ledger.clock


def middle_block(config: StageCConfig) -> str:
    """Return the name of the last block on the way down."""
    return [name for name in config.sites if name.startswith("down_blocks.")][-1]


class CascadeKDSystem(StageCSystem):
    """Stage C's own training with the terms of a teacher beside its loss."""

    config: CascadeKDRun

    def __init__(
        self,
        config: CascadeKDRun,
        null_text: tuple[Tensor, Tensor],
        lesson: CascadeLesson | None = None,
        feature_channels: int | None = None,
    ) -> None:
        """Build the network, and the projection that ``align`` needs.

        Args:
            config: Of the run.
            null_text: See ``StageCSystem``.
            lesson: The teacher, where it is asked in every step; None: it is not.
            feature_channels: Width of the features of ``align``; None: there are none.
        """
        super().__init__(config, null_text)
        self.lesson = lesson
        self.projector: FeatureProjector | None = None
        sizes = config.sizes
        assert isinstance(sizes, StageCConfig), "CascadeKDRun refuses v2"
        self.align_block = config.align.block or middle_block(sizes)
        if feature_channels is not None:
            width, hidden = sizes.sites[self.align_block].channels, config.align.hidden_channels
            self.projector = FeatureProjector(width, hidden, feature_channels)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks whose outputs the terms compare."""
        pairs = () if self.lesson is None else self.lesson.pairs
        aligned = () if self.projector is None else (self.align_block,)
        return (*aligned, *(ours for ours, _ in pairs))

    @property
    def teacher_flops(self) -> float:
        """Operations of the teacher so far, for the ledger."""
        return 0.0 if self.lesson is None else self.lesson.flops

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer steps: the network, and the projection, which is not kept."""
        projection = () if self.projector is None else self.projector.parameters()
        return [*super().trained_parameters(), *projection]

    def taught(
        self,
        loss: Tensor,
        batch: CachedBatch,
        noised: Noised,
        output: BlockOutput,
        draws: StepDraws,
    ) -> Tensor:
        """Return the loss with the teacher's terms; each is logged by itself."""
        terms = {"task": loss}
        if self.projector is not None:
            terms["kd_align"] = self._align(batch, output)
        config = self.config
        if config.relations.weight > 0 or config.estimate.weight > 0:
            terms |= self._at_matched_noise(batch, noised, output, draws)
        log_means(self, terms)
        return torch.stack(list(terms.values())).sum()

    def _align(self, batch: CachedBatch, output: BlockOutput) -> Tensor:
        assert self.projector is not None
        if self.config.align.source == "latents":
            assert self.lesson is not None and self.lesson.align is not None
            latents = batch.require("autoencoder_mean").float()
            with self.lesson.speaks("features", latents):
                theirs = self.lesson.align.of_latents(latents)
        else:
            theirs = batch.require("teacher_features")
        ours = self.projector(output.features[self.align_block])
        return self.config.align.weight * cosine_distances(ours, theirs).mean()

    def _at_matched_noise(
        self, batch: CachedBatch, noised: Noised, output: BlockOutput, draws: StepDraws
    ) -> dict[str, Tensor]:
        """Ask the teacher of the same pictures, noised to the same log-SNR in its own space."""
        lesson, config = self.lesson, self.config
        assert lesson is not None
        teacher, count = lesson.teacher, len(batch)
        log_snr = config.diffusion.noise_schedule().log_snr(noised.t)  # (B,)
        related = torch.zeros_like(log_snr, dtype=torch.bool)
        trusted = torch.zeros_like(related)
        if lesson.pairs:
            related = log_snr >= config.relations.min_log_snr
        if lesson.curve is not None:
            trusted = lesson.curve.trusted(log_snr, config.estimate.min_ratio)
        asked = (related | trusted).nonzero().flatten()
        related, trusted = related[asked], trusted[asked]
        found = self._no_terms(output)
        if len(asked):
            # For every sample, so that a sample's noise does not depend on which are asked.
            whole = batch.require("autoencoder_mean").float()
            noise = draws.normal("teacher noise", whole.shape).to(whole.device)[asked]
            latents, timesteps = whole[asked], teacher.timesteps_at(log_snr[asked])
            text = None
            if config.teacher_captions:
                states = (batch.require("text_hidden"), batch.require("text_pooled"))
                text = (states[0][asked], states[1][asked])
            with lesson.speaks("relations and prediction", latents):
                x_t = teacher.noised(latents, noise, timesteps)
                wanted = [theirs for _, theirs in lesson.pairs]
                predicted, features = teacher.ask(x_t, timesteps, text, wanted)
                maps = teacher.maps(features, latents)
            for ours, theirs in lesson.pairs:
                student = output.features[ours][asked][related]
                distance = relation_distances(student, maps[theirs][related])
                weight = config.relations.weight / len(lesson.pairs)
                added = weight * mean_over_batch(distance, count)
                found["kd_relations"] = found["kd_relations"] + added
            if bool(trusted.any()):
                estimate = teacher.estimate(predicted, x_t, timesteps)[trusted]
                with lesson.speaks("estimate", estimate):
                    target = lesson.reencoded(estimate)
                distance = self._estimate_distances(output, noised, asked[trusted], target)
                added = config.estimate.weight * mean_over_batch(distance, count)
                found["kd_estimate"] = found["kd_estimate"] + added
        if lesson.curve is not None:
            log_means(self, {"kd_estimate_share": trusted.float().sum() / count})
        return found

    def _no_terms(self, output: BlockOutput) -> dict[str, Tensor]:
        """Return the terms that are on, at 0."""
        zero = output.prediction.new_zeros((), dtype=torch.float32)
        on = {"relations": "kd_relations", "estimate": "kd_estimate"}
        return {name: zero.clone() for section, name in on.items() if section in self.config.terms}

    def _estimate_distances(
        self, output: BlockOutput, noised: Noised, rows: Tensor, target: Tensor
    ) -> Tensor:
        """Return the distances of some rows' estimates from the teacher's."""
        alpha, sigma = self.config.diffusion.noise_schedule()(noised.t[rows])
        kind = Prediction(self.config.diffusion.prediction)
        scales = (alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))
        predicted = output.prediction[rows].float()
        x0_hat = to_x0(predicted, noised.x_t[rows].float(), *scales, kind)
        return estimate_distances(x0_hat, target, alpha)
