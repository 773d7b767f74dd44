"""Ends a run early and whole: at its time limit, or when the user or the system asks."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_log = logging.getLogger(__name__)


class Stop(Callback):
    """Finishes the step in hand, then lets the run end as if it were done.

    Lightning's own timer is carried into the checkpoint: a run that it has stopped stops again as
    soon as it is resumed. This one counts from each start.
    """

    def __init__(self, max_minutes: float | None) -> None:
        """Take the wall-clock limit of this start."""
        self.max_minutes = max_minutes
        self.interrupted_by: str | None = None
        self._started_s = 0.0
        self._handlers: dict[int, Any] = {}

    def seconds_left(self) -> float:
        """Return what the time limit leaves."""
        if self.max_minutes is None:
            return float("inf")
        return self.max_minutes * 60.0 - (time.monotonic() - self._started_s)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and listen for Ctrl-C and for the system's request to end."""
        self._started_s = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run after this step if it is time."""
        wanted = self.interrupted_by is not None or self.seconds_left() <= 0
        if trainer.strategy.broadcast(wanted):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.interrupted_by = signal.Signals(number).name
        self._restore()  # a second signal acts at once
        _log.info("%s: stopping after this step; again to stop at once", self.interrupted_by)
