"""How a user learns that something is wrong: one clear line, exit code 2, no traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Anything that a user can cause; ``str(error)`` is one line: what, where, how to fix."""


_DISK = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file is too large for this file system; choose another folder",
    errno.EACCES: "permission denied; choose a folder that you may write to",
    errno.EPERM: "operation not permitted; choose a folder that you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "no such file or folder; check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder; check the path",
    errno.EISDIR: "this is a folder where a file is needed; check the path",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


def describe_os_error(error: OSError) -> str | None:
    """Return the clear line for an error that the file system caused, None for any other."""
    if error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{_DISK[error.errno]}"


def run_main(main: Callable[[], int | None]) -> int:
    """Run a command's ``main`` and turn what users can cause into a line on stderr.

    Returns:
        The exit code: that of ``main``, 2 for a user's error, 130 for Ctrl-C.
    """
    try:
        return main() or 0
    except UserError as error:
        message = " ".join(str(error).split())
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
