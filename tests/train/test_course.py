"""Where in its data a run goes on."""

from __future__ import annotations

import json

import pytest

from cascade.errors import UserError
from train.course import COURSE_FILE, batch_to_go_on_with, go_on

PLAIN = {"accumulate": 1, "world": 1, "batch_size": 8}


def test_steps_that_are_alike_take_alike():
    for accumulate in (1, 3):
        now = PLAIN | {"accumulate": accumulate}
        batch, legs = batch_to_go_on_with((), 5, **now)
        assert batch == 5 * accumulate
        assert batch_to_go_on_with(legs, 9, **now) == (9 * accumulate, legs)


@pytest.mark.parametrize(
    ("now", "batch", "later"),
    [
        ({"accumulate": 4}, 5, 5 + 2 * 4),  # 40 samples are 5 batches of 8
        ({"world": 2}, 2, 2 + 2),  # half a step is seen again
        ({"world": 2, "batch_size": 4}, 5, 5 + 2),
        ({"batch_size": 2}, 20, 22),
    ],
)
def test_a_run_goes_on_with_the_sample_it_was_at(now, batch, later):
    _, legs = batch_to_go_on_with((), 0, **PLAIN)
    found, legs = batch_to_go_on_with(legs, 5, **PLAIN | now)
    assert found == batch and len(legs) == 2
    assert batch_to_go_on_with(legs, 7, **PLAIN | now) == (later, legs)
    # And back: as many samples as were seen.
    back, legs = batch_to_go_on_with(legs, 7, **PLAIN)
    wide = PLAIN | now
    assert back == later * wide["world"] * wide["batch_size"] // 8 and len(legs) == 3


def test_epochs_that_end_with_a_smaller_step_are_counted_as_they_are():
    def batches(batch_size: int, world: int) -> int:  # 1000 samples of one shape
        return -(-1000 // (batch_size * world))

    before = {"accumulate": 1, "world": 1, "batch_size": 16}  # 63 an epoch
    _, legs = batch_to_go_on_with((), 0, **before)
    now = before | {"world": 2}  # 32 an epoch
    for step, wanted in ((630, 320), (63 * 9 + 10, 32 * 9 + 5), (63 * 2 + 11, 32 * 2 + 5)):
        found, _ = batch_to_go_on_with(legs, step, **now, batches_per_epoch=batches)
        assert found == wanted
    assert batch_to_go_on_with(legs, 630, **now)[0] == 315  # of an endless series


def test_an_earlier_checkpoint_undoes_what_came_after_it():
    _, legs = batch_to_go_on_with((), 0, **PLAIN)
    _, legs = batch_to_go_on_with(legs, 6, **PLAIN | {"accumulate": 4})
    assert batch_to_go_on_with(legs, 4, **PLAIN) == (4, legs[:1])


def test_the_legs_are_noted_with_the_run_and_told(tmp_path, caplog):
    assert go_on(tmp_path, 0, **PLAIN, writes=True) == 0
    caplog.clear()
    assert go_on(tmp_path, 5, **PLAIN, writes=True) == 5 and not caplog.records
    assert go_on(tmp_path, 5, **PLAIN | {"accumulate": 4}, writes=False) == 5
    assert len(json.loads((tmp_path / COURSE_FILE).read_text())) == 1
    assert go_on(tmp_path, 5, **PLAIN | {"accumulate": 4}, writes=True) == 5
    assert "a step takes 32 samples from here on, and took 8" in caplog.text
    assert go_on(tmp_path, 6, **PLAIN | {"accumulate": 4}, writes=True) == 9
    # A fresh start in the same folder has no past.
    assert go_on(tmp_path, 0, **PLAIN, writes=True) == 0
    assert len(json.loads((tmp_path / COURSE_FILE).read_text())) == 1
    (tmp_path / COURSE_FILE).write_text("[{]")
    with pytest.raises(UserError, match="it tells how far the run is in its data"):
        go_on(tmp_path, 5, **PLAIN, writes=True)
    for wrong in (
        "[3]",
        '[{"from_step": "0", "from_batch": 0, "accumulate": 1, "world": 1, "batch_size": 8}]',
    ):
        (tmp_path / COURSE_FILE).write_text(wrong)
        with pytest.raises(UserError, match="it tells how far the run is in its data"):
            go_on(tmp_path, 5, **PLAIN, writes=True)
