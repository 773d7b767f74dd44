"""A run's folder has one process that trains in it."""

from __future__ import annotations

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

_LOCK_FILE = ".lock"
_OWNER_FILE = ".training"
"""Who holds the lock; the lock itself goes with its process, however that ends."""


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold a run's folder until the block is left.

    Raises:
        UserError: Another process trains there: both would write the same checkpoints.
    """
    lock = FileLock(out / _LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{out}: {_owner(out)} trains here already; wait for it, stop it, or choose another "
            "run.out"
        ) from None
    except NotImplementedError:  # some file systems of clusters
        _log.warning("%s: can't be locked; start no second run in it", out)
        yield
        return
    try:
        note = {"pid": os.getpid(), "host": socket.gethostname()}
        atomic_write_text(out / _OWNER_FILE, json.dumps(note) + "\n")
        yield
    finally:
        (out / _OWNER_FILE).unlink(missing_ok=True)
        lock.release()


def check_free(out: Path) -> None:
    """Refuse a folder that another process trains in, before anything is written.

    Raises:
        UserError: See :func:`held`.
    """
    if out.is_dir() and os.access(out, os.W_OK):  # else nobody can, and others say so
        with held(out):
            pass


def _owner(out: Path) -> str:
    try:
        note = json.loads((out / _OWNER_FILE).read_text(encoding="utf-8"))
        return f"process {note['pid']} on {note['host']}"
    except (OSError, ValueError, KeyError):  # between its lock and its note
        return "another process"
