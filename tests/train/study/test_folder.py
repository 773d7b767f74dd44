"""Runs of one study that were made in several folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.errors import UserError
from train.study.folder import (
    INPUTS_FILE,
    PLAN_FILE,
    STUDY_FILE,
    check_same_study,
    is_finished,
    join,
)

ARMS = [{"name": name, "description": "so", "steps": [{"name": "c"}]} for name in ("first", "2nd")]
ASKED: dict[str, Any] = {
    **{"name": "tiny", "description": "one", "judge": {"protocol": "p.yaml"}},
    "arms": ARMS,
}
INPUTS = {"p.yaml": "abc"}
PLAN = {"32": {"first": {"steps": {"c": 8}}}}


def folder_of(
    out: Path, seeds: list[int], *, asked: Any = None, inputs: Any = None, plan: Any = None
) -> Path:
    out.mkdir()
    told = ASKED | {"seeds": seeds} | (asked or {})
    (out / STUDY_FILE).write_text(yaml.safe_dump(told))
    (out / INPUTS_FILE).write_text(json.dumps(inputs or INPUTS))
    (out / PLAN_FILE).write_text(json.dumps(plan or PLAN))
    return out


def add_run(out: Path, arm: str, seed: int, status: str = "judged") -> Path:
    run = out / "runs" / "32" / arm / f"seed_{seed}"
    (run / "c" / "checkpoints").mkdir(parents=True)
    (run / "judged" / "1").mkdir(parents=True)
    (run / "judged" / "1" / "drawn.png").write_text(f"{out.name}, {arm}, {seed}")
    (run / "c.log").write_text("said")
    (run / "rows.json").write_text(json.dumps([{"status": status, "seed": seed}]))
    return run


def test_finished_runs_are_taken_without_their_trainings_and_what_is_there_stays(tmp_path):
    here = folder_of(tmp_path / "here", [0, 1])
    there = folder_of(tmp_path / "there", [1, 2], asked={"description": "another"})
    mine = add_run(here, "first", 1)
    (here / "runs/32/2nd/seed_1/c").mkdir(parents=True)  # begun here
    for arm, seed, status in (
        *(("first", 1, "judged"), ("first", 2, "judged")),
        *(("2nd", 1, "judged"), ("2nd", 2, "failed")),
    ):
        add_run(there, arm, seed, status)
    assert join(here, there, {"c"}) == 2
    assert (mine / "judged/1/drawn.png").read_text() == "here, first, 1"
    for name in ("first/seed_2", "2nd/seed_1"):
        run = here / "runs/32" / name
        assert is_finished(run / "rows.json") and (run / "c.log").read_text() == "said"
        assert (run / "judged/1/drawn.png").read_text().startswith("there, ")
        assert not (run / "c/checkpoints").exists()
    assert not (here / "runs/32/2nd/seed_2").exists(), "it has failed there"
    assert join(here, there, {"c"}) == 0


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"asked": {"judge": {"protocol": "q.yaml"}}}, "study with another judge than"),
        ({"inputs": {"p.yaml": "xyz"}}, r"p\.yaml in inputs\.json held something else there"),
        (
            {"plan": {"32": {"first": {"steps": {"c": 9}}}}},
            r"'first' with 32 in plan\.json is planned",
        ),
    ],
)
def test_another_study_is_refused_and_nothing_of_it_taken(other, said, tmp_path):
    here, there = folder_of(tmp_path / "here", [0]), folder_of(tmp_path / "there", [1], **other)
    add_run(there, "first", 1)
    with pytest.raises(UserError, match=said):
        check_same_study(here, there)
        join(here, there, {"c"})
    assert not (here / "runs").exists()


def test_of_a_study_with_other_arms_those_that_are_the_same_are_taken(tmp_path, caplog):
    changed = [{**ARMS[0], "description": "told better"}, {**ARMS[1], "steps": [{"name": "d"}]}]
    here = folder_of(tmp_path / "here", [0])
    there = folder_of(
        tmp_path / "there",
        [0],
        asked={"arms": [*changed, {**ARMS[0], "name": "third"}]},
        # What an arm that differs was planned as is nobody's concern.
        plan={"32": {**PLAN["32"], "2nd": {"steps": {"d": 1}}}},
    )
    for arm in ("first", "2nd", "third"):
        add_run(there, arm, 0)
    check_same_study(here, there)
    assert join(here, there, {"c"}) == 1
    assert [path.name for path in (here / "runs/32").iterdir()] == ["first"]
    assert "its arm '2nd' is another one; no run of it is taken" in caplog.text
    none = folder_of(tmp_path / "none", [0], asked={"arms": changed[1:]})
    with pytest.raises(UserError, match="none of its arms is one of"):
        check_same_study(here, none)


def test_what_is_no_study_or_has_lost_its_notes_is_one_line(tmp_path):
    here = folder_of(tmp_path / "here", [0])
    with pytest.raises(UserError, match=r"there is no study\.yaml in it"):
        check_same_study(here, tmp_path)
    there = folder_of(tmp_path / "there", [1])
    (there / PLAN_FILE).unlink()
    with pytest.raises(UserError, match=r"plan\.json: can't be read: No such file"):
        join(here, there, {"c"})
