from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.errors import UserError, describe_os_error, run_main

ROOT = Path(__file__).parents[2]


def _raising(error: BaseException):  # type: ignore[no-untyped-def]
    def main() -> int:
        raise error

    return main


def test_a_users_error_is_one_line_on_stderr_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(_raising(UserError("a.yaml: steps: expected int,\n  got 'many'"))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: a.yaml: steps: expected int, got 'many'\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "disk quota is used up"),
        (errno.EACCES, "permission denied"),
        (errno.EROFS, "read-only"),
        (errno.ENOENT, "no such file or folder"),
        (errno.ENOTDIR, "a file, not a folder"),
        (errno.EISDIR, "a folder where a file is needed"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EFBIG, "too large"),
        (errno.EEXIST, "in the way"),
        (errno.ELOOP, "leads to itself"),
        (errno.EIO, "disk fails"),
    ],
)
def test_what_the_disk_refuses_is_one_line_that_names_the_file(
    number: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(_raising(OSError(number, os.strerror(number), "out/x.png"))) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out/x.png: ") and message in err
    assert err.count("\n") == 1


def test_a_disk_error_without_a_file_still_says_what_is_wrong() -> None:
    described = describe_os_error(OSError(errno.ENOSPC, "No space left on device"))
    assert described is not None and described.startswith("the disk is full")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ValueError("our own slip"),
        AssertionError("ours"),
    ],
)
def test_what_no_user_caused_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        run_main(_raising(error))
    assert caught.value is error


def test_ctrl_c_stops_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(_raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_code_of_main_is_the_exit_code(returned: int | None, code: int) -> None:
    assert run_main(lambda: returned) == code


def test_a_users_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


def test_a_process_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    source = f"""
import sys
from cascade.config import load_yaml
from cascade.errors import run_main
sys.exit(run_main(lambda: load_yaml(object, {path!r})))
"""
    command = [sys.executable, "-c", source]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 2
    assert ran.stderr == f"error: {path}: no such configuration file; check the path\n"


def _run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = f"import sys\nfrom cascade.errors import run_main\n{source}"
    command = [
        "bash",
        "-c",
        '"$0" -c "$1" | head -1; exit ${PIPESTATUS[0]}',
        sys.executable,
        source,
    ]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, cwd=ROOT, check=False, env=environment)


def test_a_reader_that_left_is_no_traceback() -> None:
    # More than a pipe holds, so that writing meets the closed end.
    ran = _run("sys.exit(run_main(lambda: print('x' * 80 + '\\n' * 200_000, flush=True)))")
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_letters_that_the_terminal_lacks_are_no_traceback() -> None:
    source = "sys.exit(run_main(lambda: print('hüte-\\udcff.png')))"
    for encoding in ("ascii", "utf-8"):
        ran = _run(source, PYTHONIOENCODING=encoding)
        assert (ran.returncode, ran.stderr) == (0, b"")
        assert ran.stdout.endswith(b"te-\\udcff.png\n")


def test_a_broken_pipe_of_our_own_is_not_taken_for_the_readers() -> None:
    with pytest.raises(BrokenPipeError):
        run_main(_raising(BrokenPipeError(errno.EPIPE, "a worker died")))
