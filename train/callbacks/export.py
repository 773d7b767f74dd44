"""Exports the averaged weights as safetensors: at checkpoints, at chosen steps and at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.checkpoints.files import read_tensors, save_network
from cascade.errors import UserError
from train.callbacks.ema import WeightAverage, exported_networks
from train.callbacks.ledger import Ledger
from train.networks import plain_copy
from train.rank_errors import RankErrors
from train.steps import ends_step, steps_done

_log = logging.getLogger(__name__)


def export_folder(out: Path, step: int) -> Path:
    """Return where a run keeps what it exported after one of ``run.export_at_steps``."""
    return out / "exports" / f"step={step}"


class Export(Callback):
    """Writes ``OUT/NAME.safetensors`` for each exported network, averaged weights, atomically."""

    def __init__(
        self,
        out: Path,
        every_steps: int,
        dtype: torch.dtype,
        average: WeightAverage,
        ledger: Ledger,
        errors: RankErrors | None = None,
        at_steps: Sequence[int] = (),
    ) -> None:
        """Take the folder, the interval, and the callbacks that hold what is exported.

        ``at_steps`` are kept beside, each in a folder of its own.
        """
        self.out = out
        self.every_steps = every_steps
        self.at_steps = frozenset(at_steps)
        self.dtype = dtype
        self.average = average
        self.ledger = ledger
        self.errors = RankErrors() if errors is None else errors
        self._written_step = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Export every so many steps, and at those that were asked for."""
        if not ends_step(trainer, batch_idx):
            return
        if trainer.global_step % self.every_steps == 0:
            self.write(trainer, pl_module)
        step = steps_done(pl_module, trainer)
        if step in self.at_steps:
            self._write_whole(trainer, pl_module, export_folder(self.out, step))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export what the run ended with."""
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, system: LightningModule) -> None:
        """Write all exported networks; only the first rank writes.

        Raises:
            UserError: The weights are not finite; the earlier export stays.
        """
        if trainer.global_step == self._written_step:
            return
        self._written_step = trainer.global_step
        self._write_whole(trainer, system, self.out)

    def _write_whole(self, trainer: Trainer, system: LightningModule, out: Path) -> None:
        with self.ledger.clock.within("checkpoint"):
            averages = {name: self.average.whole(name) for name in exported_networks(system)}
            if not trainer.is_global_zero:
                return
            with self.errors.kept():
                out.mkdir(parents=True, exist_ok=True)
                self._write(trainer, system, averages, out)
        _log.info("exported %s to %s", ", ".join(averages), out)

    def rehearse(self, trainer: Trainer, system: LightningModule, folder: Path) -> None:
        """Write all exported networks elsewhere and read their files back; for all ranks to call.

        Raises:
            UserError: One can't be written, or reads back otherwise.
        """
        with self.ledger.clock.within("checkpoint"):
            averages = {name: self.average.whole(name) for name in exported_networks(system)}
            if not trainer.is_global_zero:
                return
            with self.errors.kept():
                self._write(trainer, system, averages, folder)
                for path in sorted(folder.rglob("*.safetensors")):
                    tensors = read_tensors(path)
                    for key in tensors:
                        if not bool(tensors[key].isfinite().all()):
                            raise UserError(f"{path}: {key} reads back with values not finite")

    def _write(
        self,
        trainer: Trainer,
        system: LightningModule,
        averages: dict[str, dict[str, Tensor]],
        out: Path,
    ) -> None:
        metadata = {
            "weights": "ema",
            "train_steps": str(steps_done(system, trainer)),
            "train_samples": str(self.ledger.samples),
            "train_seconds": f"{self.ledger.total_seconds():.0f}",
        }
        for name, network in exported_networks(system).items():
            average = averages[name]
            if not all(value.isfinite().all() for value in average.values()):
                raise UserError(
                    f"{name}: its weights are not finite at step {steps_done(system, trainer)}; "
                    "not exported, the last checkpoint is kept; lower optim.lr"
                )
            averaged = plain_copy(network, average)
            more = own_metadata(system, name)
            export_one(out, name, averaged, system, self.dtype, metadata | more)


def own_metadata(system: LightningModule, name: str) -> dict[str, str]:
    """Return what a system itself says of an exported network, such as how it is sampled."""
    says = getattr(system, "export_metadata", None)
    return {} if says is None else says(name)


def export_one(
    out: Path,
    name: str,
    network: nn.Module,
    system: LightningModule,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> None:
    """Write one network; a system may know a format of its own (a transformers folder)."""
    own_export = getattr(system, "export_network", None)
    if own_export is not None:
        own_export(out, name, network, dtype, metadata)
    else:
        save_network(out / f"{name}.safetensors", network, dtype=dtype, metadata=metadata)
