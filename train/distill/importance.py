"""What of a U-Net costs least when it goes: measured by the output, chosen greedily.

Each unit that can go is removed alone and once; the errors that this makes in the output are taken
to add up. Nothing here knows files, devices or schedules.

Reference: Zhang et al., 2024, LAPTOP-Diff, arXiv:2404.11098, section 3.1 (the criterion: the error
of the output when one layer is removed, which is nearly additive).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from stages.unet.compress import Recipe, StudentPlan, plan_student
from stages.unet.config import UNetConfig

Cost = Callable[[StudentPlan], float]
"""What a student costs, in parameters or in time; the more it keeps, the more."""


@dataclass(frozen=True)
class Unit:
    """What can go by itself, leaving a U-Net."""

    remove: tuple[str, ...]
    """The teacher's modules that go together."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that removes this alone."""
        return Recipe(self.remove)

    def __str__(self) -> str:
        """Return the modules' paths."""
        return " + ".join(self.remove)


@dataclass(frozen=True)
class MeasuredUnit:
    """A unit, and how much the output minds."""

    unit: Unit
    error: float
    """See ``output_error``: of the student that lacks this unit alone."""


def removable_units(teacher: UNetConfig) -> tuple[Unit, ...]:
    """Return all units of a U-Net, in running order.

    A unit is a transformer block; a whole attention; a resnet of the way down with one of the way
    up, each with its attention, of the pairs that leave resnets that read what they did; the
    middle, or all of it but one resnet; the deepest level.
    """
    return tuple(unit for unit in _units(teacher) if _plan(teacher, [unit]) is not None)


def output_error(found: Tensor, expected: Tensor) -> float:
    """Return the squared error, as a share of what was expected; the mean over the batch.

    Args:
        found: Output of a student, ``(B, ...)``.
        expected: Output of the teacher for the same input.

    Raises:
        ValueError: An expected output is all zero, as a new network's, or one is not finite.
    """
    difference = (found.double() - expected.double()).flatten(1).square().sum(1)
    scale = expected.double().flatten(1).square().sum(1)
    if not bool(scale.all()):
        raise ValueError("the teacher predicts zeros alone, as a network that learned nothing")
    error = float((difference / scale).mean())
    if not math.isfinite(error):
        raise ValueError("an output is not finite; measure in float32")
    return error


def measure(
    units: Iterable[Unit], predict: Callable[[Recipe], Tensor], expected: Tensor
) -> tuple[MeasuredUnit, ...]:
    """Measure what each unit's absence does to the output.

    Args:
        units: The units.
        predict: Returns the output ``(B, ...)`` of the student of a recipe, for one batch.
        expected: The teacher's output for that batch.
    """
    return tuple(MeasuredUnit(unit, output_error(predict(unit.recipe), expected)) for unit in units)


def choose(
    teacher: UNetConfig, measured: Sequence[MeasuredUnit], cost: Cost, budget: float
) -> tuple[Unit, ...]:
    """Remove what adds least error for what it saves, until the budget is met.

    Of a unit of which parts are gone already, what is left is taken to add the same error for what
    it saves. At the end the units without which the budget is met as well are given back, the
    most important first.

    Args:
        teacher: Sizes of the teacher.
        measured: The units that may go.
        cost: What a student costs.
        budget: What it may cost.

    Returns:
        The units that go, by importance, the least first.

    Raises:
        ValueError: With all that can go gone, a student costs more than that.
    """
    whole = cost(plan_student(teacher, Recipe()))

    def rate(one: MeasuredUnit) -> float:
        saved = whole - cost(plan_student(teacher, one.unit.recipe))
        return one.error / saved if saved > 0 else float("inf")

    order = sorted(measured, key=rate)  # stable: equal ones in running order
    chosen: list[Unit] = []
    spent = whole
    for one in order:
        if spent <= budget:
            break
        plan = _plan(teacher, [*chosen, one.unit])
        if plan is not None and cost(plan) < spent:
            chosen.append(one.unit)
            spent = cost(plan)
    if spent > budget:
        raise ValueError(f"the smallest student that can be made so costs {spent:g} of {whole:g}")
    errors = {one.unit: one.error for one in measured}
    for unit in sorted(chosen, key=lambda unit: -errors[unit]):
        fewer = [other for other in chosen if other != unit]
        plan = _plan(teacher, fewer)
        if plan is not None and cost(plan) <= budget:
            chosen = fewer
    return tuple(chosen)


def recipe_of(teacher: UNetConfig, units: Iterable[Unit]) -> Recipe:
    """Return the recipe that removes all of the units, without what goes with something else."""
    paths = sorted({path for unit in units for path in unit.remove})
    plan = plan_student(teacher, Recipe(tuple(paths)))
    for path in sorted(paths, key=lambda path: -path.count(".")):
        fewer = [other for other in paths if other != path]
        try:
            same = plan_student(teacher, Recipe(tuple(fewer))) == plan
        except ValueError:
            continue
        paths = fewer if same else paths
    return Recipe(tuple(paths))


def _plan(teacher: UNetConfig, units: Sequence[Unit]) -> StudentPlan | None:
    """Return the student without these units; None if they do not go together."""
    try:
        plan = plan_student(teacher, Recipe(tuple(path for unit in units for path in unit.remove)))
    except ValueError:
        return None
    if len(units) > 1:
        apart = frozenset[str]().union(*(_lost(teacher, unit) for unit in units))
        # With the last block of an attention goes all of it, which is a unit of its own.
        if _missing(plan) != apart:
            return None
    return plan


@functools.lru_cache(maxsize=1024)
def _lost(teacher: UNetConfig, unit: Unit) -> frozenset[str]:
    return _missing(plan_student(teacher, unit.recipe))


def _missing(plan: StudentPlan) -> frozenset[str]:
    """Return the teacher's modules that a student does without."""
    whole = plan_student(plan.teacher, Recipe())
    return frozenset(whole.origins) - frozenset(plan.origins.values())


def _units(teacher: UNetConfig) -> Iterator[Unit]:
    last = len(teacher.channels) - 1
    for level, depths in enumerate(teacher.down_depths):
        yield from _stacks(f"down_blocks.{level}", depths)
    if teacher.mid_depth is not None:
        yield from _blocks("mid_block.attentions.0", teacher.mid_depth)
        if teacher.mid_depth:
            yield Unit(("mid_block.attentions.0", "mid_block.resnets.1"))
        yield Unit(("mid_block",))
    for index, depths in enumerate(teacher.up_depths):
        yield from _stacks(f"up_blocks.{index}", depths)
    for level, depths in enumerate(teacher.down_depths):
        index = last - level
        for down in range(len(depths)):
            for up in range(len(teacher.up_depths[index])):
                pair = (f"down_blocks.{level}.resnets.{down}", f"up_blocks.{index}.resnets.{up}")
                yield Unit(pair)
    yield Unit((f"down_blocks.{last}", "up_blocks.0"))


def _stacks(block: str, depths: tuple[int, ...]) -> Iterator[Unit]:
    for layer, depth in enumerate(depths):
        if depth:
            yield from _blocks(f"{block}.attentions.{layer}", depth)
            yield Unit((f"{block}.attentions.{layer}",))


def _blocks(stack: str, depth: int) -> Iterator[Unit]:
    for number in range(depth if depth > 1 else 0):
        yield Unit((f"{stack}.transformer_blocks.{number}",))
