"""Options of Lightning's Trainer that a run passes through (``run.trainer``), checked by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import lightning.pytorch as pl

from cascade.config import not_among
from cascade.errors import UserError

_OWN_LOGGERS = "the run logs to CSV, TensorBoard and run.wandb_project"
_WHOLE_SET = "a step's place decides its samples: set run.max_steps, or name fewer shards"
_DECIDED = {
    "accelerator": "set run.accelerator",
    "accumulate_grad_batches": "set run.accumulate",
    "barebones": "it would leave out checkpoints and logs; set run.log_every_steps",
    "callbacks": "the run has its own, in the order in which they must act",
    "default_root_dir": "set run.out",
    "devices": "set run.devices",
    "enable_checkpointing": "set run.checkpoint_every_steps and run.keep_checkpoints",
    "fast_dev_run": "set run.max_steps",
    "gradient_clip_val": "set optim.grad_clip",
    "limit_train_batches": _WHOLE_SET,
    "log_every_n_steps": "set run.log_every_steps",
    "logger": _OWN_LOGGERS,
    "max_epochs": "set run.max_steps",
    "max_steps": "set run.max_steps",
    "max_time": "set run.max_minutes",
    "min_epochs": "set run.max_steps",
    "min_steps": "set run.max_steps",
    "model_registry": "weights are named by init_from",
    "num_nodes": "set run.num_nodes",
    "overfit_batches": _WHOLE_SET,
    "plugins": "the run has its own for checkpoints; set run.precision or run.keep_checkpoints",
    "precision": "set run.precision",
    "reload_dataloaders_every_n_epochs": "the loader goes on by itself, see data.mode",
    "strategy": "set run.strategy",
    "sync_batchnorm": "the run sets it where there are several GPUs",
    "use_distributed_sampler": "the loader gives each rank its samples, see data.mode",
}
"""What the run itself decides, and which option of the run to use instead."""

Option = bool | int | float | str | None


def check_trainer_options(options: Mapping[str, Option]) -> None:
    """Refuse what the Trainer does not know, and what the run itself decides.

    Raises:
        UserError: Naming the nearest option, or the option of the run to use.
    """
    known = [name for name in inspect.signature(pl.Trainer).parameters if name not in _DECIDED]
    for name in options:
        if name in _DECIDED:
            raise UserError(f"run.trainer.{name}: the run decides this; {_DECIDED[name]}")
        if name not in known:
            raise not_among(f"run.trainer.{name}: Lightning's Trainer has no option", name, known)
