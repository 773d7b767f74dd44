"""What a teacher is worth: each arm beside the baseline that learned with the same operations.

``python -m train.study worth --study FOLDER [FOLDER ...] --baseline "real, nothing"`` reads the
rows of finished runs. An arm's teacher computes beside it; the baseline's curve, of its runs of
several budgets, says what the same operations buy without one: once as many as the arm's own, with
the teacher's left out, and once as many as both.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from cascade.config import not_among
from cascade.errors import UserError
from cascade.evaluate.results import check_alike
from train.study.folder import ROWS_FILE, RUNS, STUDY_FILE, read_own
from train.study.page import Block, Heading, Paragraph, Table
from train.study.rows import Row, figure_title, mean_and_spread, values_of

NEAR = 1.02
"""A budget is spent in whole steps: totals within 2 % of one another are the same."""
_BEYOND = "not run"

Curve = list[tuple[float, float]]
"""Operations and what they gave, in rising order, of one seed."""


def read_finished(folders: Sequence[Path]) -> list[Row]:
    """Return the judged rows of whole runs, each once; the first folder that has it counts.

    Raises:
        UserError: A folder has no runs, its budgets have the teachers in them, or runs were judged
            by unlike protocols.
    """
    found: dict[tuple[str, float, int], Row] = {}
    for folder in folders:
        files = sorted((folder / RUNS).glob(f"*/*/seed_*/{ROWS_FILE}"))
        if not files:
            raise UserError(f"--study {folder}: there is no finished run in it; name a study's own")
        budget = read_own(folder / STUDY_FILE, yaml.safe_load).get("budget") or {}
        if budget.get("teacher") == "counted":
            raise UserError(
                f"--study {folder}: its budgets have the teachers in them, so that its own report "
                "compares arms of as many operations; name one whose budget.teacher is apart"
            )
        for file in files:
            for row in _rows_of(file):
                if row["status"] == "judged" and row["fraction"] == 1.0:
                    found.setdefault((row["arm"], row["budget"], row["seed"]), row)
    rows = list(found.values())
    check_alike(rows, [f"{row['arm']}, {row['budget']:g}, seed {row['seed']}" for row in rows])
    return rows


def _rows_of(file: Path) -> list[Row]:
    try:
        rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: can't be read any more; delete it, and the study judges again"
        ) from error
    return rows


def at_total(curve: Curve, total: float) -> float | None:
    """Return what a curve says at a number of operations, linear in their logarithm.

    Args:
        curve: Of one seed.
        total: Operations.

    Returns:
        The value; None beyond what was run.
    """
    first, last = curve[0][0], curve[-1][0]
    if not first / NEAR <= total <= last * NEAR:
        return None
    total = min(max(total, first), last)
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if total <= x1:
            return y0 + (y1 - y0) * math.log(total / x0) / math.log(x1 / x0)
    return curve[-1][1]


def worth_blocks(rows: Sequence[Row], baseline: str, metrics: Sequence[str]) -> list[Block]:
    """Return a table for each figure: the arms, and the baseline with as many operations.

    Args:
        rows: See ``read_finished``.
        baseline: The arm that is measured against.
        metrics: Figures; empty: all that the baseline has.

    Raises:
        UserError: There is no such arm or figure, or no operations were counted.
    """
    _check_named("--baseline", baseline, [row["arm"] for row in rows])
    measured = [name for row in rows if row["arm"] == baseline for name in row["metrics"]]
    for name in metrics:
        _check_named("--metrics", name, measured)
    if any(row[whose]["flops"] is None for row in rows for whose in ("spent", "teacher")):
        raise UserError("--study: some runs have no counted operations; nothing can be compared")
    runs: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["arm"], row["budget"]), []).append(row)
    blocks: list[Block] = []
    for name in metrics or dict.fromkeys(measured):
        curves = _curves([row for row in rows if row["arm"] == baseline], name)
        head: tuple[str, ...] = ("arm", "seeds", "operations", "its teacher's")
        head += (figure_title(rows, name),)
        for total in ("its own", "both"):
            head += (f"{baseline}, as many as {total}", "difference")
        table = []
        for (arm, _), of_arm in runs.items():
            values = {row["seed"]: value for row in of_arm for value in values_of([row], name)}
            if not values:
                continue
            own, taught = (
                statistics.mean(row[whose]["flops"] for row in of_arm)
                for whose in ("spent", "teacher")
            )
            cells: tuple[str, ...] = (arm, str(len(values)), f"{own:.3g}", f"{taught:.3g}")
            cells += (mean_and_spread(list(values.values())),)
            for total in (own, own + taught):
                cells += ("", "") if arm == baseline else _beside(values, curves, total)
            table.append(cells)
        blocks += [Heading(figure_title(rows, name)), Table(head, tuple(table))]
    blocks.append(
        Paragraph(
            "Means and standard deviations over seeds; a difference is of the same seeds. The "
            "baseline's columns lie on the lines between its own runs, seed by seed, in the "
            f"logarithm of the operations; '{_BEYOND}' is beyond its runs."
        )
    )
    return blocks


def _check_named(option: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise not_among(option, name, dict.fromkeys(known))


def _curves(rows: Sequence[Row], metric: str) -> dict[int, Curve]:
    """Return a curve for each seed."""
    by_seed: dict[int, Curve] = {}
    for row in rows:
        if metric in row["metrics"]:
            total = row["spent"]["flops"] + row["teacher"]["flops"]
            by_seed.setdefault(row["seed"], []).append((total, row["metrics"][metric]["value"]))
    return {seed: sorted(curve) for seed, curve in by_seed.items()}


def _beside(
    values: Mapping[int, float], curves: Mapping[int, Curve], total: float
) -> tuple[str, str]:
    """Write what the baseline has at a number of operations, and how far an arm is from it."""
    found = {seed: at_total(curves[seed], total) for seed in values if seed in curves}
    same = {seed: value for seed, value in found.items() if value is not None}
    if not same:
        return _BEYOND, ""
    differences = [values[seed] - value for seed, value in same.items()]
    written = mean_and_spread(differences)
    sign = "" if written.startswith("-") else "+"
    return mean_and_spread(list(same.values())), sign + written
