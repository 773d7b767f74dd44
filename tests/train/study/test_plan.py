from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cascade.config import from_dict
from cascade.errors import UserError
from train.study.plan import (
    ArmRates,
    Moment,
    Rate,
    check_warmup,
    overhead,
    plan_arm,
    plan_lines,
    samples_per_step,
)
from train.study.settings import ArmConfig, BudgetConfig, StepConfig, StudyConfig

MODEL = {"command": "train.assemble", "config": "m.yaml"}
STEPS = [
    {"name": "b", "train": "stage_b", "config": "b.yaml", "share": 0.25},
    {"name": "cache", "command": "train.data precompute"},
    {"name": "draw", "command": "train.distill generate", "cost": "teacher"},
    {"name": "c", "train": "stage_c", "config": "c.yaml", "share": 0.75},
]
WHOLE = STEPS[0] | {"share": 1.0}
RATES = ArmRates(
    {"b": Rate(0.5, 4, 100.0), "c": Rate(0.25, 8, None)}, {"cache": 10.0, "draw": 30.0}
)


def arm(**changes: object) -> ArmConfig:
    values = {"name": "one", "steps": STEPS, "model": MODEL} | changes
    return from_dict(ArmConfig, values, "study.yaml")


def budget(unit: str, amount: float = 1000.0, teacher: str = "apart") -> BudgetConfig:
    return from_dict(BudgetConfig, {"unit": unit, "amounts": [amount], "teacher": teacher}, "b")


def test_samples_are_dealt_out_by_share_and_moments_are_those_of_the_whole_budget():
    plan = plan_arm(arm(), 1600, budget("samples"), RATES, (0.1, 0.5, 1.0))
    assert plan.steps == {"b": 100, "c": 150}
    # A quarter goes to Stage B: at a tenth there is no model, at a half a third of Stage C.
    assert plan.moments == (Moment(0.1, None), Moment(0.5, 50), Moment(1.0, 150))
    assert plan.exports == (50, 150)


def test_seconds_pay_for_the_arms_commands_and_for_a_counted_teacher():
    assert overhead(arm(), RATES, budget("device_seconds")) == 10
    plan = plan_arm(arm(), 110, budget("device_seconds"), RATES, (1.0,))
    assert plan.steps == {"b": 50, "c": 300}
    counted = budget("device_seconds", teacher="counted")
    assert overhead(arm(), RATES, counted) == 40
    assert plan_arm(arm(), 140, counted, RATES, (1.0,)).steps == {"b": 50, "c": 300}


def test_a_teacher_in_a_step_is_apart_or_counted_as_its_pictures_are():
    one = arm(steps=[WHOLE])
    rates = ArmRates({"b": Rate(0.5, 4, 100.0, 0.5, 60.0)}, {})
    flops = budget("flops")
    assert plan_arm(one, 1000, flops, rates, (1.0,)).steps == {"b": 10}
    apart, counted = (budget("device_seconds", teacher=told) for told in ("apart", "counted"))
    assert plan_arm(one, 100, apart, rates, (1.0,)).steps == {"b": 200}
    assert plan_arm(one, 100, counted, rates, (1.0,)).steps == {"b": 100}
    both = budget("flops", teacher="counted")
    assert plan_arm(one, 1600, both, rates, (1.0,)).steps == {"b": 10}


def test_a_counted_teachers_pictures_are_paid_in_operations_as_well():
    counted = budget("flops", teacher="counted")
    rates = replace(RATES, command_flops={"draw": 400.0, "cache": None})
    commands = {step.name: step.cost for step in arm().steps if step.command is not None}
    assert commands == {"draw": "teacher", "cache": "arm"}
    assert overhead(arm(), rates, counted) == 400  # the arm's own commands are free in operations
    assert overhead(arm(), rates, budget("flops")) == 0
    with pytest.raises(UserError, match="nobody counts the FLOPs of draw, which writes no ledger"):
        overhead(arm(), RATES, counted)


