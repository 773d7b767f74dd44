from __future__ import annotations

import math
import random

import pytest

from train.study.knee import find_knee
from train.study.plots import Point

BYTES = [512, 1024, 2048, 4096, 8192]


def curve(*means: float, spread: float = 0.0) -> list[Point]:
    return [
        Point(x, (mean - spread, mean, mean + spread)) for x, mean in zip(BYTES, means, strict=True)
    ]


def test_the_knee_is_where_a_saturating_curve_bends():
    assert find_knee(curve(10, 20, 28, 29, 30), higher_is_better=True).x == 2048
    # The distance from the chord: (28 - 10) / 20 - 2 / 4.
    found = find_knee(curve(10, 20, 28, 29, 30), higher_is_better=True)
    assert found.distance == pytest.approx(0.4)


def test_less_may_be_better_and_the_order_does_not_matter():
    points = curve(30, 20, 12, 11, 10)
    assert find_knee(points[::-1], higher_is_better=False).x == 2048
    assert find_knee(points, higher_is_better=True).x is None


def test_bytes_are_on_a_logarithmic_axis():
    straight = [math.log2(x) for x in BYTES]
    found = find_knee(curve(*straight), higher_is_better=True)
    assert found.x is None and found.why == "the curve is nearly straight"


@pytest.mark.parametrize(
    ("means", "spread", "why"),
    [
        ((1, 1, 1, 1, 1), 0.0, "all rates are alike"),
        ((1, 1.1, 1.2, 1.4, 5), 0.0, "the curve is nearly straight"),  # it bends the other way
        ((5, 4, 3, 2, 1), 0.0, "does not rise"),
        ((5, 5.2, 4, 3, 2), 0.0, "does not rise"),  # the peak is no higher than the first end
        ((1, 4, 9, 4, 2), 9.0, "no larger than the spread over seeds"),
        ((10, 20, 28, 29, 30), 20.0, "no larger than the spread over seeds"),
        ((10, 20, math.inf, 29, 30), 0.0, "not finite"),
    ],
)
def test_where_there_is_no_clear_knee_it_says_why(means, spread, why):
    found = find_knee(curve(*means, spread=spread), higher_is_better=True)
    assert found.x is None
    assert why in found.why


@pytest.mark.parametrize("means", [(1, 4, 9, 4, 2), (2, 4, 9, 4, 1)])
def test_a_curve_that_is_best_in_between_has_its_peak_named(means):
    found = find_knee(curve(*means), higher_is_better=True)
    assert found.x == 2048 and found.is_peak and not found.why
    assert found.alike == ()
    # Above the better of its ends: (9 - 2) / (9 - 1).
    assert found.distance == pytest.approx(7 / 8)
    less = find_knee(curve(*(-mean for mean in means)), higher_is_better=False)
    assert less == found
    assert not find_knee(curve(10, 20, 28, 29, 30), higher_is_better=True).is_peak


def test_a_peak_that_others_are_as_high_as_is_named_with_them():
    found = find_knee(curve(1, 8.5, 9, 4, 2, spread=1.0), higher_is_better=True)
    assert found.x == 2048 and found.is_peak and found.alike == (1024,)


def test_one_seed_names_nothing():
    points = [Point(x, (mean,)) for x, mean in zip(BYTES, (10, 20, 28, 29, 30), strict=True)]
    found = find_knee(points, higher_is_better=True)
    assert found.x is None and found.why == "one seed does not tell a bend from chance"


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_chance_alone_seldom_names_a_rate(slope):
    """Three seeds on a flat or a straight line: a named rate is a false one."""
    generator, named = random.Random(0), 0
    for _ in range(400):
        points = [
            Point(x, tuple(slope * n + generator.gauss(0, 1) for _ in range(3)))
            for n, x in enumerate((512, 1024, 2048, 4096, 8192, 16384))
        ]
        named += find_knee(points, higher_is_better=True).x is not None
    assert named <= 0.12 * 400


def test_three_rates_have_no_shape():
    found = find_knee(curve(10, 20, 28, 29, 30)[:3], higher_is_better=True)
    assert found.x is None and "too few" in found.why
