"""A budget study's curves: quality against what was spent."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from train.study.page import Block, Heading, Paragraph, Picture
from train.study.plots import Axes, Line, Point, plot_lines
from train.study.rows import (
    UNIT_TITLES,
    Row,
    figure_title,
    interval_of,
    judged_rows,
    metric_names,
    values_of,
)
from train.study.settings import StudyConfig, arm_folder

PLOTS = "plots"
"""Folder of a study's plots."""


def curve_blocks(config: StudyConfig, rows: Sequence[Row], out: Path) -> list[Block]:
    """Write the plots of quality against what was spent, without and with the teacher's share.

    Args:
        config: The study.
        rows: Of ``results.jsonl``.
        out: The study's folder.
    """
    blocks: list[Block] = [Heading("Quality against budget")]
    unit = config.budget.unit
    missing = sorted({row["arm"] for row in rows if row["status"] == "no model yet"})
    told = []
    if len(config.evaluate_at) > 1:
        told.append(
            "Within a budget the learning rate is still high at the earlier points: what an arm "
            "would reach with so small a budget alone"
            + (
                " is what the smaller budget shows."
                if len(config.budget.amounts) > 1
                else ", only a smaller budget would show."
            )
        )
    if len(config.seeds) > 1:
        told.append(
            "A band is one standard deviation over the seeds; the small dots are the seeds."
        )
    else:
        told.append(
            "A band is what other pictures of the same models may give, as far as the figure "
            "tells it; there is one seed."
        )
    text = " ".join(told)
    if missing:
        text += (
            f" Points that are missing: {', '.join(missing)} had no whole model yet, the budget "
            "having gone to what the last training builds on."
        )
    if text:
        blocks.append(Paragraph(text.strip()))
    amounts, fractions = config.budget.amounts, config.evaluate_at
    # Judged at its end alone, a budget is a point: an arm's line goes from budget to budget.
    curves = [tuple((amount, one) for one in fractions) for amount in amounts]
    if len(fractions) == 1:
        curves = [tuple((amount, 1.0) for amount in sorted(amounts))]
    for name in metric_names(config, rows):
        lines = _lines(config, rows, name, curves)
        if lines:
            file = f"{PLOTS}/{arm_folder(name)}.svg"
            axes = Axes(UNIT_TITLES[unit] + " spent", figure_title(rows, name))
            plot_lines(out / file, lines, axes)
            blocks.append(Picture(file, f"{figure_title(rows, name)} against {UNIT_TITLES[unit]}"))
    return blocks + _with_teachers(config, rows, curves, out)


def _lines(
    config: StudyConfig,
    rows: Sequence[Row],
    name: str,
    curves: Sequence[Sequence[tuple[float, float]]],
    *,
    with_teacher: bool = False,
) -> list[Line]:
    """Return a figure's line of each arm, by what it has spent.

    Args:
        config: The study.
        rows: Of ``results.jsonl``.
        name: Of the figure.
        curves: The budgets and fractions that are joined.
        with_teacher: Whether what its teacher has cost is among what an arm has spent.
    """
    unit = config.budget.unit
    lines = []
    for style, curve in enumerate(curves):
        for colour, arm in enumerate(config.arms):
            points = []
            for amount, fraction in curve:
                judged = [
                    row
                    for row in judged_rows(rows, arm.name, amount, fraction)
                    if not with_teacher or row["teacher"][unit] is not None
                ]
                values = values_of(judged, name)
                if values:
                    spent = [
                        row["spent"][unit] + (row["teacher"][unit] if with_teacher else 0.0)
                        for row in judged
                    ]
                    interval = interval_of(judged[0], name) if len(values) == 1 else None
                    points.append(Point(statistics.mean(spent), tuple(values), interval))
            if points:
                label = arm.name if len(curves) == 1 else f"{arm.name}, {curve[0][0]:,g}"
                lines.append(Line(label, tuple(points), colour, style))
    return lines


def _with_teachers(
    config: StudyConfig,
    rows: Sequence[Row],
    curves: Sequence[Sequence[tuple[float, float]]],
    out: Path,
) -> list[Block]:
    """Return the same curves with the teacher's cost counted, where the budget leaves it out."""
    unit = config.budget.unit
    costs = [row["teacher"][unit] for row in rows if row["status"] == "judged"]
    if config.budget.teacher == "counted" or not any(costs):
        return []
    blocks: list[Block] = [
        Heading("Quality against budget and teacher"),
        Paragraph(
            "The same points, each as far to the right as its teacher has cost beside it: what was "
            "asked of it in the training, and the pictures that it drew. Its own training is not "
            "in it."
        ),
    ]
    for name in metric_names(config, rows):
        lines = _lines(config, rows, name, curves, with_teacher=True)
        if lines:
            title = f"{UNIT_TITLES[unit]}, the teacher's among them"
            file = f"{PLOTS}/{arm_folder(name)}_with_teacher.svg"
            plot_lines(out / file, lines, Axes(title, figure_title(rows, name)))
            blocks.append(Picture(file, f"{figure_title(rows, name)} against {title}"))
    return blocks