@pytest.mark.parametrize(
    ("optim", "refused"),
    [
        ({"warmup_steps": 30}, True),
        ({"warmup_steps": 3}, False),
        ({"warmup_steps": 30, "warmup_fraction": 0.05}, False),
        ({}, False),
    ],
)
def test_a_plan_that_is_mostly_warm_up_is_refused(optim, refused, tmp_path):
    config = tmp_path / "b.yaml"
    config.write_text(json.dumps({"optim": optim}))
    one = arm(steps=[WHOLE | {"config": str(config)}])
    plan = plan_arm(one, 160, budget("samples"), RATES, (1.0,))
    if refused:
        with pytest.raises(UserError, match=r"b gets 40 steps, of which optim\.warmup_steps, 30"):
            check_warmup(one, plan)
    else:
        check_warmup(one, plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trial": {"limit": 3}}, "a trial is a part"),
        ({"trial_part": 0.5}, "a trial is a part"),
        ({"trial": {"limit": 3}, "trial_part": 0.0}, "a trial is a part"),
        ({"trial": {"out": "{there}"}, "trial_part": 0.5}, "names {there}"),
    ],
)
def test_trials_that_are_none_are_refused(changes, message):
    step = {"name": "draw", "command": "train.distill generate", **changes}
    with pytest.raises(UserError, match=message):
        arm(steps=[step, WHOLE])


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("budget", {"unit": "samples", "amounts": [float("inf")]}, "positive numbers"),
        ("price_per_device_hour", -3.0, "a price is 0 or more"),
        ("price_per_device_hour", float("nan"), "price_per_device_hour"),
        ("seeds", [-1], "a seed is 0 or more"),
        ("grid_prompts", -1, "0 or more rows"),
    ],
)
def test_numbers_that_are_none_are_refused(section, value, message):
    values = {
        "name": "s",
        "budget": {"unit": "samples", "amounts": [100]},
        "arms": [{"name": "one", "steps": [WHOLE], "model": MODEL}],
        "judge": {"protocol": "p.yaml"},
    }
    with pytest.raises(UserError, match=message):
        from_dict(StudyConfig, values | {section: value}, "s.yaml")


def test_budgets_that_buy_nothing_are_refused():
    with pytest.raises(UserError, match="its commands take 10 device_seconds and the budget is 9;"):
        plan_arm(arm(), 9, budget("device_seconds"), RATES, (1.0,))
    with pytest.raises(UserError, match="one: b gets 2 samples and one step takes 4"):
        plan_arm(arm(), 8, budget("samples"), RATES, (1.0,))
    with pytest.raises(UserError, match=r"the FLOPs of c are not counted under run\.compile"):
        plan_arm(arm(), 800, budget("flops"), RATES, (1.0,))


