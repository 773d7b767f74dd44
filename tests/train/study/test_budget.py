"""A whole study of tiny arms: killed and resumed it reports the same, failed arms and all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascade.config import apply_overrides, from_dict, to_dict
from cascade.errors import UserError
from train.run_lock import held
from train.study.budget import (
    RESULTS_FILE,
    _claim,
    _claim_inputs,
    _free_so_far,
    run_study,
)
from train.study.report import HTML_FILE, MARKDOWN_FILE, write_report
from train.study.settings import StudyConfig

ROOT = Path(__file__).parents[3]
TIMES = ("device_seconds", "energy_j", "latency_s", "latency_quartiles_s", "peak_memory_mib")
"""What two runs of the same do not share."""


@pytest.fixture
def study(make_run, tiny_model: Path, clip_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Two arms: one learns, one can't start."""
    stage_c = make_run("stage_c", "stage_c", diffusion={"prediction": "v", "weight": "constant"})
    unet = make_run("unet", "unet")
    spec = json.loads((tiny_model / "model.json").read_text())
    spec["stage_c"] |= {"prediction": "v", "steps": 2}
    spec["stage_b"] |= {"steps": 1}
    parts = ("stage_a", "stage_b", "compressor", "previewer", "stage_c")
    model = {"spec": spec, "text": str(clip_folder)}
    model |= {part: str(tiny_model / f"{part}.safetensors") for part in parts}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    protocol = {
        "name": "tiny",
        "prompts": {"inline": ["a red apple", "a blue fish", "a green hat"]},
        "metrics": ["clip_score"],
        "generated_size": spec["image_size"],
        "size": 32,
        "clip": {"kind": "clip", "name": "tiny CLIP"},
        "features": {"kind": "clip", "name": "tiny CLIP"},
        "resamples": 0,
    }
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    assembled = {"command": "train.assemble", "config": str(tmp_path / "model.yaml")}
    learns = {
        "name": "it learns",
        "steps": [{"name": "c", "train": "stage_c", "config": str(stage_c.config), "share": 1.0}],
        "model": assembled | {"set": {"stage_c": "{weights}/stage_c.safetensors"}},
        "given": [str(tiny_model / "stage_b.safetensors")],
    }
    wrong = {"text": str(tmp_path / "none")}
    fails = {
        "name": "it fails",
        "steps": [
            {"name": "u", "train": "unet", "config": str(unet.config), "share": 1.0, "set": wrong}
        ],
        "model": assembled,
    }
    return {
        "name": "tiny",
        "description": "Which of two?",
        "budget": {"unit": "samples", "amounts": [32]},
        "seeds": [3],
        "evaluate_at": [0.1, 1.0],
        "judge": {"protocol": str(tmp_path / "protocol.yaml"), "clip": str(clip_folder)},
        "grid_prompts": 2,
        "price_per_device_hour": 2.0,
        "device": "cpu",
        "arms": [learns, fails],
    }


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if key not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


def _timed_alike(value: Any) -> Any:
    """Return rows with the same number in place of every time."""
    if isinstance(value, dict):
        return {
            key: (_ones(one) if key in TIMES and one is not None else _timed_alike(one))
            for key, one in value.items()
        }
    return [_timed_alike(one) for one in value] if isinstance(value, list) else value


def _ones(times: Any) -> Any:
    return [1.0 for _ in times] if isinstance(times, list) else 1.0


def _report(out: Path, config: StudyConfig) -> tuple[bytes, ...]:
    """Return a study's report as it is but for times: Markdown, HTML and the plots."""
    lines = (out / RESULTS_FILE).read_text().splitlines()
    rows = [_timed_alike(json.loads(line)) for line in lines]
    write_report(config, rows, out, given={})
    plots = sorted((out / "plots").iterdir())
    return tuple((out / name).read_bytes() for name in (MARKDOWN_FILE, HTML_FILE, *plots))


