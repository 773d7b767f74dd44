"""Writes what a run will write at its end before its first step: a fault shows at once."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from train.callbacks.checkpoints import REHEARSAL
from train.callbacks.export import Export

_log = logging.getLogger(__name__)


class Rehearsal(Callback):
    """Saves a checkpoint and the exports of a fresh run, reads them back, and removes them.

    A full disk, a folder that can't be written to or a network that can't be exported must not be
    found after hours of training.
    """

    def __init__(self, out: Path, export: Export) -> None:
        """Take the run's folder and what exports."""
        self.folder = out / ".rehearsal"
        self.export = export

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse, unless the run goes on: then it has written before.

        Raises:
            UserError: What can't be written.
        """
        if trainer.global_step > 0:
            return
        try:
            trainer.save_checkpoint(self.folder / REHEARSAL)
            self.export.rehearse(trainer, pl_module, self.folder)
        finally:
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                shutil.rmtree(self.folder, ignore_errors=True)
