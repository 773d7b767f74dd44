from __future__ import annotations

import json

import pytest

from train.study.spent import Spent, read_ledger, spent_until


def row(begin: int, end: int, *, samples_per_step: int = 4, step_s: float = 1.0, **values):
    steps = end - begin
    seconds = {"setup": 5.0 if begin == 0 else 0.0, "data": 0.5 * steps, "step": step_s * steps}
    seconds |= {"validation": 7.0, "pictures": 3.0}
    return {
        "from_step": begin,
        "step": end,
        "samples": end * samples_per_step,
        "seconds": seconds,
        "device_seconds": 2 * sum(seconds.values()),
        "flops": 10.0 * steps,
        "energy_j": None,
        "peak_memory_mib": 1,
    } | values


def test_a_whole_run_costs_its_steps_without_set_up_and_looking():
    assert spent_until([row(0, 4), row(4, 8)]) == Spent(2 * 8 * 1.5, 32, 80.0, None)


def test_a_part_of_a_run_costs_its_share():
    rows = [row(0, 4), row(4, 8)]
    assert spent_until(rows, 6) == Spent(2 * 6 * 1.5, 24, 60.0, None)
    assert spent_until(rows, 0) == Spent()
    assert spent_until(rows, 100) == spent_until(rows)


def test_steps_that_a_killed_run_made_again_count_once_and_with_their_last_cost():
    # Killed after step 9, resumed from the checkpoint of step 6, slower.
    rows = [row(0, 4), row(4, 8), row(8, 9), row(6, 10, step_s=2.5), row(10, 12, step_s=2.5)]
    found = spent_until(rows)
    assert found.samples == 48 and found.flops == pytest.approx(120)
    assert found.device_seconds == pytest.approx(2 * (6 * 1.5 + 6 * 3.0))
    # Again from the same checkpoint: the attempt between counts no more.
    again = spent_until([*rows, row(6, 12)])
    assert again == spent_until([row(0, 4), row(4, 8), row(8, 12)])


def test_steps_whose_row_a_kill_took_cost_what_those_of_the_next_row_do():
    # Killed after the checkpoint of step 6, before the row of steps 4 to 8 was written.
    assert spent_until([row(0, 4), row(6, 10)]) == spent_until([row(0, 4), row(4, 10)])
    assert spent_until([row(0, 4), row(6, 10)], 5) == spent_until([row(0, 4), row(4, 10)], 5)
    assert spent_until([row(6, 10)]).samples == 40


def test_what_a_teacher_computes_in_a_step_is_told_apart():
    rows = [row(0, 4, teacher_flops=16.0), row(4, 8, teacher_flops=16.0)]
    for one in rows:
        one["seconds"] |= {"teacher": 2.0, "step": one["seconds"]["step"] - 2.0}
    whole = spent_until([row(0, 4), row(4, 8)])
    own, taught = (spent_until(rows, whose=whose) for whose in ("own", "teacher"))
    assert taught == Spent(2 * 2 * 2.0, 0.0, 32.0)
    assert own == Spent(whole.device_seconds - 8.0, whole.samples, whole.flops - 32.0, None)


def test_the_rows_of_a_runs_end_belong_to_no_step():
    assert spent_until([row(0, 4), row(4, 4)]) == spent_until([row(0, 4)])


def test_what_was_not_counted_of_a_part_is_not_known_of_the_whole():
    total = spent_until([row(0, 4), row(4, 8, flops=None)])
    assert total.flops is None and total.samples == 32


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    whole = json.dumps(row(0, 4))
    (tmp_path / "ledger.jsonl").write_text(f"{whole}\n{whole[:20]}\n{json.dumps(row(4, 8))}\n")
    assert spent_until(read_ledger(tmp_path)).samples == 32
