"""How a budget becomes steps: what a step takes is tried first, then the shares are dealt out."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_write_text
from cascade.config import apply_overrides, from_dict, read_yaml, to_dict
from cascade.errors import UserError
from train.study.settings import ArmConfig, BudgetConfig, StepConfig, StudyConfig, arm_folder
from train.study.spent import read_ledger, spent_by_command, spent_until
from train.study.steps import Commands, Places

_log = logging.getLogger(__name__)

CALIBRATION, SHARED = "calibration", "shared"
CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Rate:
    """What one step of a training takes."""

    device_seconds: float
    samples: float
    flops: float | None
    """None where it was not counted (torch.compile)."""
    teacher_device_seconds: float = 0.0
    """Of a teacher that is asked in the step; no part of ``device_seconds``."""
    teacher_flops: float | None = 0.0

    def takes(self, budget: BudgetConfig) -> float | None:
        """Return what a step takes of a budget; None where it was not counted."""
        own: float | None = getattr(self, budget.unit)
        if budget.teacher == "apart" or budget.unit == "samples":
            return own
        taught = self.teacher_flops if budget.unit == "flops" else self.teacher_device_seconds
        return None if own is None or taught is None else own + taught


@dataclass(frozen=True)
class ArmRates:
    """What the steps of an arm take."""

    trainings: dict[str, Rate]
    """By the step's name."""
    commands: dict[str, float]
    """Seconds."""
    command_flops: dict[str, float | None] = field(default_factory=dict)
    """None where it writes no ledger, so that they are not counted."""

    @property
    def device_seconds(self) -> float:
        """Of a step of each training; 0 where none was tried."""
        return sum(rate.device_seconds for rate in self.trainings.values())


@dataclass(frozen=True)
class Moment:
    """A fraction of the budget, and what had been learned by then."""

    fraction: float
    step: int | None
    """Of the last training; None: it had not begun, there is no model yet."""


@dataclass(frozen=True)
class ArmPlan:
    """What an arm does with a budget."""

    steps: dict[str, int]
    """Of each training, by its name."""
    moments: tuple[Moment, ...]

    @property
    def exports(self) -> tuple[int, ...]:
        """Steps of the last training whose weights are judged."""
        return tuple(sorted({one.step for one in self.moments if one.step is not None}))


def values_of(step: StepConfig) -> dict[str, Any]:
    """Return what the file of a training says, and what the study sets in it, but for places."""
    assert step.config is not None
    values: dict[str, Any] = read_yaml(step.config)
    plain = {key: value for key, value in step.set.items() if "{" not in str(value)}
    apply_overrides(values, [f"{key}={json.dumps(value)}" for key, value in plain.items()])
    return values


def check_warmup(arm: ArmConfig, plan: ArmPlan) -> None:
    """Refuse a plan that would compare warm-ups, which are as long for arms of dear steps.

    Raises:
        UserError: A third of a training's steps or more are warm-up.
    """
    for step in arm.steps:
        if step.train is None:
            continue
        told, steps = values_of(step).get("optim") or {}, plan.steps[step.name]
        warmup = told.get("warmup_steps")
        if told.get("warmup_fraction") is None and warmup is not None and 3 * warmup >= steps:
            raise UserError(
                f"{arm.name}: {step.name} gets {steps} steps, of which optim.warmup_steps, "
                f"{warmup}, are warm-up; raise budget.amounts, or give optim.warmup_fraction (0.05)"
            )


def samples_per_step(step: StepConfig) -> int:
    """Return what one step of a training sees on all devices, as its configuration says."""
    values = values_of(step)
    run, data = values.get("run") or {}, values.get("data") or {}
    if "batch_size" not in data:
        raise UserError(f"{step.config}: data.batch_size is missing; a study counts samples by it")
    devices = run.get("devices", 1) * run.get("num_nodes", 1)
    return int(data["batch_size"] * run.get("accumulate", 1) * devices)