def test_a_steps_samples_are_those_of_all_devices_and_micro_batches(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {accumulate: 2, devices: 4}\ndata: {batch_size: 3}\n")
    values = {"name": "c", "train": "stage_c", "config": str(path), "share": 1.0}
    step = from_dict(StepConfig, values, "x")
    assert samples_per_step(step) == 24
    more = {"data.batch_size": 5, "compressor": "{here}/x"}
    assert samples_per_step(from_dict(StepConfig, values | {"set": more}, "x")) == 40
    path.write_text("run: {}\n")
    with pytest.raises(UserError, match=r"data\.batch_size is missing"):
        samples_per_step(step)


def test_the_plan_says_what_it_will_take():
    values = {
        "name": "s",
        "budget": {"unit": "samples", "amounts": [1600]},
        "arms": [{"name": "one", "steps": STEPS, "model": MODEL}],
        "judge": {"protocol": "p.yaml"},
        "seeds": [0, 1],
        "price_per_device_hour": 3600.0,
    }
    config = from_dict(StudyConfig, values, "s.yaml")
    plan = plan_arm(config.arms[0], 1600, config.budget, RATES, (1.0,))
    lines = plan_lines(config, {1600.0: {"one": plan}}, {"one": RATES})
    assert "| 1600 | one | c | 0.75 | 150 | 1,200 | 38 |" in lines
    assert "| 1600 | one | draw (teacher) |  |  |  | 30 |" in lines
    # Two seeds of 50 + 10 + 30 + 37.5 seconds.
    assert lines[-1].startswith("2 seeds: about 255 device seconds")
    assert lines[-1].endswith("At 3600 a device hour: 255.00.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": STEPS[:1]}, "shares of its trainings sum to 0.25"),
        ({"steps": [*STEPS, STEPS[1] | {"name": "x"}]}, "its last step must be a training"),
        ({"steps": [*STEPS, STEPS[3]]}, "two steps are named c"),
        ({"steps": [STEPS[0] | {"share": 0.0}]}, "a training has a share"),
        ({"steps": [STEPS[0] | {"command": "train.data check"}]}, "give train or command"),
        ({"steps": [STEPS[0] | {"set": {"run.seed": 3}}]}, "run.seed is the study's to decide"),
        ({"steps": [WHOLE | {"set": {"text": "{her}"}}]}, r"text names \{her\}; there are"),
        ({"steps": [WHOLE | {"set": {"text": "{weights}"}}]}, r"names \{weights\}"),
        ({"model": MODEL | {"set": {"text": "{there}"}}}, r"text names \{there\}"),
        ({"steps": [STEPS[0] | {"shar": 1.0}]}, "did you mean 'share'"),
        ({"steps": [STEPS[0] | {"shared": True}]}, "a training is not shared"),
    ],
    ids=str,
)
def test_arms_that_can_not_be_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        arm(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_at": [0.5, 0.25, 1.0]}, "fractions rise"),
        ({"evaluate_at": [0.5]}, "its last is 1, the whole budget"),
        ({"evaluate_at": [0.5, 0.50000001, 1.0]}, "fractions rise"),
        ({"budget": {"unit": "samples", "amounts": [16e5, 1600000.1]}}, "each is to be given once"),
        ({"arms": [{"name": "..", "steps": [WHOLE], "model": MODEL}]}, "its folder needs letters"),
        ({"seeds": [1, 1]}, "give each once"),
        ({"budget": {"unit": "samples", "amounts": [0]}}, "positive"),
        (
            {"budget": {"unit": "samples", "amounts": [1], "teacher": "counted"}},
            "a teacher has none",
        ),
        ({"arms": []}, "arms is empty"),
    ],
    ids=str,
)
def test_studies_that_can_not_be_are_told(changes, message):
    one = {"name": "one", "steps": STEPS, "model": MODEL}
    values = {"name": "s", "arms": [one], "judge": {"protocol": "p.yaml"}}
    values |= {"budget": {"unit": "samples", "amounts": [1]}} | changes
    with pytest.raises(UserError, match=message):
        from_dict(StudyConfig, values, "s.yaml")


def test_arms_whose_folders_would_be_one_and_shared_steps_that_differ_are_told():
    shared = {"name": "x", "command": "train.data check", "shared": True}
    other = shared | {"set": {"limit": 3}}
    base = {"judge": {"protocol": "p.yaml"}, "budget": {"unit": "samples", "amounts": [1]}}

    def study(*arms: dict[str, object]) -> None:
        from_dict(StudyConfig, {"name": "s", "arms": list(arms), **base}, "s")

    last = STEPS[0] | {"share": 1.0}
    one = {"name": "a b", "steps": [shared, last], "model": MODEL}
    with pytest.raises(UserError, match="two arms are named 'a_b'"):
        study(one, one | {"name": "a_b"})
    with pytest.raises(UserError, match="two shared steps are named 'x'"):
        study(one, one | {"name": "other", "steps": [other, last]})
