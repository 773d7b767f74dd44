"""Runs a system under Lightning's Trainer with what all runs share."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cascade.checkpoints.files import atomic_write_text
from cascade.config import to_dict
from cascade.errors import UserError
from train.callbacks.checkpoints import (
    AtomicCheckpoints,
    checkpoint_global_step,
    newest_checkpoint,
)
from train.callbacks.ema import WeightAverage
from train.callbacks.export import Export
from train.callbacks.ledger import Ledger
from train.callbacks.progress import Progress
from train.callbacks.stop import Stop
from train.data.pictures import BOMB_WARNING
from train.draws import SeedLayers
from train.memory import keep_freed_memory
from train.settings import OptimConfig, RunConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

LoaderFrom = Callable[[int, int, int], "Iterable[object]"]
"""Maps (step, rank, number of ranks) to the loader whose first batch is that step's."""

_FIXED = ("model", "compressor", "previewer", "discriminator")
_FIXED_OPTIM = ("name", "lr", "muon_lr", "betas", "weight_decay")
_NO_NEWS = (
    ".*treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*ModelCheckpoint with manual optimization.*",  # after the step is what we want
    BOMB_WARNING,
)
"""Warnings of Lightning that tell a user of ours nothing."""


def prepare(run: RunConfig, config: object, *, resume: bool) -> Path:
    """Seed, set threads, make the run's folder and keep the resolved configuration in it.

    Raises:
        UserError: ``resume`` without a checkpoint or with other networks; a fresh start over an
            existing run; a folder that can't be made.
    """
    _quiet()
    out = Path(run.out)
    newest = newest_checkpoint(out)
    if resume and not newest.is_file():
        raise UserError(f"--resume: {newest} is not there; start without --resume")
    if not resume and newest.is_file():
        raise UserError(f"{out} holds a run already; go on with --resume or choose another run.out")
    values = to_dict(config)
    if resume and (out / "config.yaml").is_file():
        earlier = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
        _refuse_other_networks(earlier, values)
    pl.seed_everything(run.seed, verbose=False)
    keep_freed_memory()
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.out {out}: can't be made: {error.strerror}") from error
    atomic_write_text(out / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    return out


def _quiet() -> None:
    """Leave out what libraries say of themselves; errors and news stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # "Loading weights" of a small CLIP
    for name in ("lightning.pytorch", "lightning.fabric", "gcsfs"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)


def _refuse_other_networks(earlier: dict[str, object], now: dict[str, object]) -> None:
    """Refuse to resume with what the checkpoint has fixed: sizes and the optimizer's values."""
    kept: list[tuple[str, object, object]] = []
    for section in (*_FIXED, "optim"):
        old, new = earlier.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = _FIXED_OPTIM if section == "optim" else tuple(new)
            kept += [(f"{section}.{key}", old[key], new[key]) for key in keys if key in old]
    for name, before, wanted in kept:
        if before != wanted:
            raise UserError(
                f"--resume: {name} is {wanted} but the run was started with {before}; keep it, or "
                "start another run.out (init_from takes the trained weights over)"
            )


def fit(
    system: pl.LightningModule,
    loader_from: LoaderFrom,
    run: RunConfig,
    optim: OptimConfig,
    *,
    resume: bool,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Train ``system`` for ``run.max_steps`` steps or ``run.max_minutes`` minutes.

    Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint and an export.
    ``callbacks`` act before those that all runs have.

    Raises:
        UserError: A broken checkpoint, a device that is not there, a loss that is not finite.
        KeyboardInterrupt: The run was asked to stop, and has.
    """
    out = Path(run.out)
    newest = newest_checkpoint(out)
    optimizers = getattr(system, "num_optimizers", 1)
    start_step = checkpoint_global_step(newest) // optimizers if resume else 0
    if resume:
        _log.info("resuming %s at step %d of %d", out, start_step, run.max_steps)
    stop, ledger = Stop(run.max_minutes), Ledger()
    trainer = _trainer(system, run, optim, stop, ledger, callbacks)
    trainer.fit(
        system,
        train_dataloaders=loader_from(start_step, trainer.global_rank, trainer.world_size),
        ckpt_path=newest if resume else None,
        weights_only=True,
    )
    trainer.save_checkpoint(newest)
    _log.info(
        "%s: %d of %d steps, %d samples, %.0f s",
        out,
        trainer.global_step // optimizers,
        run.max_steps,
        ledger.samples,
        ledger.total_seconds(),
    )
    if stop.interrupted_by is not None:
        raise KeyboardInterrupt(stop.interrupted_by)


def _trainer(
    system: pl.LightningModule,
    run: RunConfig,
    optim: OptimConfig,
    stop: Stop,
    ledger: Ledger,
    more: Sequence[pl.Callback],
) -> pl.Trainer:
    """Build the Trainer with the callbacks of all runs, in the order in which they must act."""
    out = Path(run.out)
    optimizers = getattr(system, "num_optimizers", 1)
    average = WeightAverage(run.ema_decay)
    every = run.checkpoint_every_steps * optimizers  # Lightning counts each optimizer's steps
    manual = not system.automatic_optimization
    terminal = sys.stderr.isatty()
    arguments: dict[str, Any] = dict(
        accelerator=run.accelerator,
        devices=run.devices,
        precision=run.precision,
        max_steps=run.max_steps * optimizers,
        max_epochs=-1,
        gradient_clip_val=None if manual or optim.grad_clip == 0 else optim.grad_clip,
        logger=CSVLogger(out, name="logs"),
        log_every_n_steps=run.log_every_steps,
        plugins=[AtomicCheckpoints()],
        callbacks=[
            *more,
            SeedLayers(run.seed),
            average,
            ledger,
            Progress(run.log_every_steps, run.max_steps, stop, show=not terminal),
            stop,
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
                # --resume goes on from last.ckpt: never write beside it as last-v1.ckpt.
                enable_version_counter=False,
            ),
        ],
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )
    try:
        return pl.Trainer(**arguments)
    except MisconfigurationException as error:
        raise UserError(
            f"run.accelerator {run.accelerator}, {run.devices} device(s): {error}"
        ) from error
