"""Where each module of a student came from: by the recipe that made it, or as its file says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.part_files import find_network
from cascade.config import from_dict, load_yaml, not_among, to_dict
from cascade.errors import UserError
from stages.unet.compress import PUBLISHED, Recipe, StudentPlan, plan_student
from stages.unet.config import UNetConfig

STUDENT_KEY = "cascade_student"
"""Metadata of a student's file: its plan, which says whose features it imitates."""


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe, and what it is called in reports."""

    name: str
    recipe: Recipe


def read_recipe(name: str) -> NamedRecipe:
    """Return a published recipe, or that of a YAML file.

    Raises:
        UserError: There is no such recipe (the nearest is named), or the file is not one.
    """
    if name in PUBLISHED:
        return NamedRecipe(name, PUBLISHED[name])
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return NamedRecipe(name, load_yaml(Recipe, path))
    raise not_among("no recipe", name, (*PUBLISHED, "auto", "a file as my.yaml"))


def read_plan(metadata: Mapping[str, str], where: str) -> StudentPlan:
    """Read the plan that a student's file carries.

    Args:
        metadata: Metadata of the file.
        where: Its name, for errors.

    Raises:
        UserError: It carries none, or a broken one.
    """
    if STUDENT_KEY not in metadata:
        raise UserError(f"{where}: no student made by `python -m train.distill make-student`")
    try:
        values = json.loads(metadata[STUDENT_KEY])
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: its plan is not valid JSON ({error}); make it again") from error
    return from_dict(StudentPlan, values, f"{where} (plan)")


def plan_metadata(plan: StudentPlan) -> dict[str, str]:
    """Return what a student's file says of its plan."""
    return {STUDENT_KEY: json.dumps(to_dict(plan))}


def plan_of(
    init_from: str | None, recipe: str | None, *, student: UNetConfig, teacher: UNetConfig
) -> StudentPlan:
    """Return where each module of a student came from.

    Args:
        init_from: What the student started with, whose file may say it.
        recipe: The recipe that made it; None: the file says it.
        student: Its sizes.
        teacher: The teacher's.

    Raises:
        UserError: Nothing says it, or it is another student's or another teacher's.
    """
    if recipe is not None:
        where = f"distill.recipe {recipe}"
        try:
            plan = plan_student(teacher, read_recipe(recipe).recipe)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    elif init_from is None:
        raise UserError(
            "distill.recipe is missing: which of the teacher's features does a student imitate "
            "that starts from nothing?"
        )
    else:
        where = f"init_from {init_from}"
        metadata = find_network(init_from, "unet").opened.metadata
        if STUDENT_KEY not in metadata:
            raise UserError(
                f"{where}: does not say how it was cut out of its teacher; name the recipe as "
                "distill.recipe"
            )
        plan = read_plan(metadata, where)
    for which, wanted, found in (
        ("student", student, plan.student),
        ("teacher", teacher, plan.teacher),
    ):
        if wanted != found:
            raise UserError(
                f"{where}: cut out of another network: its {which} has other sizes than this run's "
                f"{which}; name the teacher that it was made of as distill.teacher, or a recipe "
                "that fits as distill.recipe"
            )
    return plan
