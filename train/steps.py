"""Where a run stands: optimizer steps, and the micro-batches that make one."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer


def begins_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the first of its optimizer step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def ends_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return whether a micro-batch is the last of its optimizer step."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def steps_done(system: LightningModule, trainer: Trainer) -> int:
    """Return the steps of the main optimizer (``global_step`` counts every optimizer's)."""
    return trainer.global_step // max(1, getattr(system, "num_optimizers", 1))
