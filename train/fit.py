"""Runs a system under Lightning's Trainer with what all runs share."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cascade.checkpoints.files import atomic_write_text
from cascade.config import to_dict
from cascade.errors import UserError, describe_os_error
from cascade.pipelines.placement import computes_bfloat16, pick_device
from train.callbacks.checkpoints import (
    CHECKPOINTS,
    RunCheckpoints,
    checkpoint_global_step,
    checkpoint_path,
    newest_checkpoint,
)
from train.callbacks.ema import WeightAverage
from train.callbacks.export import Export
from train.callbacks.finite import SkipNonFinite
from train.callbacks.ledger import Ledger
from train.callbacks.progress import Progress
from train.callbacks.rehearsal import Rehearsal
from train.callbacks.stall import Stall
from train.callbacks.stop import NoBatchWhileEnding, Stop, StopAtOnce
from train.clock import PhaseClock, process_began_s
from train.course import BatchesPerEpoch, go_on
from train.data.pictures import BOMB_WARNING
from train.data.select import lost_line
from train.draws import SeedLayers
from train.launch import cluster_environment, global_rank
from train.loggers import make_loggers
from train.memory import keep_freed_memory
from train.noted import (
    CONFIG_FILE,
    DONE_FILE,
    KIND_LINE,
    NoteStart,
    read_noted,
    refuse_lost_checkpoints,
)
from train.optim import require_low_bit
from train.rank_errors import RankErrors
from train.reduction import HostGroup
from train.run_lock import make_folder
from train.settings import OptimConfig, RunConfig
from train.sharding import ShardedStrategy, check_can_shard
from train.steps import WholeSteps, steps_done
from train.trainer_options import check_trainer_options

if TYPE_CHECKING:
    from collections.abc import Iterable

_log = logging.getLogger(__name__)

LoaderFrom = Callable[[int, int, int], "Iterable[object]"]
"""Maps (micro-batches that a rank has seen, rank, number of ranks) to a loader of what follows."""

_FIXED = (
    "model",
    "model_v2",
    "compressor",
    "previewer",
    "discriminator",
    "lora",
    "guidance",
    "adversarial",
    "align",  # its projection learns too
)
_FIXED_WHOLE = ("lora", "teacher", "time_unit", "adaptive_weight", "posthoc_ema")
_FIXED_DIFFUSION = ("prediction", "schedule", "time_input", "zero_terminal_snr")
"""What the network's output means; how it is weighed and drawn may change."""
_FIXED_OPTIM = ("name", "lr", "muon_lr", "betas", "weight_decay")
_NO_NEWS = (
    ".*treespec, LeafSpec.*",
    ".*does not have many workers.*",
    ".*in eval mode at the start of training.*",
    ".*callbacks used to create the checkpoint.*",  # another every_n_steps: no matter
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*resuming from a checkpoint that ended before the epoch ended.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Grad strides do not match bucket view strides.*",  # 1 x 1 kernels: no matter
    ".*ModelCheckpoint with manual optimization.*",  # after the step is what we want
    BOMB_WARNING,
)
"""Warnings of Lightning that tell a user of ours nothing."""


@dataclass(frozen=True)
class Prepared:
    """A run's folder, ready to train in."""

    out: Path
    newest: Path | None
    """The checkpoint to go on from; None: from the beginning."""
    config: str
    """The resolved configuration as its ``config.yaml`` will have it, when training begins."""
    clock: PhaseClock
    """Runs from the beginning of the set-up."""


def prepare(run: RunConfig, config: object, *, resume: bool) -> Prepared:
    """Seed, set threads, make the run's folder and hold it against the configuration.

    Args:
        run: What all runs share.
        config: The whole configuration.
        resume: Go on from the newest checkpoint, or start if there is none: the same command
            serves for the first start and for every later one.

    Raises:
        UserError: ``resume`` with other networks; a fresh start over an existing run, or over one
            whose checkpoints are gone; a folder that can't be made.
    """
    _quiet()
    check_trainer_options(run.trainer)
    clock = PhaseClock(process_began_s())
    out = Path(run.out)
    newest = newest_checkpoint(out, tidy=global_rank() == 0)
    if not resume and newest is not None:
        raise UserError(f"{out} holds a run already; go on with --resume or choose another run.out")
    values = to_dict(config)
    own_kind = type(config).__name__
    if newest is None:
        refuse_lost_checkpoints(out, run.checkpoint_every_steps)
    elif not (out / CONFIG_FILE).is_file():
        _log.warning(
            "--resume: %s is not there: whether this is the run that was begun can't be told",
            out / CONFIG_FILE,
        )
    else:
        noted = read_noted(out)
        if noted.kind not in (None, own_kind):
            raise UserError(
                f"--resume: {out} holds a run of another kind ({noted.kind}, this is {own_kind}); "
                "choose another run.out"
            )
        _refuse_other_networks(noted.values, values, out)
    pl.seed_everything(run.seed, verbose=False)
    keep_freed_memory()
    if run.precision == "bf16-mixed" and _in_software(run):
        _log.warning(
            "run.precision is bf16-mixed: this CPU has no instructions for bfloat16 and computes "
            "it in software, many times slower than float32; --run.precision 32-true"
        )
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    make_folder(out)
    noted_now = KIND_LINE.format(own_kind) + yaml.safe_dump(values, sort_keys=False)
    return Prepared(out, newest, noted_now, clock)


