"""A line about the run at every log interval, for those who read its output later."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cascade.errors import UserError
from train.callbacks.stop import Stop

_log = logging.getLogger(__name__)


class Progress(Callback):
    """Logs step, mean loss, samples a second and minutes left; stops a run whose loss is lost."""

    def __init__(self, every_steps: int, max_steps: int, stop: Stop, *, show: bool) -> None:
        """Take the interval, the run's length, its time limit, and whether to log lines at all."""
        self.every_steps = every_steps
        self.max_steps = max_steps
        self.stop = stop
        self.show = show
        self._reset()

    def _reset(self) -> None:
        self._since_s = time.monotonic()
        self._steps = self._samples = 0
        self._loss: Tensor | float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first interval."""
        self._reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step up; speak at the end of an interval.

        Raises:
            UserError: The loss is not finite.
        """
        self._steps += 1
        self._samples += len(batch) * trainer.world_size
        self._loss = self._loss + trainer.callback_metrics["loss"].detach()
        step = trainer.global_step // max(1, getattr(pl_module, "num_optimizers", 1))
        if step % self.every_steps != 0 and step != self.max_steps:
            return
        loss = float(torch.as_tensor(self._loss)) / self._steps
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step}; lower optim.lr, or go on with --resume from "
                "the last checkpoint with another run.seed"
            )
        if self.show and trainer.is_global_zero:
            _log.info(self._line(step, loss))
        self._reset()

    def _line(self, step: int, loss: float) -> str:
        elapsed_s = max(1e-9, time.monotonic() - self._since_s)
        left_s = (self.max_steps - step) * elapsed_s / self._steps
        left_min = max(0.0, min(left_s, self.stop.seconds_left())) / 60.0
        return (
            f"step {step}/{self.max_steps}: loss {loss:.4f}, "
            f"{self._samples / elapsed_s:.1f} samples/s, {left_min:.1f} min left"
        )
