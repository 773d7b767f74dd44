"""Where a curve bends: the rate after which more bytes buy little.

Both axes are normalised to [0, 1], quality upwards; the knee is where the curve lies farthest above
the chord between its ends.

Reference: Satopaa et al., 2011, "Finding a 'Kneedle' in a Haystack", section III.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from train.study.plots import Point

LEAST_POINTS = 4
"""Fewer have no shape to speak of."""
LEAST_DISTANCE = 0.1
"""Of the normalised height; a curve that stays closer to its chord is a straight line."""
DEFINITION = (
    "The knee is the rate at which the curve (bytes on a logarithmic axis, both axes normalised "
    "to [0, 1], quality upwards) lies farthest above the chord between its ends, as in Kneedle. "
    "A curve that is best at a rate in between, and worse at both ends, has its best rate named "
    f"in its place. There is neither with fewer than {LEAST_POINTS} rates, where such a distance "
    f"is below {LEAST_DISTANCE:g} of the curve's height or below twice the standard error of the "
    "mean over seeds, or where quality does not rise from the fewest bytes to the most."
)


@dataclass(frozen=True)
class Knee:
    """What was found on a curve."""

    x: float | None
    """Its place; None: there is no clear knee."""
    distance: float | None
    """Of the curve above its chord there, normalised; of a peak, above the better of its ends.
    None: it was not measured."""
    why: str = ""
    """Why there is none."""
    is_peak: bool = False
    """Quality is best there, and falls to both sides: more bytes are not only dear, but worse."""


def find_knee(points: Sequence[Point], *, higher_is_better: bool) -> Knee:
    """Find the knee of a curve, or its peak.

    Args:
        points: Bytes and what each seed measured, in any order.
        higher_is_better: Whether more of the figure is better.
    """
    points = sorted(points, key=lambda point: point.x)
    if len(points) < LEAST_POINTS:
        return Knee(None, None, f"{len(points)} rates are too few")
    sign = 1.0 if higher_is_better else -1.0
    quality = [sign * point.mean for point in points]
    height = max(quality) - min(quality)
    if not math.isfinite(height):
        return Knee(None, None, "a figure is not finite")
    if height == 0:
        return Knee(None, None, "all rates are alike")
    errors = [point.spread / math.sqrt(len(point.values)) for point in points]
    best = max(range(len(points)), key=quality.__getitem__)
    rises = [
        (quality[best] - quality[end], 2 * math.hypot(errors[best], errors[end])) for end in (0, -1)
    ]
    if all(rise > max(noise, LEAST_DISTANCE * height) for rise, noise in rises):
        return Knee(points[best].x, min(rise for rise, _ in rises) / height, is_peak=True)
    if quality[-1] <= quality[0]:
        return Knee(None, None, "quality does not rise from the fewest bytes to the most")
    logs = [math.log(point.x) for point in points]
    across = [(x - logs[0]) / (logs[-1] - logs[0]) for x in logs]
    chord = [quality[0] + (quality[-1] - quality[0]) * x for x in across]
    above = [(q - line) / height for q, line in zip(quality, chord, strict=True)]
    at = max(range(len(points)), key=above.__getitem__)
    distance = above[at]
    if distance < LEAST_DISTANCE:
        return Knee(None, distance, "the curve is nearly straight")
    # The chord moves with its ends.
    x = across[at]
    noise = 2 * math.hypot(errors[at], (1 - x) * errors[0], x * errors[-1]) / height
    if distance < noise:
        return Knee(None, distance, "the bend is no larger than the spread over seeds")
    return Knee(points[at].x, distance)
