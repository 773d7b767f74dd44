from __future__ import annotations

import pytest
import torch

from stages.unet.compress import Recipe, StudentPlan, plan_student, removable
from stages.unet.config import UNetConfig
from tests.train.distill.conftest import MIDDLING
from train.distill.importance import (
    MeasuredUnit,
    Unit,
    choose,
    measure,
    output_error,
    recipe_of,
    removable_units,
)


def _modules(plan: StudentPlan) -> float:
    return len(plan.origins)


def test_units_of_sdxl_are_its_blocks_stacks_pairs_and_middle():
    units = removable_units(UNetConfig.sdxl())
    names = [str(unit) for unit in units]
    assert sum(".transformer_blocks." in name for name in names) == 70
    assert sum(name.count("attentions") == 1 and "blocks.0.att" in name for name in names) > 0
    assert {"mid_block", "mid_block.attentions.0 + mid_block.resnets.1"} <= set(names)
    pairs = [name for name in names if name.count(".resnets.") == 2]
    assert pairs == [
        # The first resnet of the finest level reads what the second does; elsewhere it does not.
        "down_blocks.0.resnets.0 + up_blocks.2.resnets.1",
        "down_blocks.0.resnets.0 + up_blocks.2.resnets.2",
        "down_blocks.0.resnets.1 + up_blocks.2.resnets.1",
        "down_blocks.0.resnets.1 + up_blocks.2.resnets.2",
        "down_blocks.1.resnets.1 + up_blocks.1.resnets.1",
        "down_blocks.2.resnets.1 + up_blocks.0.resnets.0",
        "down_blocks.2.resnets.1 + up_blocks.0.resnets.1",
    ]
    assert len(names) == len(set(names)) == 70 + 10 + 2 + 7
    assert "down_blocks.2 + up_blocks.0" not in names


def test_the_deepest_level_of_sd_is_a_unit():
    names = [str(unit) for unit in removable_units(UNetConfig.sd15())]
    assert "down_blocks.3 + up_blocks.0" in names
    # Attentions of one block are units; their block is not another one.
    assert "down_blocks.0.attentions.0" in names
    assert not [name for name in names if "transformer_blocks" in name]


def test_every_unit_can_go_alone():
    for unit in removable_units(MIDDLING):
        assert set(unit.remove) <= set(removable(MIDDLING))
        assert len(plan_student(MIDDLING, unit.recipe).origins) < len(
            plan_student(MIDDLING, Recipe()).origins
        )


def test_the_error_is_a_share_of_the_expected_output():
    expected = torch.randn(3, 4, 5, 5)
    assert output_error(expected, expected) == 0
    assert output_error(0 * expected, expected) == pytest.approx(1)
    assert output_error(1.1 * expected, expected) == pytest.approx(0.01, rel=1e-4)
    with pytest.raises(ValueError, match="zeros alone"):
        output_error(expected, 0 * expected)
    with pytest.raises(ValueError, match="not finite"):
        output_error(expected / 0, expected)


def test_each_unit_is_measured_alone():
    units = removable_units(MIDDLING)[:3]
    expected = torch.ones(1, 2)
    asked: list[Recipe] = []

    def predict(recipe: Recipe) -> torch.Tensor:
        asked.append(recipe)
        return expected * len(asked)

    found = measure(units, predict, expected)
    assert asked == [unit.recipe for unit in units]
    assert [one.error for one in found] == [0, 1, 4]


# Choosing


def _measured(**errors: float) -> list[MeasuredUnit]:
    """All units, of error 1 but for those named by a part of their path."""

    def error(unit: Unit) -> float:
        known = [value for name, value in errors.items() if name in str(unit).replace(".", "_")]
        return known[0] if known else 1.0

    return [MeasuredUnit(unit, error(unit)) for unit in removable_units(MIDDLING)]


STACK = "down_blocks.1.attentions.0"


def test_what_costs_nothing_goes_first():
    block = f"{STACK}.transformer_blocks.1"
    measured = _measured(**{block.replace(".", "_"): 0.0})
    whole = _modules(plan_student(MIDDLING, Recipe()))
    [chosen] = choose(MIDDLING, measured, _modules, whole - 1)
    assert str(chosen) == block


def test_it_stops_when_the_budget_is_met_and_is_the_same_each_time():
    whole = _modules(plan_student(MIDDLING, Recipe()))
    for budget in (whole - 1, whole - 6, whole - 15):
        chosen = choose(MIDDLING, _measured(), _modules, budget)
        assert chosen == choose(MIDDLING, _measured(), _modules, budget)
        plan = plan_student(MIDDLING, recipe_of(MIDDLING, chosen))
        assert _modules(plan) <= budget
        # None of them could have stayed.
        for unit in chosen:
            fewer = [other for other in chosen if other != unit]
            assert _modules(plan_student(MIDDLING, recipe_of(MIDDLING, fewer))) > budget


def test_a_cheaper_unit_that_a_larger_one_made_needless_is_given_back():
    block = f"{STACK}.transformer_blocks.1"
    errors = {block.replace(".", "_"): 1e-6, "mid_block_attentions": 1.0, "mid_block": 1e-3}
    whole = _modules(plan_student(MIDDLING, Recipe()))
    middle = whole - _modules(plan_student(MIDDLING, Recipe(("mid_block",))))
    chosen = choose(MIDDLING, _measured(**errors), _modules, whole - middle)
    assert [str(unit) for unit in chosen] == ["mid_block"]


def test_the_last_block_of_a_stack_does_not_go_as_if_it_were_one_of_many():
    names = {f"{STACK}.transformer_blocks.{n}".replace(".", "_"): 1e-6 for n in range(3)}
    whole = _modules(plan_student(MIDDLING, Recipe()))
    two = [str(unit) for unit in choose(MIDDLING, _measured(**names), _modules, whole - 2)]
    assert two == [f"{STACK}.transformer_blocks.0", f"{STACK}.transformer_blocks.1"]
    # With the third all of the attention would go, which was measured to cost much more.
    three = [str(unit) for unit in choose(MIDDLING, _measured(**names), _modules, whole - 3)]
    assert set(three) - {f"{STACK}.transformer_blocks.{n}" for n in range(3)}


def test_a_budget_below_the_smallest_student_is_refused():
    with pytest.raises(ValueError, match="the smallest student that can be made so costs"):
        choose(MIDDLING, _measured(), _modules, 3)


def test_a_recipe_does_not_name_what_goes_anyway():
    units = [
        Unit(("mid_block.attentions.0.transformer_blocks.1",)),
        Unit(("mid_block",)),
        Unit(("up_blocks.0.attentions.1",)),
        Unit(("down_blocks.1.resnets.1", "up_blocks.0.resnets.1")),
    ]
    assert recipe_of(MIDDLING, units).remove == (
        "down_blocks.1.resnets.1",
        "mid_block",
        "up_blocks.0.resnets.1",
    )
