"""Where a run stands: optimizer steps, and the micro-batches that make one."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


def begins_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the first of its optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def steps_done(system: LightningModule, trainer: Trainer) -> int:
    """Return the steps of the main optimizer (``global_step`` counts every optimizer's)."""
    return trainer.global_step // max(1, getattr(system, "num_optimizers", 1))


class WholeSteps(Callback):
    """Goes on with the first micro-batch of a step.

    Lightning counts micro-batches, and goes on after the last one: within a window, where the run
    ended in one, or where windows were of another length before.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let it say what one says that was written at a step's end, with windows as now."""
        steps = checkpoint["global_step"] // max(1, getattr(pl_module, "num_optimizers", 1))
        if steps == 0:
            return
        batches = steps * trainer.accumulate_grad_batches
        loops = checkpoint["loops"]["fit_loop"]
        counted = loops["epoch_loop.batch_progress"]
        for counts in (counted["total"], counted["current"]):
            # Lightning saves before it has counted the last batch as done, and counts it then.
            counts.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1
