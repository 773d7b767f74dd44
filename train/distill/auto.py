"""The automatic recipe: what goes is what the output misses least, until a budget is met."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import UserError
from stages.unet.compress import PUBLISHED, Recipe, StudentPlan, plan_student
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from train.distill.calibration import Calibration
from train.distill.importance import (
    Cost,
    MeasuredUnit,
    Unit,
    choose,
    measure,
    output_error,
    recipe_of,
    removable_units,
)
from train.distill.latency import compare_seconds, shares_of_modules
from train.distill.make_student import network_of
from train.distill.student_report import table

_log = logging.getLogger(__name__)

_TRIES = 8
_MARGIN = 0.98
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}


@dataclass(frozen=True)
class Budget:
    """What a student may cost; one of the two."""

    parameters: int | None = None
    """Its parameters."""
    latency: float | None = None
    """The duration of one call, as a share of the teacher's."""


@dataclass(frozen=True)
class Bench:
    """Where and how outputs and durations are measured."""

    calibration: Calibration
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    """Latents in one call, of outputs as of durations."""
    repeats: int
    """Calls of which the median counts as a duration."""


_IDLE_ERROR, _IDLE_KEPT = 1e-3, 0.75
"""A student of less than three quarters that answers as its teacher does, before any training."""


@dataclass(frozen=True)
class Saving:
    """What is saved, and how tables show it."""

    title: str
    shown: str
    """How a number of it is formatted."""
    rate_title: str
    rate_unit: float
    """Errors are shown for so much saved."""
    cost: Cost


@dataclass(frozen=True)
class AutoChoice:
    """A recipe that was measured, and what it was chosen by."""

    recipe: Recipe
    summary: tuple[str, ...]
    """How well it does, in lines to read."""
    importance: tuple[str, ...]
    """Table of all units, the least important per parameter first."""


def parse_parameters(text: str, teacher: int) -> int:
    """Read a number of parameters: ``700M``, ``1.2B``, ``782822724``, or ``30%`` of the teacher's.

    Raises:
        UserError: It is none, or not below the teacher's.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMBG%]?)", text.strip().upper())
    if match is None:
        raise UserError(f"--max-params {text}: a number as 700M, 1.2B or 30% is needed")
    number, unit = float(match[1]), match[2]
    found = math.floor(number / 100 * teacher if unit == "%" else number * _UNITS[unit])
    if not 0 < found < teacher:
        raise UserError(f"--max-params {text}: must lie between 0 and the teacher's {teacher:,}")
    return found


def parse_share(text: str) -> float:
    """Read a share: ``50%`` or ``0.5``.

    Raises:
        UserError: It is none, or not between 0 and 1.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise UserError(f"--max-latency {text}: a share of the teacher's as 50% or 0.5 is needed")
    return share


def choose_recipe(teacher: UNet, budget: Budget, bench: Bench) -> AutoChoice:
    """Measure what each unit of a teacher is worth, and remove the least worthy.

    Args:
        teacher: The teacher, on the bench's device and in its number format.
        budget: What the student may cost.
        bench: How to measure.

    Raises:
        UserError: Nothing can be measured, or no student meets the budget.
    """
    calibration, config = bench.calibration, teacher.config
    state = teacher.state_dict()
    units, parameters = removable_units(config), _parameters(config, state)
    if budget.parameters is not None:  # asked for too little: told before minutes of measuring
        _choose(config, [MeasuredUnit(one, 0.0) for one in units], parameters, budget.parameters)
    predict = calibration.predictor(bench.device, bench.dtype, bench.batch_size)
    expected = predict(teacher)
    _log.info("measuring %d units of the teacher on %s", len(units), calibration.described)

    def predict_without(recipe: Recipe) -> Tensor:
        return predict(network_of(state, plan_student(config, recipe)))

    try:
        output_error(expected, expected)  # finite, and not zero
        measured = measure(units, predict_without, expected)
    except ValueError as error:
        raise UserError(f"--recipe auto: {error}") from error
    lines: list[str] = []
    saving = Saving("parameters", "{:,.0f}", "error per 1M", 1e6, parameters)
    if budget.parameters is not None:
        chosen = _choose(config, measured, parameters, budget.parameters)
    else:
        assert budget.latency is not None, "a budget of one kind"
        shares = shares_of_modules(teacher, lambda: predict(teacher), bench.device, bench.repeats)
        saving = Saving("% of time", "{:.2f}", "error per 1%", 1.0, _percent_of_time(shares))
        chosen, lines = _choose_by_latency(teacher, measured, budget.latency, bench, saving.cost)
    recipe = recipe_of(config, chosen)
    plan = plan_student(config, recipe)
    own_error = output_error(predict_without(recipe), expected)
    format_name = str(bench.dtype).removeprefix("torch.")
    summary = [
        f"chosen by importance, on {calibration.described}; {format_name} on {bench.device}",
        f"output error before any training: {own_error:.4f} (squared, as a share of the teacher's)",
        *_idle(own_error, parameters(plan) / parameters(plan_student(config, Recipe()))),
        *_hand_made(
            config, parameters, plan, lambda one: output_error(predict_without(one), expected)
        ),
        *lines,
    ]
    return AutoChoice(recipe, tuple(summary), tuple(_table(config, measured, saving, plan)))


