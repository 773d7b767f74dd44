from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.unet.compress import PUBLISHED, Recipe, plan_student
from stages.unet.config import UNetConfig
from stages.unet.inherit import inherit
from stages.unet.unet import UNet
from tests.stages.unet.test_compress import STUDENTS
from tests.stages.unet.test_unet import COUNTS
from tests.stages.unet.toys import toy_of


def _meta_state(config: UNetConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return UNet(config).state_dict()


@pytest.mark.parametrize("name", STUDENTS)
def test_every_tensor_of_a_student_is_one_of_the_teachers_and_none_goes_silently(name):
    teacher_name, recipe = STUDENTS[name]
    teacher = getattr(UNetConfig, teacher_name)()
    given = _meta_state(teacher)
    state, report = inherit(given, plan_student(teacher, PUBLISHED[recipe]))
    own = _meta_state(getattr(UNetConfig, name)())
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in own.items()
    }
    assert [one.name for one in report.inherited] == list(own)
    origins = [one.origin for one in report.inherited]
    assert sorted(origins + [one.name for one in report.left_out]) == sorted(given)
    assert all(state[one.name] is given[one.origin] for one in report.inherited)
    assert (report.student_parameters, len(report.inherited)) == COUNTS[name][:2]
    assert report.teacher_parameters == COUNTS[teacher_name][0]
    assert report.left_out_parameters == COUNTS[teacher_name][0] - COUNTS[name][0]


def test_the_report_sums_each_stage():
    teacher = UNetConfig.sdxl()
    _, report = inherit(_meta_state(teacher), plan_student(teacher, PUBLISHED["koala_700m"]))
    stages = report.by_stage()
    assert list(stages) == [
        "conv_in",
        "time_embedding",
        "add_embedding",
        *(f"down_blocks.{level}" for level in range(3)),
        "mid_block",
        *(f"up_blocks.{index}" for index in range(3)),
        "conv_norm_out",
        "conv_out",
    ]
    millions = [round(before / 1e6, 1) for before, _ in stages.values()]
    assert millions[3:9] == [5.4, 60.1, 757.4, 413.1, 1206.6, 106.3]
    assert stages["mid_block"][1] == 0
    assert sum(before for before, _ in stages.values()) == COUNTS["sdxl"][0]
    assert sum(after for _, after in stages.values()) == COUNTS["koala_700m"][0]


@pytest.fixture
def network(randomise: Callable[[nn.Module], None]) -> Callable[[UNetConfig], UNet]:
    def build(config: UNetConfig) -> UNet:
        network = UNet(config)
        randomise(network)
        return network.eval()

    return build


@torch.no_grad()
def _predict(network: UNet, condition: Callable[..., Any]) -> Tensor:
    x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(3))
    return network(x, torch.tensor([700.0, 20.0]), condition(network.config))


def _student(teacher: UNet, recipe: Recipe) -> UNet:
    plan = plan_student(teacher.config, recipe)
    student = UNet(plan.student)
    student.load_state_dict(inherit(teacher.state_dict(), plan)[0], strict=True)
    return student


@pytest.mark.parametrize("name", ["koala_700m", "ssd_1b", "bk_tiny", "bk_v2_small"])
def test_a_student_predicts_something_else_than_its_teacher(network, condition, name):
    teacher_name, recipe = STUDENTS[name]
    teacher = network(toy_of(getattr(UNetConfig, teacher_name)()))
    expected = _predict(teacher, condition)
    found = _predict(_student(teacher, PUBLISHED[recipe]), condition)
    assert found.shape == expected.shape
    assert found.isfinite().all()
    assert (found - expected).abs().max() > 1e-3


def test_a_student_that_lacks_nothing_predicts_what_its_teacher_does(network, condition):
    teacher = network(toy_of(UNetConfig.sdxl()))
    found = _predict(_student(teacher, Recipe()), condition)
    assert torch.equal(found, _predict(teacher, condition))


def test_removing_a_block_that_adds_nothing_changes_nothing(network, condition):
    teacher = network(toy_of(UNetConfig.sdxl()))
    removed = "up_blocks.0.attentions.1.transformer_blocks.3"
    block = teacher.get_submodule(removed)
    with torch.no_grad():
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            last.weight.zero_()
            last.bias.zero_()
    expected = _predict(teacher, condition)
    assert torch.equal(_predict(_student(teacher, Recipe((removed,))), condition), expected)
    # The same of a block that does something is seen: the comparison above can fail.
    other = Recipe((removed.replace(".3", ".4"),))
    assert not torch.equal(_predict(_student(teacher, other), condition), expected)


def test_weights_of_another_teacher_are_refused():
    teacher = toy_of(UNetConfig.sdxl())
    plan = plan_student(teacher, PUBLISHED["vega"])
    state = _meta_state(teacher)
    name = "conv_in.weight"
    for given, message in (
        ({key: value for key, value in state.items() if key != name}, f"lacks {name}"),
        ({**state, "extra": state[name]}, "has besides extra"),
        ({**state, name: state["conv_out.weight"]}, f"has in other shapes {name}"),
        (_meta_state(plan.student), "lacks .* and 1111 more"),
    ):
        with pytest.raises(ValueError, match=message):
            inherit(given, plan)
