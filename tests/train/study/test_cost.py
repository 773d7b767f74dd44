"""What a study would cost: operations on meta are those of a real step; tables are of rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers.models.clip.configuration_clip import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import (
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from cascade.config import from_dict, load_yaml
from cascade.errors import UserError, run_main
from cascade.evaluate.flops import FlopCounter
from tests.train.conftest import write_curve
from train.distill.bias_curve import BiasPoint
from train.study.__main__ import main
from train.study.cost import DeviceRate, cost_of_arm
from train.study.published_sizes import Tower, picture_tower_flops
from train.study.rates import load_compression
from train.study.settings import ArmConfig, BudgetConfig, StudyConfig
from train.study.spent import read_ledger, spent_until
from train.study.step_flops import StepFlops, count_step

STUDIES = Path(__file__).parents[3] / "configs" / "study"
MODEL = {"command": "train.assemble", "config": "m.yaml"}


def arm_of(kind: str, config: Path) -> ArmConfig:
    step = {"name": "x", "train": kind, "config": str(config), "share": 1.0}
    return from_dict(ArmConfig, {"name": "one", "steps": [step], "model": MODEL}, "study.yaml")


@pytest.mark.parametrize("kind", ["stage_a", "stage_b", "stage_c", "unet", "unet_kd"])
def test_a_step_on_meta_takes_what_the_ledger_of_a_real_one_counts(kind, make_run):
    sections: dict[str, object] = {"run": {"log_every_steps": 3, "max_steps": 3}}
    if kind == "stage_c":
        sections["optim"] = {"name": "muon"}
    run = make_run(kind, kind, **sections)
    assert run.start() == 0
    spent = spent_until(read_ledger(run.out))
    assert spent.flops is not None
    arm = arm_of(kind, run.config)
    counted = count_step(arm.last, arm, 32)
    # The first steps of Stage A have no discriminator, and a draw says whether they quantize.
    # Fused attention computes its scores again on the way back; plain products do not.
    tolerance = 0.6 if kind == "stage_a" else 0.02
    assert counted.learning == pytest.approx(spent.flops / spent.samples, rel=tolerance)
    taught = spent_until(read_ledger(run.out), whose="teacher")
    assert taught.flops is not None and (counted.teacher > 0) == (kind == "unet_kd")
    assert counted.teacher == pytest.approx(taught.flops / spent.samples, rel=0.02)
    assert (taught.device_seconds > 0) == (kind == "unet_kd") and taught.samples == 0


SELDOM = {"log_every_steps": 3, "max_steps": 3}
ONLINE = {"align": {"weight": 0.5, "source": "latents", "hidden_channels": 8}}
CACHED = {"align": {"weight": 0.5, "hidden_channels": 8}}
RELATED = {"relations": {"weight": 2.0, "min_log_snr": -100.0}}
TRUSTED = {"estimate": {"weight": 0.25}}


@pytest.mark.parametrize("terms", [{}, ONLINE, CACHED, RELATED, ONLINE | RELATED, TRUSTED])
def test_what_a_teacher_of_pictures_takes_is_what_the_ledger_counts(
    terms, make_taught, tiny_unet, tiny_model, tmp_path
):
    sections = dict(terms)
    if terms is TRUSTED:
        at_any_noise = (BiasPoint(0, 90.0, 1.0, 0.0), BiasPoint(999, -90.0, 1.0, 0.0))
        curve = write_curve(tmp_path / "any.json", tiny_unet, tiny_model, points=at_any_noise)
        sections = {"estimate": {"weight": 0.25, "curve": curve}}
    run = make_taught(run=SELDOM, **sections)
    assert run.start() == 0
    rows = read_ledger(run.out)
    own, taught = spent_until(rows), spent_until(rows, whose="teacher")
    assert own.flops is not None and taught.flops is not None
    arm = arm_of("cascade_kd", run.config)
    counted = count_step(arm.last, arm, 32)
    assert counted.learning == pytest.approx(own.flops / own.samples, rel=0.02)
    assert counted.teacher == pytest.approx(taught.flops / own.samples, rel=0.02)
    assert (counted.teacher > 0) == (terms not in ({}, CACHED)) and counted.encoders == 0


def test_without_a_cache_features_of_pictures_are_made_in_the_step(make_taught):
    online, cached = (
        make_taught(name, run=SELDOM, data={"folder": None}, **terms).config
        for name, terms in (("online", ONLINE), ("cached", CACHED))
    )
    found = [
        count_step(arm.last, arm, 32)
        for arm in (arm_of("cascade_kd", online), arm_of("cascade_kd", cached))
    ]
    assert found[0].learning == found[1].learning and found[1].teacher == 0
    assert found[1].encoders == pytest.approx(found[0].encoders + found[0].teacher)


def test_a_teacher_is_counted_for_the_share_of_samples_that_it_is_asked_about(make_taught):
    found = []
    for number, bound in enumerate((-100.0, 0.0, 100.0)):
        relations = {"weight": 1.0, "min_log_snr": bound}
        run = make_taught(f"r{number}", run=SELDOM, relations=relations)
        arm = arm_of("cascade_kd", run.config)
        found.append(count_step(arm.last, arm, 32).teacher)
    # The straight path is at log-SNR 0 half-way, and its times are drawn around the middle.
    assert found[1] == pytest.approx(found[0] / 2, rel=0.05) and found[2] == 0


@pytest.mark.parametrize("pictures", [False, True])
def test_a_towers_operations_are_those_of_transformers(pictures):
    sizes = {"hidden_size": 28, "num_hidden_layers": 3, "intermediate_size": 40}
    sizes |= {"num_attention_heads": 2, "projection_dim": 12}
    tower = Tower(28, 3, 40, 12)
    if pictures:
        config = CLIPVisionConfig(**sizes, image_size=56, patch_size=14)
        model = CLIPVisionModelWithProjection(config)
        given, wanted = {"pixel_values": torch.zeros(1, 3, 56, 56)}, picture_tower_flops(tower, 56)
    else:
        config = CLIPTextConfig(**sizes, vocab_size=99, max_position_embeddings=20)
        model = CLIPTextModelWithProjection(config)
        given, wanted = {"input_ids": torch.zeros(1, 20, dtype=torch.long)}, tower.flops(20)
    with torch.no_grad(), FlopCounter() as counter:
        model(**given)
    assert counter.total == pytest.approx(wanted, rel=0.02)


def budget(unit: str, teacher: str = "apart") -> BudgetConfig:
    return from_dict(BudgetConfig, {"unit": unit, "amounts": [1000.0], "teacher": teacher}, "b")


def test_a_budget_becomes_samples_and_hours_by_the_rate():
    steps = [
        {"name": "b", "train": "stage_b", "config": "b.yaml", "share": 0.25},
        {"name": "c", "train": "stage_c", "config": "c.yaml", "share": 0.75},
    ]
    arm = from_dict(ArmConfig, {"name": "one", "steps": steps, "model": MODEL}, "study.yaml")
    counted = {"b": StepFlops(1, 8.0, 0.0, 2.0), "c": StepFlops(1, 3.0, 1.0, 0.0)}
    by_seconds = cost_of_arm(arm, 1000, budget("device_seconds"), counted, 100.0)
    assert [one.samples for one in by_seconds] == [2500, 25000]
    # The teacher's operations take the device's time as well, and are told apart.
    assert [one.device_seconds for one in by_seconds] == [250, 1000]
    both = cost_of_arm(arm, 1000, budget("device_seconds", "counted"), counted, 100.0)
    assert [one.samples for one in both] == [2500, 18750]
    # A budget of FLOPs is spent by what is learned; encoders take time beside it.
    by_flops = cost_of_arm(arm, 1000, budget("flops"), counted, 100.0)
    assert [one.samples for one in by_flops] == [31.25, 250]
    assert by_flops[0].device_seconds == pytest.approx(3.125)
    by_samples = cost_of_arm(arm, 1000, budget("samples"), counted, 100.0)
    assert [one.samples for one in by_samples] == [250, 750]


def test_a_rate_says_where_it_is_from(tmp_path):
    rate = {"name": "mine", "source": "a run", "tflops": 1.0}
    assert DeviceRate(**rate).flops_per_second == 1e12
    for change, message in (
        ({"source": " "}, "source is empty"),
        ({"tflops": None}, "tflops or ledger"),
        ({"price_per_hour": 2.0}, "belong together"),
        ({"tflops": -1.0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            DeviceRate(**rate | change)
    row = {"samples": 4, "seconds": {}, "device_seconds": 5.0, "flops": 20.0}
    row |= {"energy_j": None, "peak_memory_mib": 1}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row) + "\n")
    assert DeviceRate("mine", "a run", ledger=str(tmp_path)).flops_per_second == 4.0
    compiled = DeviceRate("mine", "a run", ledger=str(tmp_path))
    (tmp_path / "ledger.jsonl").write_text(json.dumps(row | {"flops": None}) + "\n")
    with pytest.raises(UserError, match="tells no FLOPs"):
        _ = compiled.flops_per_second


@pytest.mark.slow
def test_the_full_sized_arms_learn_the_published_numbers_of_parameters():
    config = load_yaml(StudyConfig, STUDIES / "sdxl_budget.yaml")
    found = {
        (arm.name, step.name): count_step(step, arm, 1024)
        for arm in config.arms
        for step in arm.steps
        if step.train is not None and arm.name != "cascade with the teacher's data"
    }
    learns = {key: one.parameters for key, one in found.items()}
    assert learns["KOALA-700M", "unet_kd"] == learns["U-Net from scratch", "unet"] == 782_822_724
    assert learns["BK-style", "unet_kd"] == 1_717_277_764
    assert learns["cascade from scratch", "stage_a"] == 18_406_894 + 6_271_105
    assert learns["cascade from scratch", "stage_b"] == 699_471_248 + 20_197_968
    assert 1.0e9 < learns["cascade from scratch", "stage_c"] < 1_030_785_040
    # Three forward passes take 3.52 TFLOP with the text's keys and values left out.
    assert 3.5e12 < found["cascade from scratch", "stage_c"].learning < 4.5e12
    koala = found["KOALA-700M", "unet_kd"]
    assert koala.teacher == pytest.approx(2 * 3.381e12, rel=0.01), "SDXL's multiply-accumulates"
    # Three forward passes, and a fourth of the blocks, which are computed again.
    assert 3 * 2 * 1.351e12 < koala.learning < 4 * 2 * 1.351e12


@pytest.mark.slow
def test_the_table_of_a_full_sized_sweep_has_a_row_for_each_training(capsys):
    path = STUDIES / "sdxl_compression.yaml"
    assert len(load_compression(path).study.arms) == 6 + 1
    words = ["cost", "--config", str(path), "--rates", str(STUDIES / "sdxl" / "rates.yaml")]
    assert run_main(lambda: main(words)) == 0
    printed = " ".join(capsys.readouterr().out.split())  # columns are padded
    assert printed.count("| stage_c |") == (6 + 1) * 3
    # 1,600 GPU hours an arm: the rate says how many samples, the budget how many hours.
    assert printed.count("| the arm | | 1,600 |") == 14
    assert "All of it, 1 seeds: 11,200 device hours" in printed
    assert "Rate: measured on one H200" in printed and "Price" not in printed


def test_what_can_not_be_counted_is_told_in_one_line(make_run, tmp_path, capsys):
    arm = arm_of("previewer", make_run("previewer", "previewer").config)
    with pytest.raises(UserError, match="steps of previewer are not counted beforehand"):
        count_step(arm.last, arm, 32)
    (tmp_path / "rates.yaml").write_text("rates: []\n")
    words = ["cost", "--config", str(STUDIES / "smoke.yaml"), "--rates", f"{tmp_path}/rates.yaml"]
    assert run_main(lambda: main(words)) == 2
    assert "rates is empty" in capsys.readouterr().err
