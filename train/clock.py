"""Where a run's wall time goes: every second belongs to exactly one phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch

import train

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
``step``: forward, backward, optimizer, average. ``teacher``: what a teacher says of a batch.
``compile``: torch.compile at work.
``checkpoint``: writing checkpoints and exports. ``pictures``: making sample pictures.
``validation``: looking at held-out pictures. ``end``: after the last step."""
PHASES: tuple[Phase, ...] = get_args(Phase)


def process_began_s() -> float | None:
    """Return when a process that is one training began; None in a process that is more than that.

    Its imports take seconds, which the run's ledger would miss.
    """
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return train.BEGAN_S if spec is not None and spec.name == "train.__main__" else None


class PhaseClock:
    """Adds up seconds by phase; their sum is the time since it was made."""

    def __init__(self, began_s: float | None = None) -> None:
        """Start in ``setup``, at a time of ``time.monotonic``; None: now."""
        self._phase: Phase = "setup"
        self._since_s = time.monotonic() if began_s is None else began_s
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._queued: list[_Queued] = []

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
    def within(self, phase: Phase, device: torch.device | None = None) -> Iterator[None]:
        """Spend a block in a phase, then go on with the one before.

        Args:
            phase: Of the block.
            device: Where its work is done. A GPU does it after the block has ended: what the block
                has queued there takes the GPU's seconds, in place of those of queueing it. Nobody
                waits for them: they are moved from the phase before when they are known.
        """
        before = self._phase
        on_gpu = device is not None and device.type == "cuda"
        begin = _event() if on_gpu else None
        self.switch(phase)
        began_s = self._since_s
        try:
            yield
        finally:
            self.switch(before)
            if begin is not None:
                queueing_s = self._since_s - began_s
                self._queued.append(_Queued(phase, before, begin, _event(), queueing_s))

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of every phase up to now."""
        self.switch(self._phase)
        while self._queued and self._queued[0].end.query():
            done = self._queued.pop(0)
            moved_s = done.begin.elapsed_time(done.end) / 1000.0 - done.queueing_s
            self._seconds[done.phase] += moved_s
            self._seconds[done.before] -= moved_s
        return dict(self._seconds)


@dataclass(frozen=True)
class _Queued:
    """A block whose work a GPU does later."""

    phase: Phase
    before: Phase
    begin: torch.cuda.Event
    end: torch.cuda.Event
    queueing_s: float
    """Of the host."""


def _event() -> torch.cuda.Event:
    """Return a mark in what the GPU has been told to do so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
