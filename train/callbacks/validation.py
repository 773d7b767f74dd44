"""The loss on held-out pictures: the same pictures, captions, times and noise at every look."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cascade.errors import UserError
from train.callbacks.ema import WeightAverage, exported_networks, with_weights
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.callbacks.stop import all_are_to_end
from train.clock import PhaseClock
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.data.open import TrainingData
from train.data.sources import why_whole_alone
from train.draws import StepDraws
from train.losses.denoising import LEVELS
from train.steps import ends_step, steps_done

_log = logging.getLogger(__name__)

VALIDATION_FILE = "validation.jsonl"


@dataclass(frozen=True)
class ValidationConfig:
    """What a run is judged on while it learns.

    The loss is the published one, epsilon weighted by P2 at evenly spread times, whatever the
    network predicts and however it is trained: runs of different recipes can be compared.
    """

    shards: str
    """Shards of held-out pictures, of the run's size, crop and filters. A stream of them is exact,
    whatever ``data.mode`` is: each is read once before any is seen again. Only shards that can't
    be indexed (``pipe:``, packed, of a server that gives no pieces) are drawn with replacement."""
    folder: str | None = None
    """Their cache folder, where ``data.mode`` is memory."""
    every_steps: int = 500
    """Steps between looks; the end of the run looks as well."""
    samples: int = 1024
    """Pictures of a look, over all ranks; rounded up to whole batches. A smaller set is seen again,
    with other times and noise."""
    batch_size: int | None = None
    """Pictures a batch and device; null: as in training."""
    seed: int = 0
    """Seeds captions, times and noise."""

    def __post_init__(self) -> None:
        """Refuse what looks at nothing."""
        for name in ("every_steps", "samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")

    def data(self, trained: DataConfig) -> DataConfig:
        """Return how the pictures are served, given how those of the training are.

        Raises:
            UserError: No shard matches.
        """
        mode = trained.mode
        if mode != "memory":
            mode = "exact"
            if (reason := why_whole_alone(self.shards)) is not None:
                mode = "resampled"
                _log.info("validation.shards: drawn with replacement: %s", reason)
        return replace(
            trained,
            mode=mode,
            shards=self.shards,
            folder=self.folder,
            batch_size=self.batch_size or trained.batch_size,
            mix=(),  # theirs alone
            seed=self.seed,
        )


class Validated(Protocol):
    """A system that can be judged."""

    def validation_errors(self, batch: CachedBatch, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return each sample's published loss and diffusion time, both ``(B,)``."""
        ...


class Validation(Callback):
    """Writes a row of ``OUT/validation.jsonl`` at every look, and the curves to the loggers.

    A row holds ``step``, ``samples`` and ``seconds`` of training so far, ``val_loss`` of the
    averaged weights, ``val_loss_raw`` of the raw ones, and ``by_t``, the averaged weights' loss in
    equal parts of the time. Looking changes nothing of the training.
    """

    def __init__(
        self, config: ValidationConfig, data: TrainingData, out: Path, *, pixels: bool
    ) -> None:
        """Take what is looked at, its opened data, the run's folder, and if it reads pixels."""
        self.config = config
        self.data = data
        self.pixels = pixels
        self.path = out / VALIDATION_FILE
        self._batches: list[CachedBatch] = []
        self._average: WeightAverage | None = None
        self._ledger: Ledger | None = None
        self._clock = PhaseClock()
        self._looked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read and encode the pictures, once.

        Raises:
            UserError: What is there can't be read, or is too little for one batch a rank.
        """
        self._average = find_callback(trainer, WeightAverage)
        self._ledger = find_callback(trainer, Ledger)
        if self._ledger is not None:
            self._clock = self._ledger.clock
        with self._clock.within("validation"):
            try:
                loader = self.data.loader_from(0, trainer.global_rank, trainer.world_size)
            except UserError as error:
                # It speaks of data.batch_size, which is the run's own where this one is not set.
                raise UserError(f"validation: {error}; set validation.batch_size") from error
            encode = self.data.encode
            if encode is not None:
                encode.load(pl_module.device)
            seen = 0
            for batch in islice(loader, self.config.samples):
                if encode is not None:
                    encode.fill(batch)
                if not self.pixels:
                    batch.pixels = None
                self._batches.append(_moved(batch, torch.device("cpu")))
                seen += len(batch) * trainer.world_size
                if seen >= self.config.samples:
                    break
            if encode is not None:
                encode.unload()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look every so many steps."""
        done = steps_done(pl_module, trainer)
        due = ends_step(trainer, batch_idx) and done % self.config.every_steps == 0
        if due and not all_are_to_end(trainer):
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what the run ended with; not if it was told to end: who told it may not wait."""
        if not all_are_to_end(trainer):
            self.look(trainer, pl_module)

    def look(self, trainer: Trainer, system: LightningModule) -> None:
        """Measure averaged and raw weights and write both down."""
        step = steps_done(system, trainer)
        if step == self._looked_at:
            return
        self._looked_at = step
        assert self._average is not None and self._ledger is not None, "every run has both"
        with self._clock.within("validation"):
            names = exported_networks(system)
            averages = {name: self._average.loadable(name) for name in names}
            loss, by_time = self._loss(trainer, system, averages)
            raw, _ = self._loss(trainer, system, None)
        if not trainer.is_global_zero:
            return
        row = {
            "step": step,
            "samples": self._ledger.samples,
            "seconds": round(self._ledger.training_seconds(), 3),
            "val_loss": loss,
            "val_loss_raw": raw,
            "by_t": by_time,
        }
        with self._ledger.errors.kept(), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics({"val_loss": loss, "val_loss_raw": raw}, step=trainer.global_step)
        _log.info("step %d: validation loss %.4f (raw weights %.4f)", step, loss, raw)

    @torch.no_grad()
    def _loss(
        self,
        trainer: Trainer,
        system: LightningModule,
        averages: dict[str, dict[str, Tensor]] | None,
    ) -> tuple[float, list[float | None]]:
        """Return the mean loss, and the mean in each part of the time; over all ranks."""
        # Sum of losses and number of samples, by level.
        totals = torch.zeros(2, LEVELS, dtype=torch.float64, device=system.device)
        with with_weights(exported_networks(system), averages):
            for number, batch in enumerate(self._batches):
                draws = StepDraws(self.config.seed, number, trainer.global_rank, trainer.world_size)
                moved = _moved(batch, system.device)
                with trainer.precision_plugin.forward_context():
                    error, t = cast(Validated, system).validation_errors(moved, draws)
                level = (t * LEVELS).long().clamp(max=LEVELS - 1)
                totals[0].index_add_(0, level, error.double())
                totals[1].index_add_(0, level, torch.ones_like(error, dtype=torch.float64))
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")  # type: ignore[assignment]
        sums, counts = totals.tolist()
        by_time = [one / count if count else None for one, count in zip(sums, counts, strict=True)]
        return sum(sums) / sum(counts), by_time


def _moved(batch: CachedBatch, device: torch.device) -> CachedBatch:
    moved = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(moved, name, value.to(device))
    return moved
