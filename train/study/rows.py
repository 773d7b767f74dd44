"""What the rows of a study say, as its reports read them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train.study.settings import StudyConfig

Row = Mapping[str, Any]
UNIT_TITLES = {
    "device_seconds": "device seconds",
    "samples": "samples",
    "flops": "FLOPs",
}


def metric_names(config: StudyConfig, rows: Sequence[Row]) -> list[str]:
    """Return the figures that are shown: the headline's, or all that were measured."""
    found = dict.fromkeys(name for row in rows for name in row.get("metrics", {}))
    return [name for name in config.headline if name in found] or list(found)


def mean_and_spread(values: Sequence[float]) -> str:
    """Write a mean with the standard deviation over seeds; of one seed there is none."""
    # Twelve digits: what differences of binary fractions leave of nothing is 0, not -3e-17.
    mean = round(statistics.mean(values), 12) + 0.0
    if len(values) == 1:
        return f"{mean:.4g}"
    return f"{mean:.4g} ± {round(statistics.stdev(values), 12):.2g}"


def rows_of(rows: Sequence[Row], arm: str, amount: float, fraction: float) -> list[Row]:
    """Return the rows of an arm's runs at a fraction of a budget."""
    return [
        row
        for row in rows
        if row["arm"] == arm and row["budget"] == amount and row["fraction"] == fraction
    ]


def judged_rows(rows: Sequence[Row], arm: str, amount: float, fraction: float) -> list[Row]:
    """Return those of them that have been judged."""
    return [row for row in rows_of(rows, arm, amount, fraction) if row["status"] == "judged"]


def values_of(rows: Sequence[Row], name: str) -> list[float]:
    """Return what each row measured of a figure."""
    return [row["metrics"][name]["value"] for row in rows if name in row["metrics"]]


def interval_of(row: Row, name: str) -> tuple[float, float] | None:
    """Return within what a row's figure lies, by its pictures; None: it does not tell."""
    figure = row["metrics"].get(name, {})
    low, high, spread = (figure.get(key) for key in ("low", "high", "spread"))
    if low is not None and high is not None:
        return float(low), float(high)
    if spread is not None:
        return figure["value"] - spread, figure["value"] + spread
    return None


def some_figure(rows: Sequence[Row], name: str) -> Mapping[str, Any]:
    """Return what some row says of a figure that at least one has."""
    found: Mapping[str, Any] = next(
        row["metrics"][name] for row in rows if name in row.get("metrics", {})
    )
    return found


def figure_title(rows: Sequence[Row], name: str) -> str:
    """Return a figure's name with an arrow to where it is better."""
    figure = some_figure(rows, name)
    return f"{figure['label']} {'↑' if figure['better'] == 'higher' else '↓'}"


def mean_cost(costs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """Write the mean of a cost, where it was counted."""
    values = [cost[key] for cost in costs if cost.get(key) is not None]
    if not costs:
        return ""
    return format(statistics.mean(values), form) if values else "not counted"
