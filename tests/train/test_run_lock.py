"""A run's folder has one process that trains in it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cascade.errors import UserError
from train.run_lock import held

ROOT = Path(__file__).parents[2]


@contextmanager
def training(run, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run of many steps whose fitting has begun; nothing of it is left behind."""
    command = [sys.executable, "-m", "train", run.kind, "--config", str(run.config), "--resume"]
    command += ["--run.max_steps", "100000", "--run.log_every_steps", "1", *arguments]
    run.out.mkdir()
    with open(run.out / "said.txt", "wb") as said:
        one = subprocess.Popen(command, cwd=ROOT, stderr=said)
        try:
            wait_until(one, lambda: bool(list((run.out / "tensorboard").glob("events*"))))
            yield one
        finally:
            one.kill()
            one.wait()


def wait_until(one: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    begun_s = time.monotonic()
    while not holds():
        assert one.poll() is None and time.monotonic() - begun_s < 180
        time.sleep(0.1)


def said_by(run) -> str:
    return (run.out / "said.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_second_run_is_refused_and_touches_nothing_of_the_first(make_run):
    run = make_run("stage_c")
    with training(run, "--run.checkpoint_every_steps", "100000") as one:
        wait_until(one, (run.out / "config.yaml").is_file)  # all of its checks have passed
        in_writing = run.out / "checkpoints" / ".step=4.ckpt.abc.tmp"
        in_writing.parent.mkdir(exist_ok=True)
        in_writing.write_bytes(b"half of a checkpoint")
        config = (run.out / "config.yaml").read_bytes()
        with pytest.raises(UserError, match=rf"process {one.pid} on .* trains here already"):
            run.start("--resume", "--run.seed", 5)
        assert in_writing.exists() and (run.out / "config.yaml").read_bytes() == config
        in_writing.unlink()
        one.send_signal(signal.SIGINT)
        assert one.wait(timeout=120) == 130, said_by(run)
    assert list((run.out / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_second_ctrl_c_ends_a_run_in_the_middle_of_its_step(make_run):
    run = make_run("stage_c")
    # A step of a million micro-batches: only an end at once is an end.
    with training(run, "--run.accumulate", "1000000") as one:
        one.send_signal(signal.SIGINT)
        wait_until(one, lambda: "SIGINT: stopping after this step" in said_by(run))
        one.send_signal(signal.SIGINT)
        assert one.wait(timeout=60) == 130, said_by(run)
    assert said_by(run).splitlines()[-1] == "stopped" and "Traceback" not in said_by(run)
    assert not list((run.out / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_a_killed_run_held_is_free(make_run):
    run = make_run("stage_c")
    with training(run):
        pass
    assert (run.out / ".training").is_file(), "it had no time to tidy up"
    assert run.start("--resume", "--run.max_steps", 1) == 0
    assert not (run.out / ".training").exists()


def test_a_folder_is_free_again_after_an_error(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        with pytest.raises(UserError, match="trains here already"):
            with held(tmp_path):
                pass
        _ = 1 / 0
    with held(tmp_path):
        assert (tmp_path / ".training").is_file()
    with held(tmp_path / "not there yet"):
        assert (tmp_path / "not there yet").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="locks of POSIX")
@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(error, tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("fcntl.flock", fail)
    with held(tmp_path), held(tmp_path):
        assert "has no locks; start no second run in it" in caplog.text
    assert not (tmp_path / ".training").exists()
