from __future__ import annotations

import dataclasses

import pytest

from cascade.config import from_dict, to_dict
from stages.unet.compress import PUBLISHED, Recipe, StudentPlan, plan_student, removable
from stages.unet.config import UNetConfig
from stages.unet.features import sites
from tests.stages.unet.toys import toy_of

STUDENTS = {
    "bk_sdxl_base": ("sdxl", "bk_sdxl_base"),
    "koala_1b": ("sdxl", "koala_1b"),
    "koala_700m": ("sdxl", "koala_700m"),
    "ssd_1b": ("sdxl", "ssd_1b"),
    "vega": ("sdxl", "vega"),
    "bk_base": ("sd15", "bk_base"),
    "bk_small": ("sd15", "bk_small"),
    "bk_tiny": ("sd15", "bk_tiny"),
    "sd_small": ("sd15", "sd_small"),
    "sd_tiny": ("sd15", "sd_tiny"),
    "bk_v2_base": ("sd21", "bk_base"),
    "bk_v2_small": ("sd21", "bk_small"),
    "bk_v2_tiny": ("sd21", "bk_tiny"),
}
"""Published student: its teacher and its recipe."""


@pytest.fixture(params=STUDENTS)
def planned(request: pytest.FixtureRequest) -> tuple[str, StudentPlan]:
    """Every published student's name, and what its recipe makes of its teacher."""
    teacher, recipe = STUDENTS[request.param]
    return request.param, plan_student(getattr(UNetConfig, teacher)(), PUBLISHED[recipe])


def test_a_published_recipe_makes_the_published_student(planned):
    name, plan = planned
    assert plan.student == getattr(UNetConfig, name)()


def test_every_published_recipe_is_a_published_student():
    assert {recipe for _, recipe in STUDENTS.values()} == set(PUBLISHED)


def test_a_recipe_serves_a_teacher_of_any_width(planned):
    name, plan = planned
    student = plan_student(toy_of(plan.teacher), PUBLISHED[STUDENTS[name][1]]).student
    assert student == toy_of(getattr(UNetConfig, name)())


def test_every_site_of_a_student_has_one_of_the_same_kind_and_width_in_the_teacher(planned):
    _, plan = planned
    theirs = sites(plan.teacher)
    for name, site in sites(plan.student).items():
        origin = theirs[plan.teacher_name(name)]
        assert (origin.kind, origin.channels) == (site.kind, site.channels)


def test_only_the_block_above_a_removed_level_has_an_output_of_another_size(planned):
    name, plan = planned
    theirs = sites(plan.teacher)
    differing = [
        one
        for one, site in sites(plan.student).items()
        if theirs[plan.teacher_name(one)].level != site.level
    ]
    assert differing == (["down_blocks.2"] if name.endswith("tiny") else [])


# Which one comes from which: the facts, section 1.3


def _origins(name: str) -> StudentPlan:
    teacher, recipe = STUDENTS[name]
    return plan_student(getattr(UNetConfig, teacher)(), PUBLISHED[recipe])


def test_the_last_pair_of_a_stage_up_comes_from_the_teachers_last():
    for name in ("koala_1b", "koala_700m", "bk_base", "bk_small"):
        plan = _origins(name)
        for index in range(len(plan.student.channels)):
            for layer, origin in ((0, 0), (1, 2)):
                own = f"up_blocks.{index}.resnets.{layer}"
                assert plan.origins[own] == f"up_blocks.{index}.resnets.{origin}"
    plan = _origins("koala_700m")
    assert (
        plan.teacher_name("up_blocks.0.attentions.1.transformer_blocks.4.attn1.to_q.weight")
        == "up_blocks.0.attentions.2.transformer_blocks.4.attn1.to_q.weight"
    )
    assert plan.teacher_name("up_blocks.1.upsamplers.0.conv.bias").startswith("up_blocks.1.")


def test_students_of_sdxl_keep_the_first_blocks_of_a_stack():
    for name, kept in (("koala_1b", 6), ("koala_700m", 5), ("vega", 2)):
        plan = _origins(name)
        stack = "down_blocks.2.attentions.0.transformer_blocks"
        found = {own: origin for own, origin in plan.origins.items() if own.startswith(stack)}
        assert found == {f"{stack}.{number}": f"{stack}.{number}" for number in range(kept)}
    assert _origins("ssd_1b").student.up_depths[0] == (4, 4, 10)


def test_bk_tiny_shifts_the_levels_up():
    plan = _origins("bk_tiny")
    for index in range(3):
        assert plan.origins[f"up_blocks.{index}"] == f"up_blocks.{index + 1}"
        for layer, origin in ((0, 0), (1, 2)):
            stack = f"up_blocks.{index}.attentions.{layer}"
            assert plan.origins[stack] == f"up_blocks.{index + 1}.attentions.{origin}"
    assert plan.origins["up_blocks.0.upsamplers.0"] == "up_blocks.1.upsamplers.0"
    assert "down_blocks.2.downsamplers.0" not in plan.origins
    assert "down_blocks.1.downsamplers.0" in plan.origins
    assert not [own for own in plan.origins if own.startswith("mid_block")]


