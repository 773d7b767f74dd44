"""Ends a run early and whole: at its time limit, or when the user or the system asks."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from train.callbacks.find import find_callback
from train.callbacks.stall import Waited
from train.rank_errors import RankErrors
from train.reduction import HostGroup
from train.steps import ends_step

_log = logging.getLogger(__name__)

_WAITS_S = 2.0
"""A batch that takes longer than this is not waited for once the run is to end."""
_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    # sbatch --signal=USR1@120 announces the end of a job so; Windows has none.
    *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()),
)


def was_told_to_end(trainer: Trainer) -> bool:
    """Return whether this process was told to end: what it can leave out by itself, it does."""
    stop = find_callback(trainer, Stop)
    return stop is not None and stop.interrupted_by is not None


def all_are_to_end(trainer: Trainer) -> bool:
    """Return whether all ranks know by now that one was told to end: what can wait is left out."""
    stop = find_callback(trainer, Stop)
    return stop is not None and stop.all_know


def _ask_nobody() -> None:
    pass


class NoBatchWhileEnding(BaseException):
    """The run was told to end while it waited for a batch that may never come."""


class StopAtOnce(BaseException):
    """A second Ctrl-C: Lightning would make exit code 1, as of a crash, of a KeyboardInterrupt."""


class Stop(Callback):
    """Finishes the step in hand, then lets the run end as if it were done.

    Lightning's own timer is carried into the checkpoint: a run that it has stopped stops again as
    soon as it is resumed. This one counts from each start. A signal to any rank ends all of them,
    after the same step.
    """

    def __init__(
        self,
        max_minutes: float | None,
        errors: RankErrors | None = None,
        ranks: HostGroup | None = None,
    ) -> None:
        """Take the wall-clock limit of this start, where ranks keep errors, and who they are."""
        self.max_minutes = max_minutes
        self.errors = RankErrors() if errors is None else errors
        self.ranks = HostGroup() if ranks is None else ranks
        self.interrupted_by: str | None = None
        self.all_know = False
        """Whether all ranks know that one of them was interrupted."""
        self._impatient = False
        """Whether Ctrl-C was pressed, whatever came before it."""
        self._at_once = False
        """Whether it was pressed again."""
        self._started_s = 0.0
        self._listens = False
        self._loader: Waited | None = None

    def seconds_left(self) -> float:
        """Return what the time limit leaves."""
        if self.max_minutes is None:
            return float("inf")
        return self.max_minutes * 60.0 - (time.monotonic() - self._started_s)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for Ctrl-C and for the system's request to end until the block is left.

        The block holds the last writes of a run as well: a signal among them must not cut them.
        """
        self._listens = threading.current_thread() is threading.main_thread()
        before: dict[int, Any] = {}
        if self._listens:
            before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; take the signals back from Lightning's own handlers."""
        self._started_s = time.monotonic()
        # Of several ranks the others would wait for this one in the middle of their step.
        loader: Any = trainer.train_dataloader
        self._loader = loader if trainer.world_size == 1 and isinstance(loader, Waited) else None
        self.errors.world = trainer.world_size
        self.ranks.open(pl_module.device)
        if trainer.world_size > 1:
            # Lightning asks all ranks before each batch whether one has a SIGTERM, and waits for
            # the device to answer; here they are asked after it, and signals are this callback's.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _ask_nobody  # type: ignore[method-assign]
        if self._listens:
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the run after this step if it is time, on all ranks alike.

        Raises:
            UserError: One of several ranks could not do its work.
            StopAtOnce: A second Ctrl-C came where Python drops errors, such as in a ``__del__``.
        """
        if self._at_once:
            raise StopAtOnce
        if not ends_step(trainer, batch_idx):
            return  # half a step can't be gone on with
        wishes = [self.interrupted_by == signal.Signals(number).name for number in _SIGNALS]
        wishes += [self.seconds_left() <= 0, self.errors.message is not None]
        wishes = [wished > 0 for wished in self.ranks.summed([int(one) for one in wishes])]
        if wishes.pop():
            self.errors.raise_for_all()
        for number, wished in zip(_SIGNALS, wishes, strict=False):
            if wished:
                self.interrupted_by, self.all_know = signal.Signals(number).name, True
        if any(wishes):
            trainer.should_stop = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only a second Ctrl-C is impatience: systems send SIGTERM more than once.
        if number == signal.SIGINT and self._impatient:
            self._at_once = True
            raise StopAtOnce
        is_news = self.interrupted_by is None or number == signal.SIGINT
        # Known before it is said: the answer to what is said may come within this very call.
        self.interrupted_by = self.interrupted_by or signal.Signals(number).name
        self._impatient = self._impatient or number == signal.SIGINT
        if is_news:
            again = "; Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            _log.info("%s: stopping after this step%s", signal.Signals(number).name, again)
        if self._loader is not None and self._loader.waiting_s() > _WAITS_S:
            self._loader = None
            raise NoBatchWhileEnding  # of the process's main thread, which is the one that waits

    def ask_again(self) -> None:
        """End the wait for a batch, from another thread, if the run was told to end."""
        if self._listens and self.interrupted_by is not None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