def rates_of_samples(arm: ArmConfig) -> ArmRates:
    """Return what needs no trying: the samples of a step."""
    trainings = {
        step.name: Rate(0.0, samples_per_step(step), None)
        for step in arm.steps
        if step.train is not None
    }
    return ArmRates(trainings, {})


def calibrate(config: StudyConfig, arm: ArmConfig, out: Path, commands: Commands) -> ArmRates:
    """Try a few steps of each training of an arm, in order, and its commands; remembered in a file.

    A command that has a ``trial`` makes no more than that, in a place where nothing of the study
    is; what others share is made once, for the study.

    Raises:
        StepFailedError: A step can't be made.
    """
    trials = any(step.trial for one in config.arms for step in one.steps)
    shared = out / CALIBRATION / SHARED if trials else out / SHARED
    places = Places(out / CALIBRATION / arm_folder(arm.name), shared, config.seeds[0])
    file = places.here / CALIBRATION_FILE
    if file.is_file():
        return from_dict(ArmRates, json.loads(file.read_text(encoding="utf-8")), str(file))
    trainings: dict[str, Rate] = {}
    seconds: dict[str, float] = {}
    flops: dict[str, float | None] = {}
    steps = config.calibration_steps
    half = steps // 2
    for step in arm.steps:
        if step.command is not None:
            tried = replace(step, set={**step.set, **step.trial})
            took = commands.other(arm, tried, places)
            written = tried.set.get("out")
            folder = None if written is None else Path(places.of(step).fill(written))
            cost = spent_by_command(folder, took)
            seconds[step.name] = took / step.trial_part
            flops[step.name] = None if cost.flops is None else cost.flops / step.trial_part
            continue
        options = {
            "run.max_steps": steps,
            "run.log_every_steps": half,
            "run.checkpoint_every_steps": steps,
        }
        run = commands.train(arm, step, places, options)
        rows = read_ledger(run)
        # The first half is what is slow once: memory, kernels, the first batch.
        whole, first = spent_until(rows, 2 * half), spent_until(rows, half)
        taught, taught_first = (
            spent_until(rows, steps, whose="teacher") for steps in (2 * half, half)
        )
        trainings[step.name] = Rate(
            (whole.device_seconds - first.device_seconds) / half,
            (whole.samples - first.samples) / half,
            _per_step(whole.flops, first.flops, half),
            (taught.device_seconds - taught_first.device_seconds) / half,
            _per_step(taught.flops, taught_first.flops, half),
        )
    rates = ArmRates(trainings, seconds, flops)
    atomic_write_text(file, json.dumps(to_dict(rates), indent=2) + "\n")
    return rates


def _per_step(whole: float | None, first: float | None, steps: int) -> float | None:
    return None if whole is None or first is None else (whole - first) / steps


def overhead(arm: ArmConfig, rates: ArmRates, budget: BudgetConfig) -> float:
    """Return what an arm's commands take of its budget.

    In seconds they are its own commands and a counted teacher's; in operations the latter alone.

    Raises:
        UserError: A teacher's operations are to be counted, and are not.
    """
    payers = {"teacher"} if budget.teacher == "counted" else set()
    if budget.unit == "device_seconds":
        payers.add("arm")
    paid = 0.0
    for step in arm.steps:
        if step.command is None or step.cost not in payers:
            continue
        if budget.unit == "device_seconds":
            paid += rates.commands.get(step.name, 0.0)
            continue
        flops = rates.command_flops.get(step.name)
        if flops is None:
            raise UserError(
                f"{arm.name}: nobody counts the FLOPs of {step.name}, which writes no ledger; "
                "give budget.unit device_seconds, or budget.teacher apart"
            )
        paid += flops
    return paid


