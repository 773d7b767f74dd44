"""Runs a system under Lightning's Trainer with what all runs share."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from cascade.checkpoints.files import atomic_write_text
from cascade.config import to_dict
from cascade.errors import UserError
from train.callbacks.ema import WeightAverage
from train.callbacks.export import Export
from train.callbacks.ledger import Ledger
from train.memory import keep_freed_memory
from train.settings import OptimConfig, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

LoaderFrom = Callable[[int], "Iterable[object]"]
"""Makes the loader whose first batch is that of the given step."""


def prepare(run: RunConfig, config: object) -> Path:
    """Seed, set threads, make the run's folder and keep the resolved configuration in it."""
    pl.seed_everything(run.seed, verbose=False)
    keep_freed_memory()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    out = Path(run.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.out {out}: can't be made: {error.strerror}") from error
    atomic_write_text(out / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    return out


def fit(
    system: pl.LightningModule,
    loader_from: LoaderFrom,
    run: RunConfig,
    optim: OptimConfig,
    *,
    resume: bool,
) -> None:
    """Train ``system`` for ``run.max_steps`` steps or ``run.max_minutes`` minutes.

    Raises:
        UserError: ``resume`` without a checkpoint, or a fresh start over an existing one.
    """
    out = Path(run.out)
    newest = out / "checkpoints" / "last.ckpt"
    if resume and not newest.is_file():
        raise UserError(f"--resume: {newest} is not there; start without --resume")
    if not resume and newest.is_file():
        raise UserError(f"{out} holds a run already; go on with --resume or choose another run.out")
    optimizers = getattr(system, "num_optimizers", 1)
    average, ledger = WeightAverage(run.ema_decay), Ledger()
    every = run.checkpoint_every_steps * optimizers
    manual = not system.automatic_optimization
    trainer = pl.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        precision=run.precision,
        max_steps=run.max_steps * optimizers,
        max_epochs=-1,
        max_time=None if run.max_minutes is None else datetime.timedelta(minutes=run.max_minutes),
        gradient_clip_val=None if manual or optim.grad_clip == 0 else optim.grad_clip,
        logger=CSVLogger(out, name="logs"),
        log_every_n_steps=run.log_every_steps,
        callbacks=[
            average,
            ledger,
            Export(out, every, getattr(torch, run.export_dtype), average, ledger),
            ModelCheckpoint(
                out / "checkpoints",
                filename="{step}",
                every_n_train_steps=every,
                save_top_k=run.keep_checkpoints,
                monitor="step",
                mode="max",
                save_last=True,
                save_on_train_epoch_end=False,
            ),
        ],
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
    )
    start_step = 0
    if resume:
        checkpoint = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
        start_step = checkpoint["global_step"] // optimizers
        del checkpoint
        _log.info("resuming %s at step %d", out, start_step)
    trainer.fit(
        system,
        train_dataloaders=loader_from(start_step),
        ckpt_path=newest if resume else None,
        weights_only=True,
    )
    trainer.save_checkpoint(newest)
    _log.info(
        "%s: %d steps, %d samples, %.0f s",
        out,
        trainer.global_step // optimizers,
        ledger.samples,
        ledger.total_seconds(),
    )
