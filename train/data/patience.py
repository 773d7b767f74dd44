"""Tells what is waited for before the first batch: a shard that never comes looks like a crash."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

_LOOKS = 12
"""How often it looks in the time that is worth a word."""


class Patience:
    """What is being read at the moment, and since when; said once a minute while it lasts."""

    def __init__(self, after_s: float = 60.0) -> None:
        """Take the seconds that are worth a word."""
        self.after_s = after_s
        self._reading: dict[str, float] = {}
        self._lock = threading.Lock()
        self._done = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[Patience]:
        """Speak, from a thread of its own, until the block is left."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    @contextmanager
    def reading(self, what: str) -> Iterator[None]:
        """Name what the block reads; several threads may do so."""
        with self._lock:
            self._reading[what] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._reading.pop(what, None)

    def describe(self) -> str | None:
        """Return one line on what has been read for too long; None if nothing has."""
        now_s = time.monotonic()
        with self._lock:
            slow = {what: now_s - since for what, since in self._reading.items()}
        slow = {what: waited_s for what, waited_s in slow.items() if waited_s >= self.after_s}
        if not slow:
            return None
        told = "; ".join(f"reading {what} for {waited_s:.0f} s" for what, waited_s in slow.items())
        return f"no batch yet: {told}"

    def _watch(self) -> None:
        said_s = float("-inf")
        while not self._done.wait(self.after_s / _LOOKS):
            line = self.describe()
            if line is not None and time.monotonic() - said_s >= self.after_s:
                said_s = time.monotonic()
                _log.warning("%s", line)
