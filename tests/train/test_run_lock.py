"""A run's folder has one process that trains in it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cascade.errors import UserError
from train.run_lock import check_free, held

ROOT = Path(__file__).parents[2]


def begin(run) -> subprocess.Popen[str]:
    """Start a run that does not end, and wait until it trains."""
    command = [sys.executable, "-m", "train", run.kind, "--config", str(run.config)]
    one = subprocess.Popen(
        [*command, "--resume", "--run.max_steps", "100000", "--run.log_every_steps", "1"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    begun_s = time.monotonic()
    while not list((run.out / "logs").glob("**/metrics.csv")):
        assert one.poll() is None and time.monotonic() - begun_s < 180, one.communicate()[1]
        time.sleep(0.1)
    return one


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_second_run_is_refused_and_a_second_ctrl_c_ends_the_first_at_once(make_run):
    run = make_run("stage_c")
    one = begin(run)
    with pytest.raises(UserError, match=rf"process {one.pid} on .* trains here already"):
        run.start("--resume")
    # As a terminal's two, while the step in hand goes on.
    one.send_signal(signal.SIGINT)
    one.send_signal(signal.SIGINT)
    said = one.communicate(timeout=120)[1]
    assert one.returncode == 130, said
    assert said.splitlines()[-1] == "stopped" and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_what_a_killed_run_held_is_free(make_run):
    run = make_run("stage_c")
    one = begin(run)
    one.kill()
    one.communicate()
    assert (run.out / ".training").is_file(), "it had no time to tidy up"
    assert run.start("--resume", "--run.max_steps", 1) == 0
    assert not (run.out / ".training").exists()


def test_a_folder_is_free_again_after_an_error(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        with pytest.raises(UserError, match="trains here already"):
            check_free(tmp_path)
        _ = 1 / 0
    check_free(tmp_path)
    check_free(tmp_path / "not there yet")
    assert not (tmp_path / "not there yet").exists()
