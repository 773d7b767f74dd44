"""A run's folder has one process that trains in it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cascade.checkpoints.files import atomic_write_text
from cascade.errors import UserError

_log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems of clusters say that know no locks."""
_LOCK_FILE = ".lock"
_OWNER_FILE = ".training"
"""Who holds the lock; the lock itself goes with its process, however that ends."""


@contextmanager
def held(out: Path, what: str = "trains", key: str = "run.out") -> Iterator[None]:
    """Hold a run's folder until the block is left; it is made where it is not there.

    Args:
        out: The folder.
        what: What another process does there, for the message.
        key: What names the folder, likewise.

    Raises:
        UserError: Another process trains there: both would write the same checkpoints. The folder
            can't be made.
    """
    make_folder(out)
    # Not the file that stands in for a lock elsewhere: it outlives a killed process.
    lock = FileLock(out / _LOCK_FILE, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{out}: {_owner(out)} {what} here already; wait for it, stop it, or choose another "
            f"{key}"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _log.warning("%s: its file system has no locks; start no second run in it", out)
        yield
        return
    try:
        note = {"pid": os.getpid(), "host": socket.gethostname()}
        atomic_write_text(out / _OWNER_FILE, json.dumps(note) + "\n")
        yield
    finally:
        (out / _OWNER_FILE).unlink(missing_ok=True)
        lock.release()


def make_folder(out: Path) -> None:
    """Make a run's folder, unless it is there.

    Raises:
        UserError: It can't be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.out {out}: can't be made: {error.strerror}") from error


def _owner(out: Path) -> str:
    try:
        note = json.loads((out / _OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {note['pid']} on {note['host']}"
    except (OSError, ValueError, KeyError):  # between its lock and its note
        return "another process"
