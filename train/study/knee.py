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
    f"in its place. There is neither with fewer than {LEAST_POINTS} rates or without two seeds, "
    f"where such a distance is below {LEAST_DISTANCE:g} of the curve's height or within what the "
    "spread over seeds explains (that of all rates together, at 95 %), or where quality does not "
    "rise from the fewest bytes to the most."
)
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}
"""97.5 % points of Student's t by degrees of freedom."""
_T_OF_MORE = 2.2


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
    alike: tuple[float, ...] = ()
    """Of a peak: other places that are not told apart from it."""


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
    if not all(math.isfinite(one) for one in quality):
        return Knee(None, None, "a figure is not finite")
    height = max(quality) - min(quality)
    if height == 0:
        return Knee(None, None, "all rates are alike")
    freedom = sum(len(point.values) - 1 for point in points)
    if freedom == 0:
        return Knee(None, None, "one seed does not tell a bend from chance")
    # Of all rates together: three values say little of their own spread.
    pooled = math.sqrt(sum((len(one.values) - 1) * one.spread**2 for one in points) / freedom)
    doubt = _T.get(freedom, _T_OF_MORE) * pooled
    errors = [doubt / math.sqrt(len(point.values)) for point in points]
    best = max(range(len(points)), key=quality.__getitem__)
    falls = [quality[best] - one for one in quality]
    told = [
        fall > max(math.hypot(errors[best], error), LEAST_DISTANCE * height)
        for fall, error in zip(falls, errors, strict=True)
    ]
    if told[0] and told[-1]:
        alike = tuple(point.x for n, point in enumerate(points) if n != best and not told[n])
        distance = min(falls[0], falls[-1]) / height
        return Knee(points[best].x, distance, is_peak=True, alike=alike)
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
    noise = math.hypot(errors[at], (1 - x) * errors[0], x * errors[-1]) / height
    if distance < noise:
        return Knee(None, distance, "the bend is no larger than the spread over seeds")
    return Knee(points[at].x, distance)