def _idle(error: float, kept: float) -> list[str]:
    """Return a warning of a teacher that has learned without what went."""
    if error >= _IDLE_ERROR or kept > _IDLE_KEPT:
        return []
    return [
        f"the teacher hardly uses the {1 - kept:.0%} that went: was it trained well? With too high "
        "a rate or too little weight decay the streams of the inner levels outgrow what their "
        "layers add"
    ]


def _parameters(config: UNetConfig, state: Mapping[str, Tensor]) -> Cost:
    """Return a function that counts a student's parameters."""
    own: dict[str, int] = {path: 0 for path in plan_student(config, Recipe()).origins}
    for name, tensor in state.items():
        path = name.rpartition(".")[0]
        while path not in own:
            path = path.rpartition(".")[0]
        own[path] += tensor.numel()
    return lambda plan: sum(own[origin] for origin in plan.origins.values())


def _choose(
    config: UNetConfig,
    measured: Sequence[MeasuredUnit],
    cost: Cost,
    budget: float,
) -> tuple[Unit, ...]:
    try:
        return choose(config, measured, cost, budget)
    except ValueError as error:
        raise UserError(f"--recipe auto: no student meets {budget:g}: {error}") from error


def _percent_of_time(shares: Mapping[str, float]) -> Cost:
    """Return a function that estimates a student's duration, in percent of the teacher's."""
    return lambda plan: 100 * (shares[""] + sum(shares[one] for one in plan.origins.values()))


def _choose_by_latency(
    teacher: UNet,
    measured: Sequence[MeasuredUnit],
    share: float,
    bench: Bench,
    cost: Cost,
) -> tuple[tuple[Unit, ...], list[str]]:
    """Choose by the modules' shares of a call, then by what the student really takes."""
    config, state = teacher.config, teacher.state_dict()
    predict = bench.calibration.predictor(bench.device, bench.dtype, bench.batch_size)
    aim = 100 * share
    for _ in range(_TRIES):
        chosen = _choose(config, measured, cost, aim)
        plan = plan_student(config, recipe_of(config, chosen))
        student = network_of(state, plan)
        whole, own = compare_seconds(
            lambda: predict(teacher),
            lambda student=student: predict(student),  # type: ignore[misc]
            bench.device,
            bench.repeats,
        )
        found = own / whole
        _log.info("a student of an estimated %.1f%% takes %.1f%%", cost(plan), 100 * found)
        if found <= share:
            height, width = bench.calibration.x_t.shape[-2:]
            line = (
                f"its duration: {100 * found:.1f}% of the teacher's {whole:.3f} s for "
                f"{len(bench.calibration.x_t)} latents of {height}x{width}, {bench.batch_size} at "
                f"once, the fastest of {bench.repeats}"
            )
            return chosen, [line]
        aim = min(aim, cost(plan)) * min(_MARGIN, share / found)
    raise UserError(
        f"--max-latency: after {_TRIES} choices the student still takes {100 * found:.1f}% of the "
        "teacher's time; allow more, or measure on an idle machine"
    )


def _hand_made(
    config: UNetConfig,
    parameters: Cost,
    plan: StudentPlan,
    error: Callable[[Recipe], float],
) -> list[str]:
    """Compare with the published recipe whose student's size is nearest."""
    fitting = {}
    for name, recipe in PUBLISHED.items():
        try:
            fitting[name] = plan_student(config, recipe)
        except ValueError:
            continue  # of another teacher
    if not fitting:
        return ["no published recipe fits this teacher, to compare with"]
    own = parameters(plan)
    name = min(fitting, key=lambda one: abs(math.log(parameters(fitting[one]) / own)))
    theirs = parameters(fitting[name])
    return [
        f"the nearest hand-made recipe, {name}: {error(PUBLISHED[name]):.4f} with "
        f"{theirs:,} parameters (the student's {own:,})"
    ]


def _table(
    config: UNetConfig, measured: Sequence[MeasuredUnit], saving: Saving, plan: StudentPlan
) -> list[str]:
    """Return every unit's importance, the least important for what it saves first."""
    whole = plan_student(config, Recipe())
    kept = set(plan.origins.values())
    rows: list[tuple[float, tuple[str, ...]]] = []
    for one in measured:
        alone = plan_student(config, one.unit.recipe)
        saved = saving.cost(whole) - saving.cost(alone)
        rate = one.error / saved * saving.rate_unit if saved > 0 else math.inf
        gone = set(whole.origins) - set(alone.origins.values())
        left = len(gone & kept)
        state = "removed" if not left else "in part" if left < len(gone) else ""
        cells = (str(one.unit), f"{one.error:.3g}", saving.shown.format(saved), f"{rate:.3g}")
        rows.append((rate, (*cells, state)))
    rows.sort(key=lambda row: row[0])
    head = ("unit", "error without it", saving.title, saving.rate_title, "")
    return table([head, *(cells for _, cells in rows)])