def _rows(out: Path) -> list[dict[str, Any]]:
    lines = (out / RESULTS_FILE).read_text().splitlines()
    return [_timeless(json.loads(line)) for line in lines]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_reports_what_an_unbroken_one_does(study, tmp_path):
    file, killed, whole = tmp_path / "s.yaml", tmp_path / "killed", tmp_path / "whole"
    file.write_text(yaml.safe_dump(study))
    command = [sys.executable, "-m", "train.study", "budget", "--config", str(file)]
    command += ["--out", str(killed)]
    running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    run = killed / "runs" / "32" / "it_learns" / "seed_3" / "c"
    deadline_s = time.monotonic() + 300
    while not list(run.glob("checkpoints/step=*.ckpt")):
        assert running.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGKILL)  # what it has started ends with it
    running.wait()
    assert not (killed / RESULTS_FILE).exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert again.returncode == 1, again.stderr  # one arm failed
    assert "1 of the runs failed" in again.stderr and "Traceback" not in again.stderr
    config = from_dict(StudyConfig, study, "s.yaml")
    assert run_study(config, whole) == 1

    rows = _rows(whole)
    assert _rows(killed) == rows
    # 32 samples are 8 steps of 4: a tenth is none.
    of_first = [row for row in rows if row["arm"] == "it learns"]
    assert [(row["status"], row["step"]) for row in of_first] == [
        ("no model yet", None),
        ("judged", 8),
    ]
    assert [row["spent"]["samples"] for row in of_first] == [0, 32]
    assert of_first[1]["spent"]["flops"] > 0
    failed = [row for row in rows if row["arm"] == "it fails"]
    assert {row["status"] for row in failed} == {"failed"} and len(failed) == 2
    assert str(tmp_path / "none") in failed[0]["why"]

    report = (whole / MARKDOWN_FILE).read_text()
    assert "| it fails | 0 of 1 | failed |" in report and "## Runs that failed" in report
    assert "(tiny CLIP) ↑" in report and of_first[0]["commit"] in report
    page = (whole / HTML_FILE).read_text()
    assert "<svg" in page and "data:image/png;base64" in page
    for plot in ("plots/clip_score.svg", "pictures.png"):
        assert (whole / plot).is_file() and plot in report
    assert _report(killed, config) == _report(whole, config), "to the byte, but for times"
    # Nothing is made twice but what failed, which is tried again, and nobody else's study is gone
    # on with.
    before = sorted((whole / "runs").rglob("*"))
    log = whole / "runs" / "32" / "it_fails" / "seed_3" / "u.log"
    tried = log.stat().st_size
    assert run_study(config, whole) == 1 and sorted((whole / "runs").rglob("*")) == before
    assert log.stat().st_size > tried and _rows(whole) == rows
    # Runs that were made elsewhere are taken, and not trained again.
    joined = tmp_path / "joined"
    assert run_study(config, joined, others=[whole]) == 1 and _rows(joined) == rows
    assert {one.name for one in (joined / "runs" / "32" / "it_learns" / "seed_3").iterdir()} == {
        *("rows.json", "judged", "c.log"),
    }
    assert _report(joined, config) == _report(whole, config)
    with pytest.raises(UserError, match="holds a study with another seeds"):
        run_study(from_dict(StudyConfig, study | {"seeds": [4]}, "s.yaml"), whole)
    recipe = Path(study["arms"][0]["steps"][0]["config"])
    recipe.write_text(recipe.read_text() + "# another rate\n")
    with pytest.raises(UserError, match=f"{recipe}: has changed since the study"):
        run_study(config, whole)


