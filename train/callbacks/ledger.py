"""What a run has cost: steps, samples, seconds; kept over resumes."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Ledger(Callback):
    """Counts optimizer steps, samples seen and wall-clock seconds of training."""

    def __init__(self) -> None:
        """Start at zero."""
        self.samples = 0
        self.seconds = 0.0
        self._started_s: float | None = None
        self._samples_at_start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started_s = time.monotonic()
        self._samples_at_start = self.samples

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and log the rate."""
        self.samples += len(batch) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            assert self._started_s is not None, "on_train_start comes before any batch"
            elapsed_s = time.monotonic() - self._started_s
            pl_module.log("samples", float(self.samples))
            pl_module.log("samples_per_s", (self.samples - self._samples_at_start) / elapsed_s)

    def total_seconds(self) -> float:
        """Return the seconds of this and of all earlier starts of the run."""
        if self._started_s is None:
            return self.seconds
        return self.seconds + time.monotonic() - self._started_s

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for the resumable checkpoint."""
        return {"samples": self.samples, "seconds": self.total_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts back."""
        self.samples = state_dict["samples"]
        self.seconds = state_dict["seconds"]
