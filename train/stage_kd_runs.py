"""What ``python -m train stage_b_kd`` and ``stage_a_decoder`` do: find the teacher, fit."""

from __future__ import annotations

import logging

import torch

from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import weights_hash
from cascade.errors import UserError
from cascade.pipelines.few_steps import DISTILLED_KEY
from stages.stage_b import StageBConfig
from train.data.open import open_data
from train.distill.thinned import thinned
from train.encode import find_stage_a
from train.fit import prepare
from train.initial import start_from, with_architecture
from train.losses.denoising import SAMPLED, learned_diffusion
from train.runs import (
    check_crop,
    finished_compressor,
    fit_stage_b,
    fit_system,
    frozen_of_stage_b,
    open_stage_b,
)
from train.systems.stage_a_decoder import (
    DecoderTeacher,
    LoadDecoderTeacher,
    StageADecoderRun,
    StageADecoderSystem,
)
from train.systems.stage_b_kd import (
    FrozenStageB,
    LoadStageBTeacher,
    StageBKDRun,
    StageBKDSystem,
)

_log = logging.getLogger(__name__)


def train_stage_b_kd(config: StageBKDRun, *, resume: bool) -> None:
    """Train a smaller Stage B with a larger one as its teacher."""
    config = with_architecture(config, "stage_b", resume=resume)
    sizes, taught_by = config.sizes, config.taught_by
    teacher = FrozenStageB(taught_by.network, taught_by.dtype)
    if not isinstance(sizes, StageBConfig) or not isinstance(teacher.config, StageBConfig):
        raise UserError(
            f"teacher.network {taught_by.network}: a teacher and its student are Stage Bs of v3, "
            "and one of these is of v2"
        )
    _check_teacher(config, sizes, teacher)
    prepared = prepare(config.run, config, resume=resume)
    frozen = frozen_of_stage_b(config)
    data = open_stage_b(config, frozen)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    try:
        system = StageBKDSystem(config, data.null_text, teacher, finished_compressor(config))
    except ValueError as error:
        raise UserError(f"teacher.blocks: {error}") from error
    if prepared.newest is None:
        if config.init_from is not None:
            start_from(system.network, config.init_from, "stage_b")
        elif taught_by.init:
            _begin_as(system, sizes, teacher)
    data = data.taught_by(weights_hash(teacher.found.path))
    first = [LoadStageBTeacher(teacher)]
    fit_stage_b(system, data, config, frozen, prepared, first=first)


def train_stage_a_decoder(config: StageADecoderRun, *, resume: bool) -> None:
    """Train the fast decoder of Stage A."""
    found = find_stage_a(config.stage_a, config.stage_a_scale)
    stage_a = found.published.config
    theirs = {"latent_channels": stage_a.latent_channels, "upscale": stage_a.downscale}
    for name, value in theirs.items():
        ours = getattr(config.model, name)
        if ours != value:
            key = "latent_channels" if name == "latent_channels" else "channels (two for each 4)"
            raise UserError(
                f"model.{key}: the fast decoder has {name} {ours}, but {config.stage_a} {value}"
            )
    prepared = prepare(config.run, config, resume=resume)
    data = open_data(config.data).taught_by(weights_hash(found.path))
    check_crop(config, data, "Stage A", stage_a.downscale)
    teacher = DecoderTeacher(found)
    system = StageADecoderSystem(config, teacher)
    if config.init_from is not None and prepared.newest is None:
        start_from(system.network, config.init_from, "stage_a_fast")
    fit_system(system, data, config, prepared, first=[LoadDecoderTeacher(teacher)])


def _begin_as(system: StageBKDSystem, sizes: StageBConfig, teacher: FrozenStageB) -> None:
    """Give the student every n-th block of the teacher."""
    weights = build(teacher.found.opened, teacher.found.published, dtype=torch.float32)
    chosen = thinned(system.network.state_dict(), sizes, weights.state_dict(), teacher.config)
    system.network.load_state_dict({**system.network.state_dict(), **chosen.state})
    _log.info("%s", chosen.summary)


def _check_teacher(config: StageBKDRun, sizes: StageBConfig, teacher: FrozenStageB) -> None:
    """Refuse a teacher that is told, or says, something else than the student.

    Raises:
        UserError: Naming what differs.
    """
    for name in ("latent_channels", "compressed_channels", "text_pooled_channels"):
        ours, theirs = getattr(sizes, name), getattr(teacher.config, name)
        if ours != theirs:
            raise UserError(
                f"teacher.network {teacher.name}: its {name} is {theirs}, the student's {ours}: "
                "they are not told the same"
            )
    if DISTILLED_KEY in teacher.found.opened.metadata:
        raise UserError(
            f"teacher.network {teacher.name}: was distilled for few steps or a guidance scale; "
            "name the plain network that it was distilled from"
        )
    said = learned_diffusion(teacher.found.opened.metadata, str(teacher.found.path))
    for name in SAMPLED:
        if getattr(config.diffusion, name) != said[name]:
            raise UserError(
                f"diffusion.{name} is {getattr(config.diffusion, name)}, but {teacher.name} was "
                f"trained with {said[name]}: set that"
            )