@pytest.mark.slow
def test_a_dry_run_tries_a_few_steps_and_prints_the_plan(study, tmp_path, capsys):
    study["arms"] = study["arms"][:1]
    study["budget"] = {"unit": "device_seconds", "amounts": [1000, 2000]}
    study["calibration_steps"] = 4
    config = from_dict(StudyConfig, study, "s.yaml")
    assert run_study(config, tmp_path / "out", dry_run=True) == 0
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if "| it learns |" in line]
    assert len(rows) == 2
    steps = [int(row[4].replace(",", "")) for row in rows]
    assert steps[1] == pytest.approx(2 * steps[0], abs=1) and steps[0] > 100
    assert "about 3,000 device seconds" in printed
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.slow
def test_an_arm_that_cannot_be_tried_is_a_failed_one_and_the_others_go_on(study, tmp_path):
    study["budget"] = {"unit": "flops", "amounts": [1e9]}
    study["calibration_steps"] = 4
    config, out = from_dict(StudyConfig, study, "s.yaml"), tmp_path / "out"
    assert run_study(config, out) == 1
    rows = _rows(out)
    assert [row["status"] for row in rows if row["arm"] == "it fails"] == ["failed"] * 2
    assert rows[1]["status"] == "judged" and str(tmp_path / "none") in rows[-1]["why"]
    report = (out / MARKDOWN_FILE).read_text()
    assert "| it fails | 0 of 1 | failed |" in report
    study["arms"] = study["arms"][1:]
    with pytest.raises(UserError, match="no arm can be tried, the first, it fails"):
        run_study(from_dict(StudyConfig, study, "s.yaml"), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge.protocol": "nope.yaml"}, r"nope\.yaml"),
        ({"judge.real": "nope"}, r"judge\.real: nope is not there"),
        ({"headline": ["clip_skore"]}, "clip_skore is no figure of .* did you mean 'clip_score'"),
    ],
)
def test_what_could_not_be_judged_is_refused_before_it_is_trained(
    changes, message, study, tmp_path
):
    apply_overrides(study, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    with pytest.raises(UserError, match=message):
        run_study(from_dict(StudyConfig, study, "s.yaml"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_too_few_to_choose_among_are_told_at_the_start(study, tmp_path):
    file = Path(study["judge"]["protocol"])
    protocol = yaml.safe_load(file.read_text()) | {"metrics": ["retrieval"]}
    file.write_text(yaml.safe_dump(protocol))
    with pytest.raises(UserError, match="ask for fewer candidates"):
        run_study(from_dict(StudyConfig, study, "s.yaml"), tmp_path / "out")


def test_a_study_begins_beside_what_was_made_for_it_beforehand(study, tmp_path):
    out = tmp_path / "out"
    (out / "shared" / "drawn").mkdir(parents=True)
    study["arms"] = study["arms"][:1]
    study["budget"]["amounts"] = [1]
    with pytest.raises(UserError, match="one step takes"):  # it has begun, and planned
        run_study(from_dict(StudyConfig, study, "s.yaml"), out)
    assert (out / "study.yaml").is_file()


def test_a_study_goes_only_into_a_folder_of_its_own(study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        run_study(from_dict(StudyConfig, study, "s.yaml"), out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def _refused(study: dict[str, Any], out: Path) -> str:
    with pytest.raises(UserError) as caught:
        run_study(from_dict(StudyConfig, study, "s.yaml"), out)
    return str(caught.value)


def test_what_a_training_or_a_judge_would_refuse_is_refused_before_anything_is_trained(
    study, tmp_path
):
    out = tmp_path / "out"
    [arm, other] = study["arms"]
    [step] = arm["steps"]

    def with_step(**changes: object) -> dict[str, Any]:
        return study | {"arms": [arm | {"steps": [step | changes]}, other]}

    mistyped = with_step(set={**step.get("set", {}), "optm.lr": 1.0})
    assert "optm: unknown key; did you mean 'optim'?" in _refused(mistyped, out)
    assert "no training 'stage_z': did you mean 'stage_" in _refused(
        with_step(train="stage_z"), out
    )
    command = {"name": "first", "command": "train.dta check"}
    assert "there is no command 'train.dta check'" in _refused(
        study | {"arms": [arm | {"steps": [command, step]}, other]}, out
    )
    assert "device 'gpu9'" in _refused(study | {"device": "gpu9"}, out)
    assert not out.exists()


def test_two_studies_do_not_work_in_one_folder(study, tmp_path):
    out = tmp_path / "out"
    with held(out):
        assert "runs a study here already" in _refused(study, out)


def test_what_decided_nothing_as_yet_may_change(study, tmp_path):
    out = tmp_path / "out"
    little = study | {"budget": {"unit": "samples", "amounts": [1]}}
    assert "raise budget.amounts" in _refused(little, out)
    assert "judge" in _free_so_far(out) and "budget" in _free_so_far(out)
    assert _claimed(study, out)
    assert _claimed(study | {"judge": study["judge"] | {"launcher": ["srun"]}}, out)
    (out / "runs").mkdir()
    with pytest.raises(UserError, match="another budget"):
        _claim(to_dict(from_dict(StudyConfig, little, "s.yaml")), out)
    other = study["judge"] | {"protocol": "other.yaml"}
    assert _claimed(study | {"judge": other}, out)
    judged = out / "runs" / "32" / "it_learns" / "seed_3" / "judged" / "1"
    judged.mkdir(parents=True)
    (judged / "results.jsonl").touch()
    with pytest.raises(UserError, match="another judge"):
        _claim(to_dict(from_dict(StudyConfig, study, "s.yaml")), out)


def _claimed(study: dict[str, Any], out: Path) -> bool:
    _claim(to_dict(from_dict(StudyConfig, study, "s.yaml")), out)
    return True


@pytest.mark.parametrize("name", ["study.yaml", "inputs.json"])
def test_a_study_whose_notes_are_damaged_says_which(name, study, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    _claimed(study, out)
    _claim_inputs(from_dict(StudyConfig, study, "s.yaml"), out)
    (out / name).write_text("{ [")
    assert f"{out / name}: can't be read any more" in _refused(study, out)