def _quiet() -> None:
    """Leave out what libraries say of themselves; errors and news stay."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # "Loading weights" of a small CLIP
    for name in ("lightning.pytorch", "lightning.fabric", "gcsfs"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message=message)


def _refuse_other_networks(earlier: dict[str, Any], now: dict[str, object], out: Path) -> None:
    """Refuse to resume with what the checkpoint has fixed: sizes and the optimizer's values."""
    kept: list[tuple[str, object, object]] = []
    partly = {"optim": _FIXED_OPTIM, "diffusion": _FIXED_DIFFUSION}
    old_lesson, lesson = earlier.get("distill"), now.get("distill")
    if "distill" in earlier and "distill" in now:
        there, here = ("unet_kd" if one else "unet" for one in (old_lesson, lesson))
        if there != here:
            raise UserError(
                f"--resume: {out} holds a run of another kind (train {there}, this is train "
                f"{here}); go on with python -m train {there}, or choose another run.out"
            )
    if isinstance(old_lesson, dict) and isinstance(lesson, dict):
        old_teacher, teacher = old_lesson.get("teacher"), lesson.get("teacher")
        if old_teacher != teacher:  # the same file may lie elsewhere now
            _log.warning("--resume: distill.teacher is %s now, and was %s", teacher, old_teacher)
    for section in (*_FIXED, *_FIXED_WHOLE[1:], *partly):
        old, new = earlier.get(section), now.get(section)
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in partly.get(section, tuple(new)) if key in old and key in new]
            if section == "diffusion" and "adaptive" in (old.get("weight"), new.get("weight")):
                keys.append("weight")  # what it has learned of the loss is in the checkpoint
            kept += [(f"{section}.{key}", old[key], new[key]) for key in keys]
        elif section in _FIXED_WHOLE and section in earlier:
            kept.append((section, old, new))
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
    prepared: Prepared,
    *,
    batch_size: int,
    lost: Mapping[str, int],
    batches_per_epoch: BatchesPerEpoch | None = None,
    callbacks: Sequence[pl.Callback] = (),
    last: Sequence[pl.Callback] = (),
) -> None:
    """Train ``system`` for ``run.max_steps`` steps or ``run.max_minutes`` minutes.

    Ctrl-C and SIGTERM end the run after the step in hand, with a checkpoint and an export, and
    without what can wait: pictures, a look at held-out ones, a batch that does not come. A run that
    has made all its steps leaves a file ``done``. ``batch_size`` is that of each rank,
    ``lost`` what the set holds that no step will see, ``batches_per_epoch`` how long its epochs
    are, if they have an end; ``callbacks`` act before those that all runs
    have, ``last`` after them.

    Raises:
        UserError: A broken checkpoint, a device that is not there, a loss that is not finite.
        KeyboardInterrupt: Ctrl-C. After SIGTERM or SIGUSR1, a system's notice that it takes the
            machine back, ``fit`` returns: all is saved, and the same command goes on.
    """
    out, newest = prepared.out, prepared.newest
    require_low_bit(optim)
    optimizers = getattr(system, "num_optimizers", 1)
    start_step = 0
    if newest is not None:
        start_step = checkpoint_global_step(newest) // optimizers
        _log.info("resuming %s at step %d of %d", out, start_step, run.max_steps)
    if start_step < run.max_steps:
        (out / DONE_FILE).unlink(missing_ok=True)
    errors, ranks = RankErrors(), HostGroup()
    stop = Stop(run.max_minutes, errors, ranks)
    ledger = Ledger(prepared.clock, out, run.log_every_steps, lost, errors, ranks)
    last = [NoteStart(out, prepared.config, errors), *last]
    trainer = _trainer(system, run, optim, stop, ledger, callbacks, last)
    first = go_on(
        out,
        start_step,
        accumulate=run.accumulate,
        world=trainer.world_size,
        batch_size=batch_size,
        batches_per_epoch=batches_per_epoch,
        writes=trainer.is_global_zero,
    )
    try:
        with stop.listening():
            try:
                trainer.fit(
                    system,
                    train_dataloaders=loader_from(first, trainer.global_rank, trainer.world_size),
                    ckpt_path=newest,
                    weights_only=True,
                )
            except NoBatchWhileEnding:
                _log.info("%s: no batch came; what was learned before is saved", out)
            trainer.save_checkpoint(checkpoint_path(out, trainer.global_step))
            ledger.write_row(trainer)
    except OSError as error:  # of a log: Python does not say which file is written to
        described = describe_os_error(error) if error.filename is None else None
        if described is None:
            raise
        raise UserError(f"{out}: {described}") from error
    except StopAtOnce:
        launcher = trainer.strategy.launcher
        if launcher is not None:  # the processes that this one has started, as Lightning does it
            launcher.kill(signal.SIGKILL)
        raise KeyboardInterrupt from None
    if errors.message is not None:  # of the last writes
        errors.raise_for_all()
    left_out = lost_line(ledger.lost())
    _log.info(
        "%s: %d of %d steps, %d samples, %.0f s%s",
        out,
        steps_done(system, trainer),
        run.max_steps,
        ledger.samples,
        ledger.total_seconds(),
        f"; left out: {left_out}" if left_out else "",
    )
    if stop.interrupted_by in ("SIGTERM", "SIGUSR1"):
        _log.info(
            "stopped by %s: all is saved, the same command with --resume goes on",
            stop.interrupted_by,
        )
    elif stop.interrupted_by is not None:
        raise KeyboardInterrupt(stop.interrupted_by)
    elif trainer.is_global_zero and steps_done(system, trainer) >= run.max_steps:
        atomic_write_text(out / DONE_FILE, f"{steps_done(system, trainer)} steps\n")


