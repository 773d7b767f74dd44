"""What ``python -m train step_distil`` does: find the teacher, make its student, fit."""

from __future__ import annotations

import logging

import torch

from cascade.checkpoints.part_files import weights_hash
from cascade.errors import UserError
from stages.stage_c import StageCConfig
from train.data.open import open_data
from train.distill.few_steps_student import copy_teacher, student_config
from train.distill.stage_teacher import StageTeacher
from train.encode import FrozenPaths
from train.fit import prepare
from train.initial import start_from
from train.runs import check_width, fit_system
from train.systems.step_distil import StepDistilSystem
from train.systems.step_distil_config import StepDistilRun

_log = logging.getLogger(__name__)


def train_step_distil(config: StepDistilRun, *, resume: bool) -> None:
    """Distill a stage's guidance or steps.

    Raises:
        UserError: The teacher, the data and the student do not belong together.
    """
    teacher = StageTeacher(config.teacher, config.stage, config.teacher_dtype, config.taught)
    teacher.check_guidance(config.guidance.low, config.guidance.high)
    sizes = student_config(
        teacher.config, told_guidance=config.guidance.is_told, time_unit=config.time_unit
    )
    prepared = prepare(config.run, config, resume=resume)
    theirs = teacher.config
    frozen = FrozenPaths(
        text=config.text,
        text_states=config.text_states,
        text_width=theirs.text_channels if isinstance(theirs, StageCConfig) else None,
        stage_a=config.stage_a,
        stage_a_scale=config.stage_a_scale,
        compressor=config.compressor,
    )
    data = open_data(config.data, frozen, pixels=False)
    assert data.null_text is not None, "open_data gives the null text with the text part"
    hidden, pooled = (one.shape[-1] for one in data.null_text)
    if isinstance(theirs, StageCConfig):
        check_width("the teacher's text_channels", theirs.text_channels, hidden)
    check_width("the teacher's text_pooled_channels", theirs.text_pooled_channels, pooled)
    try:
        system = StepDistilSystem(config, sizes, teacher, data.null_text)
    except ValueError as error:
        raise UserError(f"adversarial.blocks: {error}") from error
    if prepared.newest is None:
        if config.init_from is not None:
            start_from(system.network, config.init_from, config.stage, "this run's teacher")
        else:
            _start_from_teacher(system, teacher)
    fit_system(system, data.taught_by(weights_hash(teacher.file)), config, prepared)


def _start_from_teacher(system: StepDistilSystem, teacher: StageTeacher) -> None:
    """Give a student its teacher's weights, and say how closely its time is fitted."""
    missed = copy_teacher(teacher.load(torch.device("cpu")), system.network)
    if missed > 0:
        _log.info(
            "time_unit %g: slow waves give %.1f %% of the teacher's time modulations",
            system.config.time_unit,
            100.0 * (1.0 - missed**2),
        )
