"""Steps whose gradients are not finite are left out, and end the run when they recur."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cascade.errors import UserError
from train.callbacks.checkpoints import newest_checkpoint
from train.systems.previewer import PreviewerSystem
from train.systems.stage_c import StageCSystem


@pytest.fixture
def poison(monkeypatch):
    """Make the loss of given steps (by Lightning's count) not a number."""

    def at(*steps: int) -> None:
        whole = PreviewerSystem.training_step

        def poisoned(self, batch, batch_idx):
            loss = whole(self, batch, batch_idx)
            return loss * math.nan if self.global_step in steps else loss

        monkeypatch.setattr(PreviewerSystem, "training_step", poisoned)

    return at


def state_of(run) -> dict[str, torch.Tensor]:
    return torch.load(newest_checkpoint(run.out), weights_only=True)


def test_a_step_that_is_lost_is_left_out_and_counted(make_run, poison, caplog):
    run = make_run("previewer", run={"checkpoint_every_steps": 1, "keep_checkpoints": 9})
    poison(2)
    assert run.start("--run.max_steps", 4) == 0
    before, after, end = (
        torch.load(run.out / f"checkpoints/step={step}.ckpt", weights_only=True)
        for step in (2, 3, 4)
    )
    for key, value in before["state_dict"].items():  # batch norms' statistics too
        assert torch.equal(value, after["state_dict"][key]), key
    moments = [one["optimizer_states"][0]["state"][0] for one in (before, after)]
    assert all(torch.equal(value, moments[1][key]) for key, value in moments[0].items())
    assert any(
        not torch.equal(value, end["state_dict"][key])
        for key, value in before["state_dict"].items()
    )
    assert "step 3 is left out: its gradients are not finite (1 in a row, 1 in all)" in caplog.text
    counts = {row["skipped_steps"] for row in run.metrics() if row.get("skipped_steps")}
    assert {float(count) for count in counts} == {1.0}


def test_steps_that_stay_lost_end_the_run_and_keep_the_batch(make_run, poison):
    run = make_run("previewer", run={"max_skipped_steps": 2})
    poison(*range(1, 100))
    with pytest.raises(UserError, match="3 steps in a row had gradients that are not finite"):
        run.start("--run.max_steps", 50)
    assert not (run.out / "done").exists()
    with safe_open(run.out / "bad_batch_rank0.safetensors", framework="pt") as file:
        assert "captions" in file.metadata() and "pixels" in file.keys()
    assert state_of(run)["global_step"] <= 2


def test_the_batch_that_is_kept_is_the_one_that_was_lost(make_run, monkeypatch):
    sections = {"accumulate": 3, "max_skipped_steps": 1}
    run = make_run("stage_c", run=sections, data={"batch_size": 2})
    whole, lost = StageCSystem.training_step, []

    def poisoned(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        if batch_idx % 3 == 1:
            lost.append(batch.text_pooled.clone())
            return loss * math.nan
        return loss

    monkeypatch.setattr(StageCSystem, "training_step", poisoned)
    with pytest.raises(UserError, match="2 steps in a row"):
        run.start("--run.max_steps", 50)
    kept = load_file(run.out / "bad_batch_rank0.safetensors")
    assert torch.equal(kept["text_pooled"], lost[-1])


def test_values_that_are_lost_inside_do_not_stay_in_batch_norms(make_run, monkeypatch):
    run = make_run("previewer", run={"checkpoint_every_steps": 1})
    whole = PreviewerSystem.training_step

    def poisoned(self, batch, batch_idx):
        if self.global_step == 1:
            batch.stage_c_latents = batch.stage_c_latents * math.inf
        return whole(self, batch, batch_idx)

    monkeypatch.setattr(PreviewerSystem, "training_step", poisoned)
    assert run.start("--run.max_steps", 4) == 0
    assert all(value.isfinite().all() for value in state_of(run)["state_dict"].values())
    assert (run.out / "done").is_file()


def test_micro_batches_are_left_out_and_counted_by_the_step(make_run, monkeypatch):
    run = make_run("stage_c", run={"accumulate": 2, "max_skipped_steps": 1}, data={"batch_size": 2})
    whole = StageCSystem.training_step

    def poisoned(self, batch, batch_idx):
        loss = whole(self, batch, batch_idx)
        return loss * math.nan if batch_idx % 2 == 0 and self.global_step in (1, 3) else loss

    monkeypatch.setattr(StageCSystem, "training_step", poisoned)
    assert run.start("--run.max_steps", 5) == 0  # none of them in a row
    assert (run.out / "done").is_file()
