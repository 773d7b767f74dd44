"""Plots of a study as SVG files: curves with error bands, and scatters with their Pareto front.

The same values give the same file, byte by byte.
"""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_write_bytes
from cascade.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's, which people who see colours otherwise can tell apart."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLES = ("-", "--", ":", "-.")
_SIZE_INCHES = (8.6, 4.2)


@dataclass(frozen=True)
class Point:
    """A place on the horizontal axis, and what each seed measured there."""

    x: float
    values: tuple[float, ...]
    interval: tuple[float, float] | None = None
    """Of one seed: what other pictures of it may give; None: not known."""

    @property
    def band(self) -> tuple[float, float]:
        """One standard deviation over the seeds to both sides; of one seed ``interval``."""
        if len(self.values) == 1 and self.interval is not None:
            return self.interval
        return self.mean - self.spread, self.mean + self.spread

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 of one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Line:
    """A curve, or with one point a mark."""

    name: str
    points: tuple[Point, ...]
    colour: int
    """Which of the colours and marks."""
    style: int = 0
    """Which of the strokes."""


@dataclass(frozen=True)
class Axes:
    """What a plot's axes say."""

    x: str
    y: str
    log_x: bool = False
    marked_x: float | None = None
    """A place on the horizontal axis that a line marks."""
    marked: str = ""
    """What the legend calls it."""


def plot_lines(path: Path, lines: Sequence[Line], axes: Axes) -> None:
    """Draw curves, each with the bands of its points."""
    figure, plane = _figure(axes)
    for line in lines:
        xs = [point.x for point in line.points]
        means = [point.mean for point in line.points]
        colour = COLOURS[line.colour % len(COLOURS)]
        marker = MARKERS[line.colour % len(MARKERS)]
        style = _STYLES[line.style % len(_STYLES)]
        plane.plot(xs, means, style, color=colour, marker=marker, label=line.name)
        lows, highs = zip(*(point.band for point in line.points), strict=True)
        plane.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)
        for point in line.points:  # each seed, so that nobody takes a band for many runs
            plane.plot([point.x] * len(point.values), point.values, ".", color=colour, markersize=3)
    _save(figure, plane, path)


def plot_front(path: Path, lines: Sequence[Line], axes: Axes, *, higher_is_better: bool) -> None:
    """Draw one mark a line, with error bars, and the front of those that no other beats at both.

    Less is better on the horizontal axis.
    """
    figure, plane = _figure(axes)
    for line in lines:
        point = line.points[-1]
        plane.errorbar(
            [point.x],
            [point.mean],
            yerr=[point.spread],
            fmt=MARKERS[line.colour % len(MARKERS)],
            color=COLOURS[line.colour % len(COLOURS)],
            capsize=3,
            label=line.name,
        )
    front = pareto([(line.points[-1].x, line.points[-1].mean) for line in lines], higher_is_better)
    plane.plot([x for x, _ in front], [y for _, y in front], "-", color="#999999", linewidth=1)
    _save(figure, plane, path)


def pareto(
    points: Sequence[tuple[float, float]], higher_is_better: bool
) -> list[tuple[float, float]]:
    """Return the points that no other beats at both, from the least x on."""
    sign = 1 if higher_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _figure(axes: Axes) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise UserError(
            "matplotlib is not installed, which draws a study's plots; pip install -e '.[study]'"
        ) from error
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    plane = figure.subplots()
    plane.set_xlabel(axes.x)
    plane.set_ylabel(axes.y)
    if axes.log_x:
        plane.set_xscale("log")
    if axes.marked_x is not None:
        plane.axvline(
            axes.marked_x, color="#6b7280", linestyle=":", linewidth=1.2, label=axes.marked
        )
    plane.grid(visible=True, color="#e5e7eb", linewidth=0.8)
    plane.set_axisbelow(True)
    for side in ("top", "right"):
        plane.spines[side].set_visible(False)
    return figure, plane


def _save(figure: Any, plane: Any, path: Path) -> None:
    from matplotlib import rc_context

    handles, labels = plane.get_legend_handles_labels()
    if labels:  # beside the curves: inside it would hide some
        figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside right upper")
    buffer = io.BytesIO()
    # Names inside the file are drawn from the salt; letters stay letters.
    with rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Several plots live in one HTML file: their names must not meet.
    text = buffer.getvalue().decode("utf-8")
    prefix = re.sub(r"[^a-z0-9]", "_", path.stem.lower())
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, text.encode("utf-8"))
