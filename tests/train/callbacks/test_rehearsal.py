"""What a run writes at its end is written once before its first step."""

from __future__ import annotations

import pytest

from cascade.errors import UserError
from train.callbacks.rehearsal import Rehearsal
from train.systems.stage_c import StageCSystem


def test_a_network_that_can_t_be_exported_is_found_before_the_first_step(make_run, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    steps = []
    monkeypatch.setattr("train.callbacks.export.save_network", fail)
    monkeypatch.setattr(StageCSystem, "training_step", lambda *_: steps.append(1))
    run = make_run("stage_c")
    with pytest.raises(UserError, match="disk is full"):
        run.start()
    assert steps == []
    assert not (run.out / ".rehearsal").exists()


def test_a_checkpoint_that_can_t_be_written_is_found_before_the_first_step(make_run, monkeypatch):
    def fail(*_):
        raise UserError("the disk is full")

    steps = []
    monkeypatch.setattr("train.callbacks.checkpoints._check_space", fail)
    monkeypatch.setattr(StageCSystem, "training_step", lambda *_: steps.append(1))
    with pytest.raises(UserError, match="the disk is full"):
        make_run("stage_c").start()
    assert steps == []


def test_a_rehearsal_asks_for_the_room_of_all_checkpoints_that_are_kept(make_run, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "train.callbacks.checkpoints._check_space", lambda *given: asked.append(given[-1])
    )
    assert make_run("previewer", run={"keep_checkpoints": 3}).start() == 0
    assert asked == [4, 1, 1, 1]  # the rehearsal, two checkpoints, and that of the end


@pytest.mark.parametrize("kind", ["stage_a", "autoencoder_kl", "clip", "compressor"])
def test_a_rehearsal_leaves_nothing_and_a_resumed_run_has_none(kind, make_run, monkeypatch):
    run = make_run(kind)
    run.start("--run.max_minutes", "0.0001")
    assert not (run.out / ".rehearsal").exists()
    rehearsed = []
    original = Rehearsal.on_train_start

    def spy(self, trainer, system):
        rehearsed.append(trainer.global_step)
        original(self, trainer, system)

    monkeypatch.setattr(Rehearsal, "on_train_start", spy)
    monkeypatch.setattr("train.callbacks.export.Export.rehearse", None)  # calling it would fail
    run.start("--resume")
    assert rehearsed and rehearsed[0] > 0
