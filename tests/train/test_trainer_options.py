"""Options of Lightning's Trainer: passed on by name, or refused with what to use instead."""

from __future__ import annotations

import functools
import inspect

import lightning.pytorch as pl
import pytest

from cascade.errors import UserError, run_main
from train.trainer_options import _DECIDED, check_trainer_options


def test_every_option_that_the_run_decides_is_one_of_the_trainer_s() -> None:
    assert set(_DECIDED) <= set(inspect.signature(pl.Trainer).parameters)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("proflier", "no option 'proflier': did you mean 'profiler'? valid: "),
        ("max_step", "no option 'max_step': "),
        ("precision", "the run decides this; set run.precision"),
        ("callbacks", "the run decides this; the run has its own"),
    ],
)
def test_what_is_not_passed_on_is_refused(name, message) -> None:
    with pytest.raises(UserError, match="run.trainer." + name) as caught:
        check_trainer_options({name: 1})
    assert message in str(caught.value)


def test_an_option_reaches_the_trainer(make_run, monkeypatch) -> None:
    seen: list[pl.Trainer] = []
    start = pl.Trainer.__init__

    @functools.wraps(start)
    def remember(self, **options: object) -> None:
        seen.append(self)
        start(self, **options)

    monkeypatch.setattr(pl.Trainer, "__init__", remember)
    run = make_run("previewer", run={"trainer": {"detect_anomaly": True}})
    assert run.start("--run.max_steps", 1, "--run.trainer.gradient_clip_algorithm", "value") == 0
    assert seen[0]._detect_anomaly
    assert seen[0].gradient_clip_algorithm == "value"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_epochs", 3, "set run.max_steps"),
        ("profiler", "fast", "run.trainer {'profiler': 'fast'}"),
        ("benchmark", "[1]", "run.trainer.benchmark: expected str, got [1]"),
    ],
)
def test_a_refused_option_is_one_line(make_run, capsys, option, value, message) -> None:
    run = make_run("previewer")
    assert run_main(lambda: run.start(f"--run.trainer.{option}", value)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_processes_of_a_launcher_that_the_run_does_not_know_of_are_refused(
    make_run, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run = make_run("previewer")
    assert run_main(run.start) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "2 processes were started but run.devices is 1" in line
    assert not run.out.exists()
