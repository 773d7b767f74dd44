"""What ``python -m train cascade_kd`` does: find the teacher, check that it fits, fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from cascade.checkpoints.part_files import find_network, weights_hash
from cascade.errors import UserError
from stages.stage_c import StageCConfig
from train.data.open import TrainingData
from train.distill.bias_curve import BiasCurve
from train.distill.feature_target import FeatureSource
from train.distill.picture_teacher import PictureTeacher, default_site
from train.encode import FrozenPaths
from train.fit import prepare
from train.initial import with_architecture
from train.runs import fit_stage_c, frozen_of_stage_c, open_stage_c
from train.systems.cascade_kd import (
    CascadeKDRun,
    CascadeKDSystem,
    CascadeLesson,
    LoadLesson,
    middle_block,
)


def train_cascade_kd(config: CascadeKDRun, *, resume: bool) -> None:
    """Train Stage C with a U-Net as its teacher."""
    config = with_architecture(config, "stage_c", resume=resume)
    _check_blocks(config)
    prepared = prepare(config.run, config, resume=resume)
    judged = frozen_of_stage_c(config)
    frozen = _with_teacher(config, judged)
    data = open_stage_c(config, frozen)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    lesson, channels = _lesson(config, data)
    system = CascadeKDSystem(config, data.null_text, lesson, channels)
    if lesson is not None:
        data = data.taught_by(lesson.teacher.fingerprint())
    first = [] if lesson is None else [LoadLesson(lesson)]
    fit_stage_c(system, data, config, judged, prepared, first=first)


def _with_teacher(config: CascadeKDRun, frozen: FrozenPaths) -> FrozenPaths:
    """Add what a batch must hold for the terms that are on."""
    if config.teacher is None:
        return frozen
    if "align" in config.terms and config.align.source == "data":
        frozen = replace(frozen, features=config.align.target(config.teacher))
    if config.reads_latents:
        frozen = replace(frozen, autoencoder=config.teacher.autoencoder)
    return frozen


def _lesson(config: CascadeKDRun, data: TrainingData) -> tuple[CascadeLesson | None, int | None]:
    """Find the teacher, and the width of the features of ``align``.

    Raises:
        UserError: It does not fit the pictures, the text or what was measured.
    """
    if config.teacher is None or not config.terms:
        return None, None
    teacher = PictureTeacher(config.teacher)
    teacher.check_pictures(data.shapes)
    source, channels = None, None
    if "align" in config.terms:
        source = FeatureSource(config.align.target(config.teacher), teacher)
        channels = source.channels
    if not config.reads_latents:
        return None, channels
    lesson = CascadeLesson(teacher, source if config.align.source == "latents" else None)
    if config.teacher_captions and ("relations" in config.terms or "estimate" in config.terms):
        _check_text(config, teacher, data.null_text)
    if "relations" in config.terms:
        lesson.pairs = _pairs(config, teacher)
    if "estimate" in config.terms:
        assert config.estimate.curve is not None, "EstimateConfig requires it"
        lesson.compressor = find_network(config.compressor, "compressor")
        compressor = weights_hash(lesson.compressor.path)
        lesson.curve = _curve(config, teacher, compressor)
    return lesson, channels


def _check_blocks(config: CascadeKDRun) -> None:
    """Refuse blocks that Stage C does not have.

    Raises:
        UserError: Naming the first.
    """
    sizes = config.sizes
    if not isinstance(sizes, StageCConfig):
        raise UserError(
            f"init_from {config.init_from}: a Stage C of v2, which returns no features; a "
            "teacher's terms are for Stage C of v3"
        )
    wanted = [("relations.sites", name) for name in config.relations.sites]
    if config.align.block is not None:
        wanted.append(("align.block", config.align.block))
    for key, name in wanted:
        if name not in sizes.sites:
            known = list(sizes.sites)
            raise UserError(
                f"{key}: {name!r} is no block of this Stage C; it has {known[0]} to {known[-1]}"
            )


def _pairs(config: CascadeKDRun, teacher: PictureTeacher) -> tuple[tuple[str, str], ...]:
    sizes = config.sizes
    assert isinstance(sizes, StageCConfig)
    given = config.relations.sites or {middle_block(sizes): default_site(teacher.sites)}
    for name in given.values():
        if name not in teacher.sites:
            raise UserError(f"relations.sites: {name!r} is no place of {teacher.config.unet}")
    return tuple(given.items())


def _check_text(
    config: CascadeKDRun, teacher: PictureTeacher, null_text: tuple[Tensor, Tensor] | None
) -> None:
    """Refuse a teacher that reads other text states than Stage C."""
    assert null_text is not None
    wanted = {
        "text_channels": null_text[0].shape[-1],
        "text_pooled_channels": null_text[1].shape[-1],
    }
    for name, width in wanted.items():
        theirs = getattr(teacher.unet.config, name)
        if theirs is not None and theirs != width:
            raise UserError(
                f"teacher_captions: {teacher.config.unet} has {name} {theirs}, but the text "
                f"states of {config.text} have {width}: it reads another text encoder; set "
                "teacher_captions false"
            )


def _curve(config: CascadeKDRun, teacher: PictureTeacher, compressor: str) -> BiasCurve:
    """Read the measured bias, and refuse one of other networks."""
    assert config.estimate.curve is not None
    curve = BiasCurve.read(Path(config.estimate.curve))
    found = {
        "teacher": (curve.teacher, teacher.fingerprint()),
        "compressor": (curve.compressor, compressor),
        "captions": (curve.captions, config.teacher_captions),
    }
    for name, (theirs, ours) in found.items():
        if theirs != ours:
            raise UserError(
                f"estimate.curve {config.estimate.curve}: measured with {name} {theirs}, but this "
                f"run has {ours}; measure it again"
            )
    best = curve.points[0].likeness
    if best < config.estimate.min_ratio:
        raise UserError(
            f"estimate.curve {config.estimate.curve}: its ratio at the least noise is "
            f"{best:.3f}, below estimate.min_ratio {config.estimate.min_ratio}: this teacher's "
            "estimates are biased at all noise; leave the term out"
        )
    return curve
