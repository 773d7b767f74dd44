"""Stage B and Stage C learn one batch by heart, and only if every part that should teach does.

The loss is measured on draws that training never sees, most of them noisy, where little but the
condition tells the samples apart: a network that is not told, or does not learn, can't get there.
(Whole runs, from their files to their exports, are test_kinds.py's.)
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cascade.config import load_yaml
from train.data.cached import CachedBatch
from train.draws import StepDraws
from train.systems.stage_b import StageBRun, StageBSystem
from train.systems.stage_c import StageCRun, StageCSystem

pytestmark = pytest.mark.slow

SAMPLES, STEPS, LEARNT = 4, 200, 0.1
UNSEEN_STEPS = range(10**6, 10**6 + 16)
SECTIONS = {
    "run": {"max_steps": STEPS},
    "optim": {"name": "adamw", "lr": 1e-2, "warmup_steps": 10, "schedule": "cosine"},
    # The error of x0 has one size at all noise levels: no easy level hides a hard one.
    "diffusion": {
        "prediction": "x0",
        "schedule": "cosine",
        "weight": "constant",
        "draw": "noisy",
    },
}
TOLD_TEXT = {"caption_dropout": 0.0}
TOLD_NO_TEXT = {"caption_dropout": 1.0}
TOLD_LATENTS = {"condition_dropout": 0.0, "condition_noise": 0.0}
TOLD_NO_LATENTS = {"condition_dropout": 1.0}
FROZEN = {"optim": {**SECTIONS["optim"], "lr": 1e-12}}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(cells: int) -> CachedBatch:
    """Random pictures and texts; Stage A's latents are of ``cells`` x ``cells`` plain squares.

    A text is the same at every position, so it can only tell of one square.
    """
    squares = normal(1, SAMPLES, 4, cells, cells)
    return CachedBatch(
        captions=["a"] * SAMPLES,
        groups=torch.arange(SAMPLES),
        pixels=normal(0, SAMPLES, 3, 32, 32).sigmoid(),
        stage_a_latents=squares.repeat_interleave(8 // cells, 2).repeat_interleave(8 // cells, 3),
        stage_c_latents=normal(2, SAMPLES, 16, 2, 2),
        text_hidden=normal(3, SAMPLES, 3, 16),
        text_pooled=normal(4, SAMPLES, 12),
    )


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def loss_falls_to(monkeypatch):
    """Train with the system's own step and optimizer; return last loss over first."""

    def train(system: StageBSystem | StageCSystem, batch: CachedBatch) -> float:
        now = StepDraws(0, 0)
        monkeypatch.setattr(f"{type(system).__module__}.step_draws", lambda *_: now)
        for name in ("log", "log_dict"):
            monkeypatch.setattr(system, name, lambda *_, **__: None)
        system._trainer = types.SimpleNamespace(global_step=0)

        @torch.no_grad()
        def measured() -> float:
            nonlocal now
            losses = []
            for number in UNSEEN_STEPS:
                now = StepDraws(0, number)
                losses.append(system.training_step(batch, 0).item())
            return sum(losses) / len(losses)

        made = system.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        first = measured()
        for number in range(STEPS):
            now = StepDraws(0, number)
            optimizer.zero_grad()
            system.training_step(batch, 0).backward()
            optimizer.step()
            schedule.step()
        return measured() / first

    return train


def null_text() -> tuple[Tensor, Tensor]:
    return torch.zeros(3, 16), torch.zeros(12)


def stage_c(make_run, sections: dict) -> StageCSystem:
    run = make_run("stage_c", **{**SECTIONS, **sections})
    return StageCSystem(load_yaml(StageCRun, run.config), null_text())


def stage_b(make_run, sections: dict) -> StageBSystem:
    sizes = {"hidden_channels": [16, 32]}
    run = make_run("stage_b", **{**SECTIONS, "model": sizes, **sections})
    return StageBSystem(load_yaml(StageBRun, run.config), null_text())


def only_the_end_learns(system: StageBSystem | StageCSystem) -> None:
    """Leave every layer but the last as it was made, as one ``detach`` too many would."""
    for name, parameter in system.network.named_parameters():
        parameter.requires_grad_(name.startswith("out."))
    assert any(parameter.requires_grad for parameter in system.network.parameters())


def test_stage_c_learns_a_batch_from_its_texts(make_run, loss_falls_to):
    assert loss_falls_to(stage_c(make_run, TOLD_TEXT), batch_of(1)) < LEARNT


@pytest.mark.parametrize("sections", [TOLD_NO_TEXT, TOLD_TEXT | FROZEN], ids=["text", "optimizer"])
def test_stage_c_does_not_learn_it_without(sections, make_run, loss_falls_to):
    assert loss_falls_to(stage_c(make_run, sections), batch_of(1)) > 2 * LEARNT


@pytest.mark.parametrize(
    ("sections", "cells"),
    [(TOLD_TEXT | TOLD_NO_LATENTS, 1), (TOLD_NO_TEXT | TOLD_LATENTS, 2)],
    ids=["texts", "pictures"],
)
def test_stage_b_learns_a_batch_from_its(sections, cells, make_run, loss_falls_to):
    assert loss_falls_to(stage_b(make_run, sections), batch_of(cells)) < LEARNT


def test_stage_b_does_not_learn_it_without_a_condition(make_run, loss_falls_to):
    system = stage_b(make_run, TOLD_NO_TEXT | TOLD_NO_LATENTS)
    assert loss_falls_to(system, batch_of(2)) > 2 * LEARNT


@pytest.mark.parametrize("make", [stage_b, stage_c])
def test_the_last_layer_alone_does_not_learn_it(make, make_run, loss_falls_to):
    system = make(make_run, TOLD_TEXT)
    only_the_end_learns(system)
    assert loss_falls_to(system, batch_of(2)) > 2 * LEARNT
