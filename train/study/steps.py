"""Runs the steps of an arm as commands of their own, each resumable, each with a log."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cascade.checkpoints.files import atomic_write_text
from cascade.errors import UserError
from cascade.launchers import alone
from train.fit import DONE_FILE
from train.study.settings import ArmConfig, ModelConfig, Option, StepConfig

_log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
"""Of Linux's ``prctl``: the signal that a process gets when its parent is gone."""


class StepFailedError(Exception):
    """A step of an arm went wrong: the arm has failed, the study goes on."""


class StudyStoppedError(Exception):
    """The system asked the study to end; the same command goes on."""


@dataclass(frozen=True)
class Places:
    """What ``{...}`` in a step means."""

    here: Path
    """Folder of the arm, with this budget and seed."""
    shared: Path
    """Folder of what is made once."""
    seed: int

    def fill(self, value: Option, weights: Path | None = None) -> str:
        """Return an option's value as the command line takes it."""
        if not isinstance(value, str):
            return json.dumps(value)
        named = {"here": self.here, "shared": self.shared, "seed": self.seed, "weights": weights}
        return value.format_map(named)

    def of(self, step: StepConfig) -> Places:
        """Return the places of a step: one that is shared knows nothing of the arm."""
        return Places(self.shared, self.shared, self.seed) if step.shared else self


class Commands:
    """Starts commands one after the other, and ends the one in hand when the study is to end.

    Each is a process by itself, even where the study is one of a launcher's or of SLURM's, whose
    variables it does not see. A launcher that the study names does: ``srun`` reads its job there.
    """

    def __init__(self, launcher: Sequence[str] = ()) -> None:
        """Take what starts trainings; nothing: this Python."""
        self._launcher = tuple(launcher)
        self._running: subprocess.Popen[bytes] | None = None
        self._stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Pass SIGTERM on to the command in hand, which saves what it has."""
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def train(
        self,
        arm: ArmConfig,
        step: StepConfig,
        places: Places,
        options: Mapping[str, Option | Sequence[int]],
    ) -> Path:
        """Make a training, or go on with it; return its folder.

        Raises:
            StepFailedError: It ended with an error.
            StudyStoppedError: The study is to end.
        """
        assert step.train is not None and step.config is not None
        run = places.here / step.name
        if (run / DONE_FILE).is_file():
            return run
        command = [*(self._launcher or (sys.executable,)), "-m", "train", step.train]
        command += ["--config", step.config, "--resume"]
        own: dict[str, Any] = {"run.out": str(run), "run.seed": places.seed}
        own |= {"data.seed": places.seed, **options}
        for key, value in step.set.items():
            command += [f"--{key}", places.fill(value)]
        for key, value in own.items():
            command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        environment = os.environ if self._launcher else alone(os.environ)
        log = places.here / f"{step.name}.log"
        self._run(f"{arm.name}: {step.name}", command, log, environment)
        if not (run / DONE_FILE).is_file():  # told to stop by somebody else
            raise StudyStoppedError
        return run

    def other(self, arm: ArmConfig, step: StepConfig, places: Places) -> float:
        """Run another command, once; return its seconds.

        Raises:
            StepFailedError: It ended with an error.
            StudyStoppedError: The study is to end.
        """
        assert step.command is not None
        places = places.of(step)
        note = places.here / f"{step.name}.done"
        if note.is_file():
            return float(json.loads(note.read_text(encoding="utf-8"))["seconds"])
        values = {key: places.fill(value) for key, value in step.set.items()}
        if not step.resumable and "out" in values:
            _remove_within(Path(values["out"]), places.here)
        command = [sys.executable, "-m", *step.command.split()]
        if step.config is not None:
            command += ["--config", step.config]
        for key, value in step.set.items():
            command += [f"--{key}"] if value is True else [f"--{key}", values[key]]
        # A command that is gone on with has cost what all its starts took; one that begins again
        # has cost its last: an accident is no property of an arm.
        spent = note.with_suffix(".seconds")
        goes_on = step.resumable and spent.is_file()
        earlier_s = float(spent.read_text(encoding="utf-8")) if goes_on else 0.0
        started_s = time.monotonic()
        try:
            self._run(f"{arm.name}: {step.name}", command, places.here / f"{step.name}.log")
        finally:
            seconds = earlier_s + time.monotonic() - started_s
            atomic_write_text(spent, f"{seconds:.3f}\n")
        atomic_write_text(note, json.dumps({"seconds": round(seconds, 3)}) + "\n")
        return seconds

    def assemble(self, model: ModelConfig, places: Places, weights: Path, out: Path) -> None:
        """Make a model folder of what was trained, if it is not there.

        Raises:
            StepFailedError: The parts do not make a model.
            StudyStoppedError: The study is to end.
        """
        done = out.with_suffix(".done")
        if done.is_file():
            return
        _remove_within(out, places.here)
        command = [sys.executable, "-m", model.command, "--config", model.config]
        command += ["--out", str(out)]
        for key, value in model.set.items():
            command += [f"--{key}", places.fill(value, weights)]
        self._run(f"model {out.name}", command, out.with_suffix(".log"))
        done.touch()

    def module(
        self,
        module: str,
        words: Sequence[str],
        log: Path,
        what: str,
        launcher: Sequence[str] = (),
    ) -> None:
        """Run a module of this repository; its errors are those of ``other``.

        ``launcher`` starts it on several devices, in place of this Python on one.
        """
        command = [*(launcher or (sys.executable,)), "-m", *module.split(), *words]
        self._run(what, command, log, os.environ if launcher else None)

    def _run(
        self,
        what: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        environment = alone(os.environ) if environment is None else environment
        if self._stopped:
            raise StudyStoppedError
        log.parent.mkdir(parents=True, exist_ok=True)
        _log.info("%s", what)
        with open(log, "ab") as file:
            self._running = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # The study has no threads of its own that could hold a lock at the fork.
                preexec_fn=_dies_with(os.getpid(), by_launcher=command[0] != sys.executable),
            )
            try:
                code = self._running.wait()
            except KeyboardInterrupt:  # the terminal has told the command as well
                self._running.wait()
                raise
            finally:
                self._running = None
        if self._stopped:
            raise StudyStoppedError
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise StepFailedError(f"{what}: {_last_words(log)} (exit code {code}; {log.name})")

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._running is not None:
            self._running.terminate()


def _dies_with(study: int, *, by_launcher: bool) -> Callable[[], None] | None:
    """Return what a command does first: ask the system to end it when the study is killed.

    Else it would work on, and the study's next start would meet it in the same folders. It ends as
    the study did, at once; a launcher is asked to, so that it ends those that it has started. Only
    Linux can be asked; elsewhere there is nothing to do.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM if by_launcher else signal.SIGKILL)
        if os.getppid() != study:  # it was killed in between
            os._exit(1)

    return ask


def _remove_within(path: Path, folder: Path) -> None:
    """Remove what a command that was cut short has left; nothing outside the arm's folder.

    Raises:
        UserError: It lies outside.
    """
    if not path.exists():
        return
    if folder.resolve() not in path.resolve().parents:
        raise UserError(
            f"{path}: is there already, and is no part of the study; let the step write to "
            "{here} or {shared}, or say resumable: true"
        )
    if path.is_dir():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
    return (errors or told or ["no output"])[-1]
