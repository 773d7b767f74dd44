"""Makes a student of a teacher's U-Net: a file that loads as any U-Net, and a report beside it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import yaml
from torch import Tensor

from cascade.checkpoints.files import (
    assign_strictly,
    atomic_folder,
    atomic_write_text,
    build_on_meta,
    check_finite_weights,
    save_network,
)
from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network, weights_hash
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY, UNET_TEACHER_KEY
from stages.unet.compress import StudentPlan, plan_student
from stages.unet.inherit import InheritanceReport, inherit
from stages.unet.unet import UNet
from train.distill.plans import NamedRecipe, plan_metadata
from train.distill.student_report import report_lines, summary_lines

RECIPE_KEY = "cascade_student_recipe"
STUDENT_FILE = "student.safetensors"
REPORT_FILE = "report.txt"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Teacher:
    """A U-Net to make students of."""

    name: str
    """As the user named it."""
    found: FoundNetwork
    network: UNet
    """On the CPU in its file's number format, memory-mapped where it can be."""

    @functools.cached_property
    def weights_hash(self) -> str:
        """12 hex digits over the file it is in."""
        return weights_hash(self.found.path)

    def copy_on(self, device: torch.device, dtype: torch.dtype) -> UNet:
        """Return the network elsewhere or in another number format, to measure it."""
        network = build(self.found.opened, self.found.published, device=device, dtype=dtype)
        return cast(UNet, network)


@dataclass(frozen=True)
class Student:
    """What was made."""

    network: UNet
    """Its tensors are the teacher's own."""
    plan: StudentPlan
    report: InheritanceReport


def load_teacher(name: str) -> Teacher:
    """Load a teacher in any layout.

    Args:
        name: A file, a folder of diffusers or a model's, or a hub id, as ``find_network`` takes it.

    Raises:
        UserError: Nothing is there, no U-Net, or one whose weights are not finite.
    """
    found = find_network(name, "unet")
    network = cast(UNet, build(found.opened, found.published))
    check_finite_weights(network, name)
    return Teacher(name, found, network)


def make_student(teacher: Teacher, named: NamedRecipe) -> Student:
    """Apply a recipe to a teacher; no number is copied.

    Raises:
        UserError: They do not fit.
    """
    try:
        plan = plan_student(teacher.network.config, named.recipe)
    except ValueError as error:
        raise UserError(f"{named.name} does not fit {teacher.name}: {error}") from error
    return student_of(teacher.network.state_dict(), plan)


def student_of(teacher_state: Mapping[str, Tensor], plan: StudentPlan) -> Student:
    """Give the student of a plan its teacher's own tensors, with a report of each."""
    _, report = inherit(teacher_state, plan)
    return Student(network_of(teacher_state, plan), plan, report)


def network_of(teacher_state: Mapping[str, Tensor], plan: StudentPlan) -> UNet:
    """Build the network of a plan with its teacher's own tensors; strict."""
    network = build_on_meta(UNet, plan.student, "the plan")
    state = {name: teacher_state[plan.teacher_name(name)] for name in network.state_dict()}
    assign_strictly(network, state, "the plan")
    return network.eval()


def metadata_of(teacher: Teacher, named: NamedRecipe, plan: StudentPlan) -> dict[str, str]:
    """Return what a student's file says of where it comes from."""
    source = {"name": teacher.name, "weights_hash": teacher.weights_hash}
    said = teacher.found.opened.metadata
    return {
        **{key: said[key] for key in (UNET_DIFFUSION_KEY,) if key in said},
        **plan_metadata(plan),
        RECIPE_KEY: json.dumps(to_dict(named.recipe)),
        UNET_TEACHER_KEY: json.dumps(source),
    }


def write_student(
    teacher: Teacher,
    named: NamedRecipe,
    student: Student,
    out: Path,
    more: Sequence[str] = (),
) -> list[str]:
    """Write the student's file, its report and its recipe into a new folder.

    Args:
        teacher: The teacher.
        named: The recipe.
        student: What ``make_student`` made of them.
        out: The folder, which must not hold anything.
        more: More lines of the report, as of how the recipe was chosen.

    Returns:
        The summary, for the terminal.

    Raises:
        UserError: The folder is not empty or can't be made, or the disk is full.
    """
    check_new(out)
    path = teacher.found.path
    file = "" if path == Path(teacher.name) else f"{path}, "
    made_by = f"{named.name} of {teacher.name} ({file}weights {teacher.weights_hash})"
    summary = [made_by, "", *summary_lines(student.plan, student.report)]
    metadata = metadata_of(teacher, named, student.plan)
    with atomic_folder(out) as temporary:
        save_network(temporary / STUDENT_FILE, student.network, metadata=metadata)
        lines = [*summary, *more, "", *report_lines(student.report)]
        atomic_write_text(temporary / REPORT_FILE, "\n".join(lines) + "\n")
        header = f"# {made_by}: {student.report.student_parameters:,} parameters.\n"
        values = yaml.safe_dump(to_dict(named.recipe), sort_keys=False)
        atomic_write_text(temporary / RECIPE_FILE, header + values)
    return summary


def check_new(out: Path, option: str = "--out") -> None:
    """Refuse a folder that holds something already; the option is what names it.

    Raises:
        UserError: It does, or it is a file.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: something is there already; name a new folder with {option}")
