from __future__ import annotations

from typing import Any

import pytest

from cascade.errors import UserError
from cascade.pipelines.plan import Request, Settings, make_plan
from cascade.pipelines.spec import CascadeSpec
from cascade.rng import MAX_SEED

SPEC = CascadeSpec(name="demo", image_size=128, pixels_per_stage_c_cell=16.0)


def test_what_is_not_said_is_the_models_own() -> None:
    plan = make_plan(SPEC, "a hat")
    assert (plan.width, plan.height) == (128, 128)
    assert (plan.stage_c, plan.stage_b) == (SPEC.stage_c, SPEC.stage_b)
    assert plan.notices == ()


def test_what_is_said_reaches_its_stage() -> None:
    plan = make_plan(
        SPEC,
        "a hat",
        Settings(
            steps_c=3,
            steps_b=4,
            guidance_c=5,
            guidance_b=1,
            guidance_interval=(0.2, 0.9),
            sampler="ddim",
        ),
    )
    assert plan.stage_c.guidance_interval == (0.2, 0.9)
    assert plan.stage_b.guidance_interval == (0.0, 1.0)
    assert (plan.stage_c.steps, plan.stage_c.guidance, plan.stage_c.sampler) == (3, 5.0, "ddim")
    assert (plan.stage_b.steps, plan.stage_b.guidance, plan.stage_b.sampler) == (4, 1.0, "ddim")


def test_seeds_count_up_from_the_first_for_each_prompt() -> None:
    plan = make_plan(SPEC, ["a", "b"], Settings(seed=7, num_images=2))
    assert plan.requests == (Request("a", 7), Request("a", 8), Request("b", 7), Request("b", 8))


def test_seeds_can_be_given_one_by_one() -> None:
    plan = make_plan(SPEC, ["a", "b"], Settings(seeds=[5, 2]))
    assert plan.requests == (Request("a", 5), Request("b", 2))


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert make_plan(SPEC, "a").requests[0].seed != make_plan(SPEC, "a").requests[0].seed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "  \t"}, "the prompt is empty"),
        ({"prompt": ["a", " "]}, "prompt 2 of 2 is empty"),
        ({"prompt": []}, "no prompt given"),
        ({"prompt": "\udce4"}, "not valid text"),
        ({"num_images": 0}, "num_images 0"),
        ({"num_images": True}, "num_images True"),
        ({"steps_c": 0}, "steps_c 0"),
        ({"steps_b": 10**9}, "steps_b 1000000000"),
        ({"guidance_c": 0.5}, "guidance_c 0.5: 1 switches guidance off"),
        ({"guidance_interval": (0.8, 0.2)}, "guidance_interval is .0.8, 0.2.; 0 <= from <= to"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval is .0.0, nan."),
        ({"guidance_b": float("nan")}, "guidance_b nan"),
        ({"guidance_b": 1e39}, "1000 is the strongest"),
        ({"guidance_c": "4"}, "guidance_c 4"),
        ({"sampler": "dpmpp2m"}, "did you mean 'dpmpp_2m'"),
        ({"seed": -1}, "seed -1"),
        ({"seed": MAX_SEED, "num_images": 2}, "runs beyond"),
        ({"seeds": [1, 2]}, "2 seeds for 1 pictures"),
        ({"seed": 1, "seeds": [1]}, "exclude each other"),
        ({"width": 7}, "width 7"),
        ({"width": 64.5}, "width 64.5: a whole number"),
        ({"height": "64"}, "height '64': a whole number"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prompt = settings.get("prompt", "a hat")
        rest = {key: value for key, value in settings.items() if key != "prompt"}
        make_plan(SPEC, prompt, Settings(**rest))
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_without_guidance_is_told_to_have_no_effect() -> None:
    plan = make_plan(SPEC, "a", Settings(negative_prompt="blur", guidance_c=1, guidance_b=1))
    assert any("no effect" in notice for notice in plan.notices)
    assert not make_plan(SPEC, "a", Settings(negative_prompt="blur")).notices
