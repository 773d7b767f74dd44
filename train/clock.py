"""Where a run's wall time goes: every second belongs to exactly one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal[
    "setup",
    "data",
    "step",
    "teacher",
    "compile",
    "checkpoint",
    "pictures",
    "validation",
    "end",
]
"""``setup``: before the first batch is asked for. ``data``: waiting for batches, and logging.
``step``: forward, backward, optimizer, average. ``teacher``: what a cascade's teacher says of a
batch. ``compile``: torch.compile at work.
``checkpoint``: writing checkpoints and exports. ``pictures``: making sample pictures.
``validation``: looking at held-out pictures. ``end``: after the last step."""
PHASES: tuple[Phase, ...] = get_args(Phase)


class PhaseClock:
    """Adds up seconds by phase; their sum is the time since it was made."""

    def __init__(self) -> None:
        """Start in ``setup``."""
        self._phase: Phase = "setup"
        self._since_s = time.monotonic()
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @property
    def phase(self) -> Phase:
        """The phase that time goes to now."""
        return self._phase

    def switch(self, phase: Phase) -> None:
        """Give the time since the last switch to the phase that ends, and begin another."""
        now_s = time.monotonic()
        self._seconds[self._phase] += now_s - self._since_s
        self._phase, self._since_s = phase, now_s

    @contextmanager
    def within(self, phase: Phase) -> Iterator[None]:
        """Spend a block in a phase, then go on with the one before."""
        before = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of every phase up to now."""
        self.switch(self._phase)
        return dict(self._seconds)
