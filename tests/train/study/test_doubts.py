"""What a report says beside its figures: of how many pictures, how sure, how equal."""

from __future__ import annotations

from typing import Any

from train.study.doubts import fairness_blocks, figure_blocks
from train.study.page import to_markdown


def figure(**changes: Any) -> dict[str, Any]:
    return {
        "label": "distance",
        "num_pictures": 96,
        "num_reference": 345,
        "spread": 0.02,
        "low": None,
        "high": None,
        "uncertainty": "s.d., of random halves",
        "notes": ["96 pictures for 192 dimensions"],
    } | changes


def row(spent: float, machine: str = "one") -> dict[str, Any]:
    return {
        "status": "judged",
        "arm": "mine",
        "budget": 100.0,
        "fraction": 0.5,
        "spent": {"flops": spent},
        "machine": "one",
        "trained": [{"commit": "c", "machine": machine}],
    }


def test_a_figure_says_of_how_many_pictures_it_is_and_how_sure() -> None:
    share = figure(spread=None, low=0.4, high=0.6, label="share", num_reference=0, notes=[])
    text = to_markdown(figure_blocks([{"d": figure(), "s": share}, {"d": figure(spread=0.04)}]))
    assert "| distance | 96 | 345 | ± 0.03000 | s.d., of random halves |" in text
    assert "| share | 96 |  | ± 0.1000 |" in text
    assert text.count("Note: 96 pictures for 192 dimensions.") == 1
    assert figure_blocks([]) == []


def test_arms_that_spent_another_budget_and_unlike_machines_are_told() -> None:
    assert fairness_blocks([row(50.0), row(48.0)], "flops") == []
    text = to_markdown(fairness_blocks([row(50.0), row(30.0)], "flops"))
    assert "mine with 100: 60%" in text
    assert "unlike machines" in to_markdown(fairness_blocks([row(50.0, "other")], "flops"))
