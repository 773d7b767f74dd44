"""A teacher's worth: arms beside what as many operations buy without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.errors import UserError
from train.study.__main__ import main
from train.study.page import Table
from train.study.worth import at_total, read_finished, worth_blocks


def row(arm: str, budget: float, seed: int, value: float, taught: float = 0.0) -> dict[str, Any]:
    figure = {"value": value, "label": "score", "better": "higher", "real": None}
    return {
        "arm": arm,
        "budget": budget,
        "seed": seed,
        "fraction": 1.0,
        "status": "judged",
        "metrics": {"score": figure},
        "spent": {"flops": budget},
        "teacher": {"flops": taught},
        "protocol": {},
        "protocol_hash": "abc",
    }


def study_of(folder: Path, rows: list[dict[str, Any]], teacher: str = "apart") -> Path:
    for one in rows:
        here = folder / "runs" / f"{one['budget']:g}" / one["arm"] / f"seed_{one['seed']}"
        here.mkdir(parents=True)
        (here / "rows.json").write_text(json.dumps([one]))
    (folder / "study.yaml").write_text(yaml.safe_dump({"budget": {"teacher": teacher}}))
    return folder


PLAIN = [row("plain", budget, seed, 0.5 + seed) for budget in (1e12,) for seed in (0, 1)]
LARGER = [row("plain", 4e12, seed, 0.9 + seed) for seed in (0, 1)]
TAUGHT = [row("taught", 1e12, seed, 0.6 + seed, taught=1e12) for seed in (0, 1)]


def cells_of(blocks: list[Any], arm: str) -> tuple[str, ...]:
    (table,) = (one for one in blocks if isinstance(one, Table))
    (cells,) = (one for one in table.rows if one[0] == arm and one[2] == "1e+12")
    return cells


def test_a_curve_is_read_on_lines_in_the_logarithm_and_nowhere_beyond_its_ends():
    curve = [(1e12, 0.5), (4e12, 0.9), (8e12, 1.0)]
    assert at_total(curve, 2e12) == pytest.approx(0.7)
    assert [at_total(curve, x) for x in (0.99e12, 8.1e12)] == [0.5, 1.0]  # whole steps
    assert at_total(curve, 0.9e12) is at_total(curve, 9e12) is None


def test_an_arm_stands_beside_its_own_operations_and_beside_its_teachers_too(tmp_path):
    folders = [study_of(tmp_path / "a", PLAIN + TAUGHT), study_of(tmp_path / "b", LARGER)]
    blocks = worth_blocks(read_finished(folders), "plain", ["score"])
    _, seeds, own, teachers, value, same, above, both, below = cells_of(blocks, "taught")
    assert (seeds, own, teachers) == ("2", "1e+12", "1e+12")
    assert (value, same, both) == ("1.1 ± 0.71", "1 ± 0.71", "1.2 ± 0.71")
    # The same seeds are compared: what seeds do is in no difference.
    assert (above, below) == ("+0.1 ± 0", "-0.1 ± 0")
    assert cells_of(blocks, "plain")[5:] == ("", "", "", "")


def test_totals_that_the_baseline_was_not_run_at_are_not_made_up(tmp_path):
    blocks = worth_blocks(read_finished([study_of(tmp_path / "a", PLAIN + TAUGHT)]), "plain", [])
    assert cells_of(blocks, "taught")[7:] == ("not run", "")


def test_a_run_that_two_folders_have_counts_once_the_firsts(tmp_path):
    other = [row("plain", 1e12, 0, 7.0)]
    folders = [study_of(tmp_path / "a", PLAIN), study_of(tmp_path / "b", other)]
    assert [one["metrics"]["score"]["value"] for one in read_finished(folders)] == [0.5, 1.5]


def test_what_does_not_compare_is_refused_in_one_line(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no finished run in it"):
        read_finished([tmp_path / "none"])
    with pytest.raises(UserError, match="have the teachers in them"):
        read_finished([study_of(tmp_path / "counted", PLAIN, "counted")])
    unlike = [{**LARGER[0], "protocol_hash": "xyz", "protocol": {"size": 1}}]
    with pytest.raises(UserError, match="size"):
        read_finished([study_of(tmp_path / "c", PLAIN), study_of(tmp_path / "d", unlike)])
    with pytest.raises(UserError, match=r"--baseline 'plan': did you mean 'plain'"):
        worth_blocks(PLAIN, "plan", [])
    with pytest.raises(UserError, match=r"--metrics 'scor': did you mean 'score'"):
        worth_blocks(PLAIN, "plain", ["scor"])
    uncounted = [{**PLAIN[0], "spent": {"flops": None}}]
    with pytest.raises(UserError, match="no counted operations"):
        worth_blocks(uncounted, "plain", [])
    damaged = study_of(tmp_path / "e", PLAIN[:1]) / "runs/1e+12/plain/seed_0/rows.json"
    damaged.write_text("[{")
    with pytest.raises(UserError, match=r"rows\.json: can't be read any more"):
        read_finished([tmp_path / "e"])


def test_the_command_prints_tables(tmp_path, capsys):
    folder = study_of(tmp_path / "a", PLAIN + TAUGHT)
    assert main(["worth", "--study", str(folder), "--baseline", "plain"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("## score ↑") and "| taught | 2 | 1e+12 |" in said
    with pytest.raises(UserError, match="worth reads no configuration: --seeds"):
        main(["worth", "--study", str(folder), "--baseline", "plain", "--seeds", "[1]"])