def test_blocks_may_go_from_anywhere_in_a_stack():
    stack = "down_blocks.2.attentions.1.transformer_blocks"
    plan = plan_student(UNetConfig.sdxl(), Recipe((f"{stack}.0", f"{stack}.[37]")))
    kept = [plan.origins[f"{stack}.{number}"] for number in range(7)]
    assert kept == [f"{stack}.{number}" for number in (1, 2, 4, 5, 6, 8, 9)]


def test_the_second_resnet_may_be_the_one_that_stays_in_the_middle():
    plan = plan_student(UNetConfig.sdxl(), Recipe(("mid_block.resnets.0",)))
    assert plan.student.mid_depth == 0
    assert plan.origins["mid_block.resnets.0"] == "mid_block.resnets.1"


def test_nothing_removed_is_the_teacher(published):
    plan = plan_student(published, Recipe())
    assert plan.student == published
    assert all(own == origin for own, origin in plan.origins.items())


# A recipe and a teacher that do not fit


@pytest.mark.parametrize(
    ("teacher", "recipe", "message"),
    [
        ("sd15", PUBLISHED["koala_1b"], r"removes '\*.transformer_blocks.\[6-9\]', but nothing"),
        ("sd15", PUBLISHED["vega"], r"down \(\(1, 1\), .* middle 1, up \(\(0, 0, 0\)"),
        ("sdxl", PUBLISHED["bk_tiny"], "removes 'down_blocks.3', but nothing"),
        ("koala_700m", PUBLISHED["koala_700m"], r"removes 'down_blocks.\*.resnets.1'"),
        ("sdxl", Recipe(("down_blocks.1.resnet.1",)), "did you mean down_blocks.N.resnets.N"),
        ("sdxl", Recipe(("conv_in",)), "nothing that can be removed"),
        (
            "sdxl",
            Recipe(("down_blocks.2", "up_blocks.0", "mid_block")),
            "up_blocks.0.resnets.0 would be 1280 -> 640 .* up_blocks.1.resnets.0 .* 1920 -> 640",
        ),
        ("sdxl", Recipe(("down_blocks.2",)), r"the levels \[2\] on the way down and \[\]"),
        ("sd15", Recipe(("down_blocks.2", "up_blocks.1")), "levels go from the deepest"),
        ("sdxl", Recipe(("*",)), "one stays"),
        (
            "sdxl",
            Recipe(("down_blocks.1.resnets.1",)),
            "keeps 1 resnets of down_blocks.1 and 3 of up_blocks.1",
        ),
        ("sd15", Recipe(("down_blocks.3.resnets.?",)), "0 resnets of down_blocks.3"),
        (
            "sd15",
            Recipe(("down_blocks.3", "up_blocks.0", "up_blocks.1.resnets.2")),
            "keeps 2 resnets of down_blocks.2 and 2 of up_blocks.1",
        ),
        (
            "sdxl",
            Recipe(("down_blocks.1.resnets.0", "up_blocks.1.resnets.1")),
            "down_blocks.1.resnets.0 would be 320 -> 640 .* is 640 -> 640",
        ),
        (
            "sdxl",
            Recipe(("down_blocks.1.resnets.1", "up_blocks.1.resnets.2")),
            "up_blocks.1.resnets.1 would be 960 -> 640 .* is 1280 -> 640",
        ),
        ("sdxl", Recipe(("mid_block.attentions.0",)), "neither whole, nor one resnet"),
        ("sdxl", Recipe(("mid_block.resnets.1",)), "neither whole, nor one resnet"),
    ],
)
def test_a_recipe_and_a_teacher_that_do_not_fit_are_refused_in_one_line(teacher, recipe, message):
    with pytest.raises(ValueError, match=message) as caught:
        plan_student(getattr(UNetConfig, teacher)(), recipe)
    assert "\n" not in str(caught.value)


def test_each_removable_module_exists(published):
    theirs = sites(published)
    assert all(name in theirs for name in removable(published))


# The plan itself


def test_a_plan_survives_json(planned):
    _, plan = planned
    assert from_dict(StudentPlan, to_dict(plan), "here") == plan


def test_a_plan_that_leaves_something_out_is_refused():
    plan = _origins("koala_700m")
    name = "up_blocks.0.resnets.1"
    without = {own: origin for own, origin in plan.origins.items() if own != name}
    for origins, message in (
        (without, f"{name} has no origin"),
        ({**plan.origins, "mid_block": "mid_block"}, "mid_block is no module of the student"),
        ({**plan.origins, name: "up_blocks.7"}, "up_blocks.7 is no module of the teacher"),
        ({**plan.origins, name: "up_blocks.0.resnets.0"}, "two modules"),
        ({**plan.origins, name: "up_blocks.0.resnets.1"}, "would be 1920 -> 1280"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(plan, origins=origins)
    narrower = dataclasses.replace(plan.student, text_channels=8)
    with pytest.raises(ValueError, match="more than what is removed"):
        dataclasses.replace(plan, student=narrower)


def test_a_name_of_no_module_has_no_origin():
    plan = _origins("koala_700m")
    for name in ("mid_block.resnets.0.norm1.weight", "conv_inn.weight", ""):
        with pytest.raises(ValueError, match="below no module"):
            plan.teacher_name(name)
