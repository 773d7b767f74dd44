"""Where each module of a student came from: by the recipe that made it, or as its file says."""

from __future__ import annotations

import json
from pathlib import Path

from cascade.checkpoints.part_files import find_network
from cascade.config import from_dict, load_yaml, nearest, to_dict
from cascade.errors import UserError
from stages.unet.compress import PUBLISHED, Recipe, StudentPlan, plan_student
from stages.unet.config import UNetConfig

STUDENT_KEY = "cascade_student"
"""Metadata of a student's file: its plan."""


def read_recipe(name: str) -> Recipe:
    """Return a published recipe, or a YAML file's.

    Raises:
        UserError: It is neither.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if Path(name).is_file():
        return load_yaml(Recipe, name)
    like = nearest(name, PUBLISHED)
    hint = f"; did you mean {like}?" if like else ""
    raise UserError(
        f"{name}: neither a YAML file nor a known recipe ({', '.join(PUBLISHED)}){hint}"
    )


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
            plan = plan_student(teacher, read_recipe(recipe))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    elif init_from is None:
        raise UserError(
            "distill.recipe is missing: which of the teacher's features does a student imitate "
            "that starts from nothing?"
        )
    else:
        where = f"init_from {init_from}"
        text = find_network(init_from, "unet").opened.metadata.get(STUDENT_KEY)
        if text is None:
            raise UserError(
                f"{where}: does not say how it was cut out of its teacher; name the recipe as "
                "distill.recipe"
            )
        plan = from_dict(StudentPlan, json.loads(text), where)
    for which, wanted, found in (
        ("student", student, plan.student),
        ("teacher", teacher, plan.teacher),
    ):
        if wanted != found:
            raise UserError(f"{where}: its {which} has other sizes than this run's {which}")
    return plan
