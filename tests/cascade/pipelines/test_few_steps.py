from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from cascade.errors import UserError
from cascade.pipelines.few_steps import (
    DISTILLED_KEY,
    as_distilled,
    check_told,
    choose,
    distilled_metadata,
    distilled_said,
    own_choice,
)
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.plan import Settings, make_plan
from cascade.pipelines.spec import CascadeSpec, StageSampling

FEW = StageSampling("lcm", 4, 4.0, guidance_range=(1.0, 6.0), max_steps=8)
SPEC = CascadeSpec(name="demo", image_size=128, pixels_per_stage_c_cell=16.0)
BOTH = replace(SPEC, stage_c_few=FEW)


@pytest.mark.parametrize(
    ("settings", "few", "steps"),
    [
        ({}, True, 4),
        ({"steps_c": 8}, True, 8),
        ({"steps_c": 9}, False, 9),
        ({"sampler": "ddim"}, False, 20),
        ({"sampler": "ddim", "steps_c": 20}, False, 20),
    ],
)
def test_the_number_of_steps_says_which_network_draws(settings, few, steps) -> None:
    plan = make_plan(BOTH, "a hat", Settings(**settings))
    assert (plan.few == {"stage_c"}, plan.stage_c.steps) == (few, steps)
    assert plan.stage_c.is_guided_by_passes is not few


def test_a_model_may_prefer_its_plain_network() -> None:
    plain = replace(BOTH, prefers_few=False)
    assert own_choice(BOTH) == {"stage_c"} and own_choice(plain) == own_choice(SPEC) == frozenset()
    assert make_plan(plain, "a hat").stage_c == SPEC.stage_c
    assert choose(plain, "stage_c", 4, None) == (FEW, {"stage_c"})


def test_times_of_the_models_own_steps_are_kept() -> None:
    times = (1.0, 0.8, 0.5, 0.3, 0.0)
    spec = replace(SPEC, stage_c_few=replace(FEW, times=times))
    assert make_plan(spec, "a hat").stage_c.times == times
    assert make_plan(spec, "a hat", Settings(steps_c=4)).stage_c.times == times
    assert make_plan(spec, "a hat", Settings(steps_c=2)).stage_c.times == ()


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (replace(SPEC, stage_c=FEW), {"steps_c": 9}, "takes up to 8, and the model has no plain"),
        (replace(SPEC, stage_c=FEW), {"sampler": "ddim"}, "distilled for few steps of 'lcm'"),
        (SPEC, {"sampler": "lcm"}, "steps were not distilled into this Stage C"),
        (BOTH, {"guidance_c": 6.5}, "guidance_c 6.5: 1 to 6 were distilled into this network"),
        (
            replace(BOTH, stage_c_few=replace(FEW, guidance_range=(4.0, 4.0))),
            {"guidance_c": 3},
            "4 alone was distilled",
        ),
    ],
)
def test_what_a_network_was_not_distilled_for_is_refused(spec, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(spec, "a hat", Settings(**settings))


def test_a_negative_prompt_without_a_second_pass_is_noted() -> None:
    unguided = replace(BOTH, stage_b=replace(SPEC.stage_b, guidance=1.0))
    plan = make_plan(unguided, "a hat", Settings(negative_prompt="red"))
    assert plan.notices == (
        "the negative prompt has no effect: guidance was distilled into the networks",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 7.0}, "1 <= low <= guidance <= high"),
        ({"rescale": 0.5}, "there is one pass"),
        ({"steps": 9}, "steps is 9, max_steps 8"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FEW, **changes)
    with pytest.raises(ValueError, match=r"stage_c_few\.max_steps is missing"):
        replace(SPEC, stage_c_few=StageSampling())


def test_a_file_says_how_its_network_is_sampled() -> None:
    plain = StageSampling(prediction="v", rescale=0.7, guidance=2.0)
    said = as_distilled(plain, distilled_metadata(FEW), "x.safetensors")
    assert said == replace(FEW, prediction="v")
    assert as_distilled(plain, {}, "x.safetensors") == plain
    assert set(distilled_metadata(FEW)) == {DISTILLED_KEY}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "is no JSON object"),
        ('{"steps": "x"}', "steps"),
        ('{"guidance_range": 3}', "guidance_range"),
        ('{"guidance_range": [9, 2]}', "1 <= low <= guidance <= high"),
        ('{"steps": 4, "times": [1, 0]}', "4 steps need one more"),
        ('{"shift": 2.0}', "says shift, which no distilled network's does"),
    ],
)
def test_a_damaged_word_of_a_file_is_one_line_that_names_it(said, message) -> None:
    with pytest.raises(UserError, match=rf"^x\.safetensors: its metadata's .*{message}"):
        distilled_said({DISTILLED_KEY: said}, "x.safetensors")


def test_a_walk_that_begins_within_is_not_for_jumps_from_step_to_step() -> None:
    jumps = replace(FEW, sampler="ddim", max_steps=4, times=(1.0, 0.9, 0.7, 0.4, 0.0))
    picture = PictureInput(Image.new("RGB", (128, 128)), "img2img", strength=0.6)
    whole = replace(picture, strength=1.0)
    both = replace(SPEC, stage_c_few=jumps)
    assert make_plan(both, "a hat", picture=picture).few == frozenset()
    assert make_plan(both, "a hat", picture=whole).few == {"stage_c"}
    # Jumps to clean latents begin anywhere.
    assert make_plan(BOTH, "a hat", picture=picture).few == {"stage_c"}
    alone = replace(SPEC, stage_c=jumps)
    assert make_plan(alone, "a hat", picture=whole).stage_c == jumps
    with pytest.raises(UserError, match="strength: this Stage C was distilled for whole walks"):
        make_plan(alone, "a hat", picture=picture)


@pytest.mark.parametrize(
    ("settings", "few"),
    [({}, True), ({"steps_c": 4}, True), ({"steps_c": 3}, False), ({"sampler": "lcm"}, None)],
)
def test_jumps_from_step_to_step_are_for_their_own_number_of_steps(settings, few) -> None:
    jumps = replace(FEW, sampler="ddim", max_steps=4, times=(1.0, 0.9, 0.7, 0.4, 0.0))
    both = replace(SPEC, stage_c_few=jumps)
    if few is None:
        with pytest.raises(UserError, match="sampler 'lcm': steps were not distilled into"):
            make_plan(both, "a hat", Settings(**settings))
        return
    plan = make_plan(both, "a hat", Settings(**settings))
    assert (plan.few == {"stage_c"}) is few
    assert plan.stage_c.times == (jumps.times if few else ())
    alone = replace(SPEC, stage_c=jumps)
    with pytest.raises(UserError, match="distilled for 4 steps alone, and the model has no plain"):
        make_plan(alone, "a hat", Settings(steps_c=2))
    with pytest.raises(UserError, match="distilled for few steps of 'ddim'"):
        make_plan(alone, "a hat", Settings(sampler="ddpm"))


def test_a_network_is_told_a_scale_if_its_settings_say_so() -> None:
    check_told("Stage C", ("cfg",), FEW)
    check_told("Stage C", (), replace(FEW, guidance_range=(4.0, 4.0)))
    with pytest.raises(UserError, match=r"its guidance_range is not in model\.json"):
        check_told("Stage C", ("sca", "cfg"), SPEC.stage_c)
    with pytest.raises(UserError, match="the network is told no scale"):
        check_told("Stage C", (), FEW)
