"""Where a run's losses, rates, configuration and pictures go beside its own files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from cascade.errors import UserError
from train.settings import RunConfig


def make_loggers(out: Path, run: RunConfig) -> list[Logger]:
    """Return a CSV file, TensorBoard's files, and what was asked for.

    Raises:
        UserError: Weights & Biases is asked for, and is not installed or can't be reached.
    """
    loggers: list[Logger] = [
        CSVLogger(out, name="logs", flush_logs_every_n_steps=1),
        TensorBoardLogger(out, name="tensorboard", version=""),
    ]
    if run.wandb_project is not None:
        loggers.append(_wandb(out, run.wandb_project))
    return loggers


def _wandb(out: Path, project: str) -> WandbLogger:
    # One run there for all starts of the one here.
    name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
    try:
        logger = WandbLogger(project=project, name=out.name, save_dir=out, id=name, resume="allow")
        from wandb.errors import Error
    except ModuleNotFoundError as error:
        raise UserError(
            f"run.wandb_project is {project}: wandb is not installed; pip install wandb, or leave "
            "it out"
        ) from error
    try:
        _ = logger.experiment  # logs in here, before other processes wait for this one
    except Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"run.wandb_project is {project}: {reason} Or set WANDB_MODE=offline, and `wandb sync` "
            "later"
        ) from error
    return logger


def note_config(loggers: Sequence[Logger], config: str) -> None:
    """Give TensorBoard and Weights & Biases the resolved configuration, a YAML text."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            quoted = "".join(f"    {line}\n" for line in config.splitlines())  # Markdown's code
            logger.experiment.add_text("config", quoted)
        elif isinstance(logger, WandbLogger):
            logger.log_hyperparams(yaml.safe_load(config))


def show_picture(loggers: Sequence[Logger], name: str, picture: Image.Image, step: int) -> None:
    """Show a picture in TensorBoard and in Weights & Biases."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            pixels = np.asarray(picture.convert("RGB"))  # (H, W, 3)
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture], step=step)
