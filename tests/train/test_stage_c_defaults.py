"""A new Stage C learns by the recipe that won, key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade.config import from_dict, read_yaml, to_dict
from stages.stage_c import StageCConfig
from train.losses.denoising import DiffusionConfig
from train.settings import OptimConfig
from train.systems.stage_c import StageCRun

ROOT = Path(__file__).parents[2]
SMALLEST: dict[str, Any] = {
    "run": {"out": "x", "max_steps": 10},
    "data": {"shards": "x.tar", "batch_size": 2},
    "text": "x",
    "compressor": "x",
    "model": {},
}
BEST = {
    "optim": {"name": "muon", "muon_lr": 0.02, "lr": 3e-3, "warmup_steps": 30},
    "diffusion": {
        "prediction": "flow",
        "schedule": "linear",
        "weight": "constant",
        "draw": "logit_normal",
        "stratified": False,
    },
}


def run_of(**sections: object) -> StageCRun:
    return from_dict(StageCRun, {**SMALLEST, **sections}, "run.yaml")


@pytest.mark.parametrize("given", [{}, {"optim": None, "diffusion": None}])
def test_a_run_that_says_nothing_learns_by_the_recipe_that_won(given):
    run = run_of(**given)
    for section, values in BEST.items():
        found = to_dict(getattr(run, section))
        assert {key: found[key] for key in values} == values
    assert run.sizes == StageCConfig(qk_norm=True)
    modern = from_dict(
        StageCRun, read_yaml(ROOT / "configs/recipes/stage_c_modern.yaml"), "modern.yaml"
    )
    assert (modern.optim, modern.diffusion) == (run.optim, run.diffusion)
    assert isinstance(modern.sizes, StageCConfig) and modern.sizes.qk_norm


def test_a_key_that_is_given_leaves_the_others():
    run = run_of(optim={"weight_decay": 0.1}, diffusion={"shift": 2.0}, model={"dropout": 0.1})
    found = {**to_dict(run.optim), **to_dict(run.diffusion)}
    assert found.items() >= {**BEST["optim"], **BEST["diffusion"]}.items()
    assert (found["weight_decay"], found["shift"]) == (0.1, 2.0)
    assert run.sizes == StageCConfig(qk_norm=True, dropout=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_another_optimizer_has_rates_of_its_own(name):
    assert to_dict(run_of(optim={"name": name}).optim) == to_dict(OptimConfig(name=name))
    given = run_of(optim={"name": name, "lr": 2e-4}).optim
    assert to_dict(given) == to_dict(OptimConfig(name=name, lr=2e-4))


@pytest.mark.parametrize(
    "given", [{"prediction": "epsilon"}, {"prediction": "v"}, {"schedule": "cosine"}]
)
def test_another_prediction_or_schedule_has_the_published_values(given):
    assert to_dict(run_of(diffusion=given).diffusion) == to_dict(DiffusionConfig(**given))


def test_what_a_run_notes_reads_back_as_itself():
    for optim in ({}, {"name": "adamw"}):
        run = run_of(optim=optim, model={"qk_norm": False})
        again = from_dict(StageCRun, to_dict(run), "config.yaml")
        assert again == run and not again.sizes.qk_norm