def plan_arm(
    arm: ArmConfig,
    amount: float,
    budget: BudgetConfig,
    rates: ArmRates,
    evaluate_at: tuple[float, ...],
) -> ArmPlan:
    """Deal a budget out.

    Args:
        arm: The arm.
        amount: Of the budget's unit.
        budget: What is counted.
        rates: What its steps take.
        evaluate_at: Fractions of the amount.

    Raises:
        UserError: A training would make no step.
    """
    paid = overhead(arm, rates, budget)
    left = amount - paid
    if left <= 0:
        raise UserError(
            f"{arm.name}: its commands take {paid:.4g} {budget.unit} and the budget is {amount:g}; "
            "raise budget.amounts, or make beforehand what can be given to every arm"
        )
    steps: dict[str, int] = {}
    per_step: dict[str, float] = {}
    for step in arm.steps:
        if step.train is None:
            continue
        takes = rates.trainings[step.name].takes(budget)
        if takes is None:
            raise UserError(
                f"{arm.name}: the FLOPs of {step.name} are not counted under run.compile; give "
                "budget.unit device_seconds or samples, or leave compile out"
            )
        # Up to what rounding makes of a whole number.
        count = math.floor(step.share * left / takes + 1e-9)
        if count < 1:
            raise UserError(
                f"{arm.name}: {step.name} gets {step.share * left:g} {budget.unit} and one step "
                f"takes {takes:g}; raise budget.amounts or its share"
            )
        steps[step.name], per_step[step.name] = count, takes
    last = arm.last
    before = amount - last.share * left
    moments = []
    for fraction in evaluate_at:
        reached = math.floor((fraction * amount - before) / per_step[last.name] + 1e-9)
        reached = steps[last.name] if fraction == 1 else min(reached, steps[last.name])
        moments.append(Moment(fraction, reached if reached >= 1 else None))
    return ArmPlan(steps, tuple(moments))


def seconds_of(plan: ArmPlan, arm: ArmConfig, rates: ArmRates) -> dict[str, float]:
    """Return the estimated seconds of each step of an arm."""
    found = {}
    for step in arm.steps:
        if step.train is None:
            found[step.name] = rates.commands.get(step.name, 0.0)
        else:
            rate = rates.trainings[step.name]
            each = rate.device_seconds + rate.teacher_device_seconds
            found[step.name] = plan.steps[step.name] * each
    return found


def plan_lines(
    config: StudyConfig, plans: Mapping[float, Mapping[str, ArmPlan]], rates: Mapping[str, ArmRates]
) -> list[str]:
    """Return the plan as a Markdown table."""
    lines = [
        "| budget | arm | step | share | steps | samples | estimated device seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    total, is_tried = 0.0, any(one.commands or one.device_seconds for one in rates.values())
    tried = [arm for arm in config.arms if arm.name in rates]
    for amount, by_arm in plans.items():
        for arm in tried:
            plan = by_arm[arm.name]
            seconds = seconds_of(plan, arm, rates[arm.name])
            for step in arm.steps:
                took = seconds[step.name]
                if step.train is None:
                    # What is shared is made once for the study.
                    paid = "" if step.cost == "arm" else f" ({step.cost})"
                    row = [f"{step.name}{paid}", "", "", ""]
                else:
                    count = plan.steps[step.name]
                    samples = count * rates[arm.name].trainings[step.name].samples
                    row = [step.name, f"{step.share:g}", f"{count:,}", f"{samples:,.0f}"]
                row += [f"{took:,.0f}" if is_tried else "not tried"]
                lines.append("| " + " | ".join([f"{amount:g}", arm.name, *row]) + " |")
                if not step.shared:
                    total += took * len(config.seeds)
    once = {
        step.name: rates[arm.name].commands.get(step.name, 0.0)
        for arm in tried
        for step in arm.steps
        if step.shared
    }
    total += sum(once.values())
    if not is_tried:
        return [*lines, "", "A budget of samples needs no trying; --dry-run tells the seconds."]
    lines += [
        "",
        f"{len(config.seeds)} seeds: about {total:,.0f} device seconds of training and "
        f"commands ({total / 3600:.2f} device hours); judging comes on top.",
    ]
    if config.price_per_device_hour is not None:
        lines[-1] += f" At {config.price_per_device_hour:g} a device hour: "
        lines[-1] += f"{total / 3600 * config.price_per_device_hour:,.2f}."
    return lines
