"""A step whose gradients are not finite is left out, counted, and ends the run if it recurs."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cascade.checkpoints.files import atomic_write_bytes
from cascade.errors import UserError
from train.steps import begins_step, ends_step, steps_done

_log = logging.getLogger(__name__)


class SkipNonFinite(Callback):
    """Drops gradients that are not finite, so that weights and optimizer stay as they are.

    Gradients are looked at after they were averaged over ranks: all ranks leave out the same step.
    """

    def __init__(self, out: Path, max_in_a_row: int) -> None:
        """Take the run's folder and how many such steps in a row it may have."""
        self.out = out
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        """Steps left out since the run began."""
        self.just_skipped = False
        """Whether the last step was left out."""
        self._in_a_row = 0
        self._suspect: Any = None
        """The first micro-batch of a last step whose loss was not finite."""
        self._statistics: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch norms' statistics as they are before the step."""
        if begins_step(trainer, batch_idx):
            self.just_skipped, self._suspect = False, None
            self._statistics = [
                (buffer, buffer.clone())
                for module in pl_module.modules()
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
                for buffer in module.buffers(recurse=False)
            ]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Drop the gradients if one of them is not finite, and what batch norms have seen."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        gradients = [one.grad for one in parameters if one.grad is not None]
        if not gradients:
            return
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):  # of this rank's parts alone until it is put together
            norm = norm.full_tensor()
        if bool(torch.isfinite(norm)):
            return
        for one in parameters:
            one.grad = None
        for buffer, before in self._statistics:
            buffer.copy_(before)
        self.just_skipped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; end the run when it does not recover.

        Raises:
            UserError: Too many in a row; the batch is saved.
        """
        # Asked only where this step may be the last: to ask is to wait for the device.
        if self._in_a_row >= self.max_in_a_row and self._suspect is None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
                self._suspect = batch
        if not ends_step(trainer, batch_idx):
            return
        if not self.just_skipped:
            self._in_a_row = 0
            return
        self.skipped += 1
        self._in_a_row += 1
        pl_module.log("skipped_steps", float(self.skipped))
        _log.warning(
            "step %d is left out: its gradients are not finite (%d in a row, %d in all)",
            steps_done(pl_module, trainer),
            self._in_a_row,
            self.skipped,
        )
        if self._in_a_row > self.max_in_a_row:
            path = self.out / f"bad_batch_rank{trainer.global_rank}.safetensors"
            _save_batch(batch if self._suspect is None else self._suspect, path)
            raise UserError(
                f"{self._in_a_row} steps in a row had gradients that are not finite; the last "
                f"batch is in {path}; lower optim.lr, or go on from the checkpoint with --resume "
                "and another run.seed"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the count for the resumable checkpoint."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the count back."""
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _save_batch(batch: Any, path: Path) -> None:
    """Write a batch's tensors, with its captions and keys as metadata."""
    fields = {one.name: getattr(batch, one.name) for one in dataclasses.fields(batch)}
    tensors = {
        name: value.detach().cpu().contiguous()
        for name, value in fields.items()
        if isinstance(value, Tensor)
    }
    texts = {
        name: json.dumps(list(value)) for name, value in fields.items() if isinstance(value, list)
    }
    atomic_write_bytes(path, save(tensors, metadata=texts))
