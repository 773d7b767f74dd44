"""A line about the run at every log interval, and the same on the progress bar."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cascade.errors import UserError
from train.callbacks.finite import SkipNonFinite
from train.callbacks.ledger import Ledger
from train.callbacks.stop import Stop
from train.flops import peak_flops
from train.steps import ends_step, steps_done

_log = logging.getLogger(__name__)


class Progress(Callback):
    """Logs how fast and how well the run goes; stops one whose loss is lost.

    Step, mean loss, samples a second, share of the time spent waiting for data, peak memory and
    model FLOPs utilization.
    """

    def __init__(
        self,
        every_steps: int,
        max_steps: int,
        stop: Stop,
        ledger: Ledger,
        finite: SkipNonFinite,
        *,
        show: bool,
    ) -> None:
        """Take the interval, the run's length, its other callbacks, and whether to log lines."""
        self.every_steps = every_steps
        self.max_steps = max_steps
        self.stop = stop
        self.ledger = ledger
        self.finite = finite
        self.show = show
        self._peak = 0.0
        self._reset()

    def _reset(self) -> None:
        self._since_s = time.monotonic()
        self._waited_s = self.ledger.clock.seconds()["data"]
        self._flops = self.ledger.flops
        self._steps = self._samples = self._counted = 0
        self._loss: Tensor | float = 0.0
        self._step_loss: Tensor | float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first interval."""
        in_16_bits = str(trainer.precision).startswith(("bf16", "16"))
        dtype = torch.bfloat16 if in_16_bits else torch.float32
        self._peak = peak_flops(pl_module.device, dtype) * trainer.world_size
        self._reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step up; speak at the end of an interval.

        Raises:
            UserError: The loss is not finite.
        """
        self._samples += len(batch) * trainer.world_size
        self._step_loss = self._step_loss + trainer.callback_metrics["loss"].detach()
        if not ends_step(trainer, batch_idx):
            return
        self._steps += 1
        if not self.finite.just_skipped:
            self._loss = self._loss + self._step_loss / trainer.accumulate_grad_batches
            self._counted += 1
        self._step_loss = 0.0
        step = steps_done(pl_module, trainer)
        if step % self.every_steps != 0 and step != self.max_steps:
            return
        loss = float(torch.as_tensor(self._loss)) / self._counted if self._counted else None
        if loss is not None and not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step}; lower optim.lr, or go on with --resume from "
                "the last checkpoint with another run.seed"
            )
        elapsed_s = max(1e-9, time.monotonic() - self._since_s)
        figures = {
            "samples_per_s": self._samples / elapsed_s,
            "data_wait": (self.ledger.clock.seconds()["data"] - self._waited_s) / elapsed_s,
            "memory_gib": self.ledger.peak_memory_bytes() / 2**30,
        }
        if self._peak and self.ledger.flops > self._flops:
            figures["mfu"] = (self.ledger.flops - self._flops) / elapsed_s / self._peak
        for name, value in figures.items():
            pl_module.log(name, value, prog_bar=True)
        if self.show and trainer.is_global_zero:
            _log.info(self._line(step, loss, elapsed_s, figures))
        self._reset()

    def _line(
        self, step: int, loss: float | None, elapsed_s: float, figures: dict[str, float]
    ) -> str:
        left_s = (self.max_steps - step) * elapsed_s / self._steps
        left_min = max(0.0, min(left_s, self.stop.seconds_left())) / 60.0
        parts = [
            f"step {step}/{self.max_steps}: loss {'none' if loss is None else f'{loss:.4f}'}",
            f"{figures['samples_per_s']:.1f} samples/s",
            f"data wait {figures['data_wait']:.0%}",
            f"{figures['memory_gib']:.1f} GiB",
        ]
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.0%}")
        return ", ".join([*parts, f"{left_min:.1f} min left"])
