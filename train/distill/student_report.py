"""What became of a teacher's tensors, in lines to read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from stages.unet.compress import Recipe, StudentPlan, plan_student
from stages.unet.inherit import InheritanceReport, stage_of


def summary_lines(plan: StudentPlan, report: InheritanceReport) -> list[str]:
    """Return parameters before and after, and what goes, by the teacher's stage."""
    before, after = report.teacher_parameters, report.student_parameters
    gone = removed_modules(plan)
    rows = [("stage", "teacher", "student", "removed", "what goes")]
    for stage, (theirs, own) in report.by_stage().items():
        names = [name for name in gone if stage_of(name) == stage]
        inside = [name.removeprefix(stage).removeprefix(".") for name in names]
        what = "all of it" if stage in gone else ", ".join(_ranges(inside))
        rows.append((stage, f"{theirs:,}", f"{own:,}", f"{theirs - own:,}", what))
    rows.append(("all", f"{before:,}", f"{after:,}", f"{before - after:,}", ""))
    nothing = [] if gone else ["the recipe removes nothing: the student is its teacher", ""]
    return [
        *nothing,
        f"{before:,} -> {after:,} parameters ({_percent(after / before)} of the teacher), "
        f"{plan.teacher.num_transformer_blocks} -> {plan.student.num_transformer_blocks} "
        f"transformer blocks, {len(report.inherited) + len(report.left_out)} -> "
        f"{len(report.inherited)} tensors",
        "",
        *table(rows),
    ]


def report_lines(report: InheritanceReport) -> list[str]:
    """Return every tensor of the student with its origin, and every one that is left out."""
    inherited = [("student", "teacher", "shape")]
    inherited += [
        (one.name, "the same" if one.origin == one.name else one.origin, _sides(one.shape))
        for one in report.inherited
    ]
    left_out = [("teacher", "shape")]
    left_out += [(one.name, _sides(one.shape)) for one in report.left_out]
    return [
        f"inherited: {len(report.inherited)} tensors, {report.student_parameters:,} parameters",
        *table(inherited),
        "",
        f"left out: {len(report.left_out)} tensors, {report.left_out_parameters:,} parameters",
        *(table(left_out) if report.left_out else ()),
    ]


def removed_modules(plan: StudentPlan) -> list[str]:
    """Return the teacher's modules that go; of one that goes whole, not what is in it."""
    gone = set(plan_student(plan.teacher, Recipe()).origins) - set(plan.origins.values())

    def is_inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in gone for end in range(1, len(parts)))

    return [
        name
        for name in plan_student(plan.teacher, Recipe()).origins
        if name in gone and not is_inside(name)
    ]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned columns; those whose cells are numbers are aligned to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(re.fullmatch(r"[\d.,%-]+", cell) for cell in column[1:]) for column in columns]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]


def _ranges(names: Iterable[str]) -> list[str]:
    """Join names that differ in their last number: ``a.5, a.6, a.7`` is ``a.5-7``."""
    found: list[tuple[str, int, int]] = []
    for name in names:
        stem, _, last = name.rpartition(".")
        number = int(last)
        if found and found[-1][0] == stem and found[-1][2] == number - 1:
            found[-1] = (stem, found[-1][1], number)
        else:
            found.append((stem, number, number))
    return [f"{stem}.{a}" if a == b else f"{stem}.{a}-{b}" for stem, a, b in found]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