def _in_software(run: RunConfig) -> bool:
    """Return whether a run is on CPUs that have no instructions for bfloat16."""
    on_cpu = run.accelerator == "cpu" or (
        run.accelerator == "auto" and pick_device("auto").type == "cpu"
    )
    return on_cpu and not computes_bfloat16(torch.device("cpu"))


def _on_cuda(run: RunConfig) -> bool:
    return run.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def _strategy(
    system: pl.LightningModule, run: RunConfig, optim: OptimConfig
) -> DDPStrategy | ShardedStrategy | str:
    """Return how gradients meet: nothing to do on one device, else averaged over all."""
    if run.devices * run.num_nodes == 1:
        if run.strategy == "fsdp":
            _log.info("run.strategy is fsdp: one device has nothing to share; it holds all")
        return "auto"
    if run.strategy == "fsdp":
        check_can_shard(system, run, optim)
        return ShardedStrategy(run.devices * run.num_nodes)
    # A system that steps two optimizers by hand leaves out one's parameters in turn.
    partly = not system.automatic_optimization
    return DDPStrategy(find_unused_parameters=partly, gradient_as_bucket_view=True)


def _trainer(
    system: pl.LightningModule,
    run: RunConfig,
    optim: OptimConfig,
    stop: Stop,
    ledger: Ledger,
    first: Sequence[pl.Callback],
    last: Sequence[pl.Callback],
) -> pl.Trainer:
    """Build the Trainer with the callbacks of all runs, in the order in which they must act."""
    out = Path(run.out)
    optimizers = getattr(system, "num_optimizers", 1)
    average = WeightAverage(run.ema_decay, offload=run.ema_offload)
    finite = SkipNonFinite(out, run.max_skipped_steps)
    every = run.checkpoint_every_steps * optimizers  # Lightning counts each optimizer's steps
    export = Export(
        out,
        every,
        getattr(torch, run.export_dtype),
        average,
        ledger,
        stop.errors,
        run.export_at_steps,
    )
    manual = not system.automatic_optimization
    if manual and run.accumulate > 1:
        raise UserError(
            f"run.accumulate is {run.accumulate}: this network's two optimizers step at every "
            "batch; raise data.batch_size instead"
        )
    if manual and run.precision == "16-mixed":
        raise UserError(
            "run.precision is 16-mixed: this network's two optimizers can't share a loss scale; "
            "use bf16-mixed or 32-true"
        )
    place = cluster_environment()
    terminal = sys.stderr.isatty()
    arguments: dict[str, Any] = dict(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=_strategy(system, run, optim),
        accumulate_grad_batches=run.accumulate,
        # Only there for GPUs.
        sync_batchnorm=run.devices * run.num_nodes > 1 and _on_cuda(run),
        precision=run.precision,
        max_steps=run.max_steps * optimizers,
        max_epochs=-1,
        gradient_clip_val=None if manual or optim.grad_clip == 0 else optim.grad_clip,
        logger=make_loggers(out, run),
        log_every_n_steps=run.log_every_steps,
        plugins=[
            RunCheckpoints(run.keep_checkpoints, ledger.clock, stop.errors),
            *([] if place is None else [place]),
        ],
        callbacks=[
            *first,
            WholeSteps(),
            SeedLayers(run.seed),
            average,
            ledger,
            finite,
            Progress(run.log_every_steps, run.max_steps, stop, ledger, finite, show=not terminal),
            stop,
            Stall(on_wait=stop.ask_again),
            export,
            Rehearsal(out, export),
            *last,
            ModelCheckpoint(
                out / CHECKPOINTS,
                filename="{step}",
                every_n_train_steps=every,
                save_top_k=-1,  # RunCheckpoints keeps the newest
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            ),
        ],
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )
    try:
        return pl.Trainer(**{**arguments, **run.trainer})
    except (
        MisconfigurationException,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
    ) as error:
        passed = f", run.trainer {run.trainer}" if run.trainer else ""
        raise UserError(
            f"run.accelerator {run.accelerator}, {run.devices} device(s){passed}: {error}"
        ) from error
