"""How a user learns that something is wrong: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(ValueError):
    """Anything that a user can cause; ``str(error)`` is one line: what, where, how to fix."""


class HoldsNone(UserError):
    """A model is there, and holds no network of the kind that was asked for."""


_DISK = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file is too large for this file system; choose another folder",
    errno.EACCES: "permission denied; choose a place that you have access to",
    errno.EPERM: "operation not permitted; choose a place that you have access to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "this is a folder where a file is needed; check the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EEXIST: "something else of that name is in the way; choose another one",
    errno.ELOOP: "a link that leads to itself; check the path",
    errno.EIO: "the disk fails to read or write; check it, or choose another one",
    errno.ENXIO: "no device is behind this file; check the path",
    errno.EINVAL: "the file system does not take this; choose another name or folder",
    errno.EMFILE: "too many files are open; close some programs",
}


def describe_os_error(error: OSError) -> str | None:
    """Return the clear line for an error that the file system caused, None for any other."""
    if error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{_DISK[error.errno]}"


def _nobody_reads(stream: TextIO) -> bool:
    """Return whether the reader of a stream is gone; the stream then leads nowhere."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # closed, or no file at all
        return False
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    # What is still buffered has nowhere to go; without this Python complains at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return True


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's ``main`` and turn what users can cause into a line on stderr.

    Returns:
        The exit code: that of ``main``, 2 for a user's error, 130 for Ctrl-C, 141 where whoever
        read the output is gone, as in ``| head -1``.
    """
    for stream in (sys.stdout, sys.stderr):
        # A prompt or a path that the terminal has no letters for must not end in an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Where it is installed, torchmetrics imports it, and it tells of its cache of fonts.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        return main() or 0
    except UserError as error:
        message = " ".join(str(error).split())
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        return 141
    except OSError as error:
        described = describe_os_error(error)
        if described is None:
            raise
        message = described
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return 2
