"""From a stream of served batches to the training loop: workers, counts of losses, stalls."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cascade.errors import UserError
from train.data.activity import Activity
from train.data.cached import CachedBatch
from train.data.read import Served

_log = logging.getLogger(__name__)

_NAMED = 30
_JUDGED_FROM = 1000
_DEAD = "DataLoader worker"
"""What torch's message on a worker that is gone begins with."""
_SIGNAL_S = 1.0
"""In which the system tells of the death of a child."""


class StepSource:
    """Makes the batch of any step; what a stream of batches is made of."""

    def serve(self, step: int) -> Served:
        """Return the batch of a step; workers ask for increasing steps."""
        raise NotImplementedError


class _Steps(IterableDataset["Served | str"]):
    """The batches of steps from ``start``; with workers, each makes every so-many-th.

    The DataLoader takes from its workers in turn, so that the order does not depend on them.
    """

    def __init__(self, source: StepSource, start: int) -> None:
        self.source = source
        self.start = start

    def __iter__(self) -> Iterator[Served | str]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        step = self.start + worker
        while True:
            try:
                served = self.source.serve(step)
            except UserError as error:
                yield str(error)  # raised by a worker it would arrive with its traceback
                return
            yield served
            step += workers


def _obey_the_parent_alone(worker: int) -> None:
    """Leave signals that a terminal or a system sends to all processes to the run itself.

    It ends after the step in hand, for which it needs its workers, and then ends them.
    """
    for name in ("SIGINT", "SIGUSR1"):  # Windows has not all of them
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class StreamLoader:
    """An endless iterable of batches; it knows what was lost, and whom one is waiting for.

    ``waiting_s`` and ``describe_wait`` may be asked from another thread, so that a watcher can say
    more than a bar that stands still.
    """

    def __init__(
        self,
        source: StepSource,
        activity: Activity,
        *,
        start_step: int,
        workers: int,
        max_broken_share: float,
    ) -> None:
        """Take the source; its first batch is that of ``start_step``."""
        self.activity = activity
        self.max_broken_share = max_broken_share
        self.samples = 0
        """Samples served since this start."""
        self.broken = 0
        """Samples that could not be used, and others came in their place, since this start."""
        self._named: set[str] = set()
        self._waiting_since_s: float | None = None
        self._loader = DataLoader(
            _Steps(source, start_step),
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_obey_the_parent_alone,
        )

    def __iter__(self) -> Iterator[CachedBatch]:
        """Yield batches.

        Raises:
            UserError: A shard can't be read, too many samples are broken, or a worker has died.
        """
        served = iter(self._loader)
        while True:
            self._waiting_since_s = time.monotonic()
            try:
                given = self._next(served)
            except RuntimeError as error:
                if not (self._loader.num_workers and _DEAD in str(error)):
                    raise
                raise UserError(
                    f"a data worker has died, often for want of memory: {error}; try fewer "
                    f"data.workers; {'; '.join(self.activity.lines())}"
                ) from error
            finally:
                self._waiting_since_s = None
            if isinstance(given, str):
                raise UserError(given)
            self._count(given)
            given.batch.lost = {**given.left_out, "broken": len(given.broken)}
            yield given.batch

    def _next(self, served: Iterator[Any]) -> Any:
        """Return the next batch; a worker's death is always a RuntimeError with ``_DEAD``."""
        try:
            return next(served)
        except (ConnectionError, EOFError) as error:  # a batch half sent
            if self._loader.num_workers:
                # Torch's own word on the death comes by a signal, amid whatever runs then: here.
                time.sleep(_SIGNAL_S)
                raise RuntimeError(f"{_DEAD} broke off: {error}") from error
            raise

    def waiting_s(self) -> float:
        """Return for how many seconds the next batch has been waited for; 0 while it is not."""
        since = self._waiting_since_s
        return 0.0 if since is None else time.monotonic() - since

    def describe_wait(self) -> str:
        """Return one line: how long a batch has been waited for, and what each worker reads."""
        return f"no batch for {self.waiting_s():.0f} s; " + "; ".join(self.activity.lines())

    def _count(self, served: Served) -> None:
        self.samples += len(served.batch)
        for line in served.broken:
            self.broken += 1
            if len(self._named) < _NAMED and line not in self._named:
                self._named.add(line)
                _log.warning("left out a sample that can't be used: %s", line)
            elif self.broken >= _NAMED and self.broken & (self.broken - 1) == 0:  # each doubling
                _log.warning("left out %d samples so far; the newest: %s", self.broken, line)
        read = self.samples + self.broken
        if read >= _JUDGED_FROM and self.broken > self.max_broken_share * read:
            raise UserError(
                f"{self.broken} of {read} samples can't be used, more than data.max_broken_share "
                f"({self.max_broken_share:g}); look at the shards: python -m train.data check"
            )
