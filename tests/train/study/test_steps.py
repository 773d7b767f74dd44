"""Commands of a study are processes by themselves, whatever has started the study."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from cascade.config import from_dict
from cascade.errors import run_main
from cascade.launchers import Part
from train.study.__main__ import main
from train.study.settings import ArmConfig
from train.study.steps import Commands, Places, StudyStoppedError

SMOKE = Path(__file__).parents[3] / "configs" / "study" / "smoke.yaml"
OF_EIGHT = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "77",
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
}
PRINTS = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1], 'w'))"


@pytest.fixture
def one_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OF_EIGHT.items():
        monkeypatch.setenv(name, value)
    assert Part.of_environment() == Part(3, 8, 3)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that notes its environment."""
    (tmp_path / "notes_environment.py").write_text(PRINTS + "\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return "notes_environment"


def seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """Return what a process of that environment takes as its share."""
    with monkeypatch.context() as other:
        environment = json.loads(path.read_text())
        assert environment["SLURM_JOB_ID"] == "77" and "PATH" in environment
        other.setattr(os, "environ", environment)
        return Part.of_environment()


def test_what_judges_sees_no_ranks_of_the_studys(module, one_of_eight, tmp_path, monkeypatch):
    note = tmp_path / "seen.json"
    Commands(("srun", "python")).module(module, [str(note)], tmp_path / "log", "judging")
    assert seen(note, monkeypatch) == Part()


@pytest.mark.parametrize("launched", [False, True])
def test_a_training_sees_ranks_only_where_a_launcher_reads_them(
    launched, one_of_eight, tmp_path, monkeypatch
):
    note = tmp_path / "seen.json"
    # In place of a training: what notes its environment, and leaves no file that says it is done.
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "__main__.py").write_text(PRINTS.replace("sys.argv[1]", repr(str(note))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    step = {"name": "c", "train": "stage_c", "config": "c.yaml", "share": 1.0}
    model = {"command": "train.assemble", "config": "m.yaml"}
    arm = from_dict(ArmConfig, {"name": "a", "steps": [step], "model": model}, "s")
    commands = Commands((sys.executable,) if launched else ())
    with pytest.raises(StudyStoppedError):
        commands.train(arm, arm.last, Places(tmp_path / "here", tmp_path / "shared", 0), {})
    assert seen(note, monkeypatch) == (Part(3, 8, 3) if launched else Part())


def test_a_study_started_as_several_processes_is_refused_in_one_line(
    one_of_eight, tmp_path, capsys
):
    words = ["budget", "--config", str(SMOKE), "--out", str(tmp_path / "out")]
    assert run_main(lambda: main(words)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "8 processes of train.study were started; start it once" in line
    assert not (tmp_path / "out").exists()


def test_a_study_in_the_script_of_a_job_of_several_tasks_is_one_process(monkeypatch, capsys):
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert run_main(lambda: main(["budget", "--config", "no such file"])) == 2
    assert "no such file" in capsys.readouterr().err
