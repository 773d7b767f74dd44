"""What ``python -m train unet`` and ``unet_kd`` do: load data, find the teacher, build, fit."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.part_files import find_network, find_text, weights_hash
from cascade.errors import UserError
from cascade.pipelines.unet_spec import UNET_TEACHER_KEY, learned_prediction
from stages.unet.config import UNetConfig
from train.data.open import TrainingData, open_data
from train.data.paired import PairedLoader, PriorConfig
from train.distill.plans import STUDENT_KEY, plan_of
from train.distill.teacher import FrozenTeacher
from train.encode import FrozenPaths
from train.fit import prepare
from train.initial import start, start_from, with_architecture
from train.losses.distillation import site_pairs
from train.runs import fit_system, validation
from train.systems.unet import BASE_KEY, DistillConfig, Lesson, LoadTeacher, UNetRun, UNetSystem

_log = logging.getLogger(__name__)


def train_unet_kd(config: UNetRun, *, resume: bool) -> None:
    """Distill a teacher into a student."""
    if config.distill is None:
        raise UserError("distill is missing: name the teacher, or use: python -m train unet")
    _train(config, resume=resume)


def train_unet(config: UNetRun, *, resume: bool) -> None:
    """Train a U-Net without a teacher."""
    if config.distill is not None:
        raise UserError("distill names a teacher: use python -m train unet_kd, or leave it out")
    _train(config, resume=resume)


def _train(config: UNetRun, *, resume: bool) -> None:
    config = with_architecture(config, "unet", resume=resume)
    prepared = prepare(config.run, config, resume=resume)
    lesson = None if config.distill is None else _lesson(config.distill, config)
    opened = open_unet_data(config, lesson)
    frozen, data, system = opened.frozen, opened.data, opened.system
    if lesson is not None:
        data = data.taught_by(weights_hash(lesson.teacher.path))
    if config.prior is not None:
        data = _with_prior(config.prior, config, frozen, data)
    if config.init_from is not None and (config.lora is not None or prepared.newest is None):
        found = find_network(config.init_from, "unet")
        _check_prediction(found, config)
        system.started_from = _said_of(found, hashed=config.lora is not None)
    if config.lora is None:
        start(system.network, config.init_from, "unet", prepared)
    else:  # no checkpoint holds what a LoRA updates
        assert config.init_from is not None, "UNetRun requires it"
        start_from(system.network, config.init_from, "unet")
        system.attach(config.lora)
    last = validation(config, frozen, prepared, pixels=False)
    first = [] if lesson is None else [LoadTeacher(lesson.teacher)]
    fit_system(system, data, config, prepared, first=first, last=last)


@dataclass(frozen=True)
class OpenedUNet:
    """A U-Net with fresh weights, and its data."""

    system: UNetSystem
    data: TrainingData
    frozen: FrozenPaths


def open_unet_data(config: UNetRun, lesson: Lesson | None = None) -> OpenedUNet:
    """Open a run's data, and build the system that is told of it.

    Raises:
        UserError: Data, text, autoencoder and network do not fit each other.
    """
    sizes = config.sizes
    frozen = _frozen(config, sizes)
    data = open_data(config.data, frozen, pixels=False)
    null_text = _null_text(config, data)
    autoencoder = find_network(config.autoencoder, "autoencoder_kl").published.config
    if autoencoder.latent_channels != sizes.in_channels:
        raise UserError(
            f"model.in_channels is {sizes.in_channels} but {config.autoencoder} has latents of "
            f"{autoencoder.latent_channels} channels"
        )
    return OpenedUNet(UNetSystem(config, null_text, autoencoder.downscale, lesson), data, frozen)


def _said_of(found: FoundNetwork, *, hashed: bool) -> dict[str, str]:
    """Return what a run keeps in mind of the weights that it starts from.

    Args:
        found: The weights.
        hashed: Read them whole to tell them from others.
    """
    said = found.opened.metadata
    kept = {key: said[key] for key in (STUDENT_KEY, UNET_TEACHER_KEY) if key in said}
    return kept | {BASE_KEY: weights_hash(found.path)} if hashed else kept


def _check_prediction(found: FoundNetwork, config: UNetRun) -> None:
    """Compare what the weights of ``init_from`` have learned to predict with what the run teaches.

    Raises:
        UserError: It is another thing, and a LoRA leaves them as they are.
    """
    learned = learned_prediction(found.opened.metadata, str(found.path))
    if learned in (None, config.diffusion.prediction):
        return
    told = f"init_from {config.init_from} has learned to predict {learned}"
    if config.lora is not None:
        raise UserError(
            f"{told}, which a LoRA does not change; set diffusion.prediction to {learned}"
        )
    _log.warning("%s; this run teaches it %s instead", told, config.diffusion.prediction)


def _with_prior(
    prior: PriorConfig, config: UNetRun, frozen: FrozenPaths, data: TrainingData
) -> TrainingData:
    """Return data whose batches hold pictures of the second set as well."""
    other = open_data(prior.data(config.data), frozen, pixels=False)
    if (data.encode is None) != (other.encode is None):
        raise UserError("prior.shards and data.shards: both pictures, or both latents of a cache")

    def loader(step: int, rank: int, world: int) -> PairedLoader:
        own, others = (one.loader_from(step, rank, world) for one in (data, other))
        return PairedLoader(own, others, prior.weight)

    lost = dict(Counter(data.lost) + Counter(other.lost))
    digest = f"{data.digest}+{other.digest}"
    return replace(data, loader_from=loader, digest=digest, lost=lost)


def _lesson(distill: DistillConfig, config: UNetRun) -> Lesson:
    """Find the teacher and what the student imitates.

    Raises:
        UserError: They do not belong together.
    """
    teacher = FrozenTeacher(distill.teacher, distill.dtype)
    ours, theirs = config.sizes, teacher.config
    for name in ("in_channels", "out_channels", "text_channels", "text_pooled_channels"):
        if getattr(ours, name) != getattr(theirs, name):
            raise UserError(
                f"distill.teacher {distill.teacher}: its {name} is {getattr(theirs, name)}, the "
                f"student's {getattr(ours, name)}: they are not told the same"
            )
    learned = learned_prediction(teacher.metadata, distill.teacher)
    if learned not in (None, config.diffusion.prediction):
        raise UserError(
            f"distill.teacher {distill.teacher}: it predicts {learned}, the student "
            f"{config.diffusion.prediction}: their outputs can't be compared; set "
            f"diffusion.prediction to {learned}"
        )
    if distill.features is None or distill.feature_weight == 0:
        return Lesson(teacher)
    plan = plan_of(config.init_from, distill.recipe, student=ours, teacher=theirs)
    try:
        return Lesson(teacher, site_pairs(distill.features, plan), plan)
    except ValueError as error:
        raise UserError(f"distill.features: {error}") from error


def _frozen(config: UNetRun, sizes: UNetConfig) -> FrozenPaths:
    """Return the networks that encode; of a model with two text encoders each is told by width."""
    frozen = FrozenPaths(
        text=config.text,
        text_states=config.text_read,
        text_width=sizes.text_channels,
        autoencoder=config.autoencoder,
    )
    if config.text_2 is None:
        return frozen
    second = find_text(config.text_2, sizes.text_pooled_channels)
    return replace(
        frozen,
        text_width=sizes.text_channels - second.width,
        text_2=config.text_2,
        text_2_width=sizes.text_pooled_channels,
    )


def _null_text(config: UNetRun, data: TrainingData) -> tuple[Tensor, Tensor]:
    """Check the text's widths; return the states of no caption."""
    assert data.null_text is not None, "open_data gives the null text with the text part"
    sizes, (hidden, pooled) = config.sizes, data.null_text
    found = {"text_channels": hidden.shape[-1]}
    if sizes.text_pooled_channels is not None:
        found["text_pooled_channels"] = pooled.shape[-1]
    for name, width in found.items():
        if width != getattr(sizes, name):
            raise UserError(
                f"model.{name} is {getattr(sizes, name)} but the text states have {width}"
            )
    if config.drops_to_zeros:
        return torch.zeros_like(hidden), torch.zeros_like(pooled)
    return hidden, pooled
