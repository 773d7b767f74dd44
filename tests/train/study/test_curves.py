"""Quality against what was spent, and against that with the teacher's share."""

from __future__ import annotations

from typing import Any

import pytest

from cascade.config import from_dict
from train.study.curves import _lines, curve_blocks
from train.study.page import Heading, Picture
from train.study.settings import StudyConfig

CURVE = [((10.0, 1.0), (20.0, 1.0))]


def study(teacher: str) -> StudyConfig:
    unit = "flops" if teacher == "apart" else "device_seconds"
    step = {"name": "x", "train": "stage_c", "config": "c.yaml", "share": 1.0}
    model = {"command": "train.assemble", "config": "m.yaml"}
    arms = [{"name": name, "steps": [step], "model": model} for name in ("plain", "taught")]
    values = {
        "name": "one",
        "budget": {"unit": unit, "amounts": [10.0, 20.0], "teacher": teacher},
        "seeds": [0, 1],
        "arms": arms,
        "judge": {"protocol": "p.yaml"},
    }
    return from_dict(StudyConfig, values, "study.yaml")


def row(arm: str, budget: float, seed: int, taught: float | None) -> dict[str, Any]:
    figure = {"value": budget + seed, "label": "score", "better": "higher", "real": None}
    return {
        "arm": arm,
        "budget": budget,
        "seed": seed,
        "fraction": 1.0,
        "status": "judged",
        "metrics": {"score": figure},
        "spent": {"flops": budget, "device_seconds": budget},
        "teacher": {"flops": taught, "device_seconds": taught},
    }


def rows(share: float | None) -> list[dict[str, Any]]:
    taught = {"plain": 0.0, "taught": share}
    return [
        row(arm, budget, seed, None if cost is None else cost * budget)
        for arm, cost in taught.items()
        for budget in (10.0, 20.0)
        for seed in (0, 1)
    ]


def test_a_teachers_share_moves_an_arms_points_to_the_right():
    config, found = study("apart"), rows(0.5)
    plain, taught = _lines(config, found, "score", CURVE)
    assert [point.x for point in plain.points] == [point.x for point in taught.points] == [10, 20]
    plain, taught = _lines(config, found, "score", CURVE, with_teacher=True)
    assert [point.x for point in plain.points] == [10, 20]
    assert [point.x for point in taught.points] == [15, 30]
    assert taught.points[1].values == (20, 21)


def test_a_teacher_whose_operations_nobody_counted_is_not_taken_for_free():
    (only,) = _lines(study("apart"), rows(None), "score", CURVE, with_teacher=True)
    assert only.name == "plain"


def test_one_seed_has_the_band_of_its_pictures_and_several_that_of_theirs():
    found = rows(0.0)
    for one in found:
        one["metrics"]["score"] |= {"low": one["budget"] - 3, "high": one["budget"] + 1}
    first = [one for one in found if one["seed"] == 0]
    config = study("apart")
    assert [point.band for point in _lines(config, first, "score", CURVE)[0].points] == [
        (7, 11),
        (17, 21),
    ]
    band = _lines(config, found, "score", CURVE)[0].points[0].band
    assert band == pytest.approx((10.5 - 0.7071, 10.5 + 0.7071), abs=1e-4)
    for one in first:
        one["metrics"]["score"] |= {"low": None, "high": None, "spread": 2.0}
    assert _lines(config, first, "score", CURVE)[0].points[0].band == (8, 12)


@pytest.mark.parametrize(
    ("teacher", "share", "wanted"),
    [("apart", 0.5, True), ("apart", 0.0, False), ("counted", 0.5, False)],
)
def test_the_second_plot_is_there_where_it_says_something_else(teacher, share, wanted, tmp_path):
    blocks = curve_blocks(study(teacher), rows(share), tmp_path)
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    assert ("Quality against budget and teacher" in headings) == wanted
    files = [block.file for block in blocks if isinstance(block, Picture)]
    assert len(files) == 1 + wanted and all((tmp_path / file).is_file() for file in files)
