"""Says so when no batch comes, and which shard is being read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

_log = logging.getLogger(__name__)


@runtime_checkable
class Waited(Protocol):
    """A loader that knows whether it is waited for."""

    def waiting_s(self) -> float:
        """Return for how many seconds the next batch has been waited for."""
        ...

    def describe_wait(self) -> str:
        """Return one line: how long, and what each worker reads."""
        ...


class Stall(Callback):
    """Warns once a minute, from a thread of its own, while no batch comes."""

    def __init__(
        self,
        after_s: float = 60.0,
        look_every_s: float = 5.0,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the seconds without a batch that are worth a word, and how often to look.

        ``on_wait`` is called at every look at which a batch is waited for.
        """
        self.after_s, self.on_wait = after_s, on_wait
        self.look_every_s = look_every_s
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch the loader, if it knows whether it is waited for."""
        loader: Any = trainer.train_dataloader
        if isinstance(loader, Waited):
            self._done.clear()
            self._thread = threading.Thread(target=self._watch, args=(loader,), daemon=True)
            self._thread.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no more."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Watch no more."""
        self._stop()

    def _watch(self, loader: Waited) -> None:
        next_s = self.after_s
        while not self._done.wait(self.look_every_s):
            waited_s = loader.waiting_s()
            if waited_s > 0:
                self.on_wait()
            if waited_s < self.after_s:
                next_s = self.after_s
            elif waited_s >= next_s:
                next_s = waited_s + self.after_s
                _log.warning("%s", loader.describe_wait())

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
