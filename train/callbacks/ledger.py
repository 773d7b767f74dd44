"""What a run has cost: samples, seconds by phase, FLOPs, energy, memory; kept over resumes."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch._dynamo.callback import CallbackArgs, callback_handler

from cascade.compiled import is_compiled
from cascade.evaluate.energy import EnergyMeter
from cascade.evaluate.flops import FlopCounter
from cascade.evaluate.training_cost import LEDGER_FILE
from train.clock import Phase, PhaseClock
from train.data.cached import CachedBatch
from train.data.select import LOST_KINDS
from train.memory import peak_memory_bytes
from train.meta_step import count_beside
from train.rank_errors import RankErrors
from train.reduction import HostGroup
from train.steps import ends_step, steps_done

_log = logging.getLogger(__name__)


class Ledger(Callback):
    """Counts what is seen and spent; writes a row at every interval and at the end.

    A row of ``ledger.jsonl`` holds ``step`` and ``samples``, which are the run's progress, and what
    was spent after ``from_step``: ``seconds`` by phase (their sum is the wall time),
    ``device_seconds``, ``flops`` of all devices (counted by torch at the first step of each kind,
    which is its shapes and what else the system's ``step_kind`` tells apart; under torch.compile on
    a copy without content, and null there if the weights are cut over devices or a teacher is
    asked), ``teacher_flops``, those of a teacher among them (a system that asks one of
    another number of samples in each step says itself how many, as ``teacher_flops``),
    ``energy_j`` of this machine's GPUs (null where none tells) and
    ``peak_memory_mib`` of the first device, or of the process on a CPU. Steps that a killed run
    makes again are spent again: the sum of all rows is the whole cost. A run on several sets
    (``data.mix``) has ``samples_by_set`` beside ``samples``. ``left_out`` counts the samples that
    were not trained on, by ``train.data.select.LOST_KINDS``: those of a set that was looked through
    before the run, and, over all ranks and starts, those that were come upon by its steps. A sample
    that fails whenever its turn comes, and a shard's that is drawn again, counts each time.
    """

    def __init__(
        self,
        clock: PhaseClock | None = None,
        out: Path | None = None,
        every_steps: int = 50,
        lost: Mapping[str, int] | None = None,
        errors: RankErrors | None = None,
        ranks: HostGroup | None = None,
    ) -> None:
        """Take the run's clock, its folder (None: no file is written) and the interval.

        ``lost`` is what the set holds that no step will see, by ``LOST_KINDS``; ``errors`` is
        where ranks keep their errors, ``ranks`` who they are.
        """
        self.ranks = HostGroup() if ranks is None else ranks
        self.errors = RankErrors() if errors is None else errors
        self.samples = 0
        self.samples_by_set: Counter[str] = Counter()
        """Of a run on several sets."""
        self._lost_before = Counter(dict(lost or {}))
        """Of the set, before the first step."""
        self._lost: Counter[str] = Counter()
        """Of all ranks' steps."""
        self._lost_here: Counter[str] = Counter()
        """Of this rank's, not yet among those of all."""
        self.seconds = 0.0
        """Of earlier starts of the run."""
        self.flops = self.teacher_flops = 0.0
        """Of this start, all devices; the second are among the first."""
        self.clock = PhaseClock() if clock is None else clock
        self._path = None if out is None else out / LEDGER_FILE
        self._every_steps = every_steps
        self._energy = EnergyMeter()
        self._counter: FlopCounter | None = None
        self._flops_by_kind: dict[object, tuple[float, float]] = {}
        """Of a step: what is learned, and the teacher's."""
        self._uncounted: set[object] = set()
        """Kinds of steps of which it can't be told."""
        self._teacher_flops_before = 0.0
        self._kind: object = None
        self._step = 0
        self._from_step = 0
        self._world = 1
        self._device = torch.device("cpu")
        self._setup_s = 0.0
        self._before_compiling: Phase | None = None
        self._looking_before_s = 0.0
        self._written: dict[str, Any] = {"seconds": {}, "flops": 0.0, "teacher_flops": 0.0}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the first batch."""
        self.clock.switch("data")
        self._step = self._from_step = steps_done(pl_module, trainer)
        self._setup_s = self.clock.seconds()["setup"]
        self._world, self._device = trainer.world_size, pl_module.device
        self.ranks.open(self._device)
        self._energy = EnergyMeter(trainer.device_ids if self._device.type == "cuda" else ())
        if is_compiled(pl_module):
            callback_handler.register_start_callback(self._begin_compiling)
            callback_handler.register_end_callback(self._end_compiling)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step; the first one of its shape is counted."""
        self.clock.switch("step")
        self._kind = (getattr(pl_module, "step_kind", None), _shape_of(batch))
        if self._kind in self._flops_by_kind or self._kind in self._uncounted:
            return
        if is_compiled(pl_module):
            with self.clock.within("compile"):
                self._count_compiled(pl_module, batch, trainer.global_step)
        else:
            self._counter = FlopCounter(where=lambda: self.clock.phase)
            self._counter.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        # What the step was, not what the next one would be: a system may have gone on.
        self._stop_counting(self._kind)
        learning, of_teacher = self._flops_by_kind.get(self._kind, (0.0, 0.0))
        told = getattr(pl_module, "teacher_flops", None)
        if told is not None and self._flops_by_kind:
            of_teacher, self._teacher_flops_before = told - self._teacher_flops_before, told
        self.flops += (learning + of_teacher) * trainer.world_size
        self.teacher_flops += of_teacher * trainer.world_size
        self.samples += len(batch) * trainer.world_size
        self.samples_by_set.update(getattr(batch, "drawn", None) or {})
        self._lost_here.update(getattr(batch, "lost", None) or {})
        if ends_step(trainer, batch_idx):
            self._share_losses()
        self.clock.switch("data")
        self._step = steps_done(pl_module, trainer)
        if ends_step(trainer, batch_idx) and self._step % self._every_steps == 0:
            pl_module.log("samples", float(self.samples))
            for name, count in self.samples_by_set.items():
                pl_module.log(f"samples/{name}", float(count))
            self.write_row(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the end."""
        self._forget_compiling()
        self.clock.switch("end")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what was spent."""
        self._stop_counting(None)
        self._forget_compiling()
        self.write_row(trainer)

    def write_row(self, trainer: Trainer) -> None:
        """Append what was spent since the last row; only on the first rank."""
        if self._path is None or not trainer.is_global_zero:
            return
        before = self._written
        self._written = {
            "seconds": dict(self.clock.seconds()),
            "flops": self.flops,
            "teacher_flops": self.teacher_flops,
        }
        seconds = {
            phase: round(total - before["seconds"].get(phase, 0.0), 4)
            for phase, total in self._written["seconds"].items()
        }
        uncounted = not self._flops_by_kind or bool(self._uncounted)
        row: dict[str, Any] = {
            "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "from_step": self._from_step,
            "step": self._step,
            "samples": self.samples,
            "seconds": seconds,
            "device_seconds": round(sum(seconds.values()) * self._world, 4),
            "flops": None if uncounted else self.flops - before["flops"],
            "teacher_flops": None if uncounted else self.teacher_flops - before["teacher_flops"],
            "energy_j": self._energy.spent_j(),
            "peak_memory_mib": round(self.peak_memory_bytes() / 2**20),
        }
        row["left_out"] = self.lost()
        if self.samples_by_set:
            row["samples_by_set"] = dict(self.samples_by_set)
        with self.errors.kept(), open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._from_step = self._step

    def lost(self) -> dict[str, int]:
        """Return the samples that were not trained on so far, by ``LOST_KINDS``."""
        return {kind: self._lost_before[kind] + self._lost[kind] for kind in LOST_KINDS}

    def total_seconds(self) -> float:
        """Return the seconds of training, of this and of all earlier starts, set-up not counted."""
        seconds = sum(self.clock.seconds().values())
        return self.seconds + (seconds - self._setup_s if self._setup_s else 0.0)

    def training_seconds(self) -> float:
        """Return the seconds so far less those of looking: pictures and validation."""
        looking = sum(self.clock.seconds()[phase] for phase in ("pictures", "validation"))
        return self.total_seconds() - looking - self._looking_before_s

    def peak_memory_bytes(self) -> int:
        """Return the most memory so far of the device; on a CPU of the process, 0 if unknown."""
        return peak_memory_bytes(self._device)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts for the resumable checkpoint."""
        return {
            "samples": self.samples,
            "samples_by_set": dict(self.samples_by_set),
            "lost": dict(self._lost),
            "seconds": self.total_seconds(),
            "training_seconds": self.training_seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the counts back."""
        self.samples = state_dict["samples"]
        self.samples_by_set = Counter(state_dict.get("samples_by_set", {}))
        self._lost = Counter(state_dict.get("lost", {}))
        self.seconds = state_dict["seconds"]
        self._looking_before_s = self.seconds - state_dict.get("training_seconds", self.seconds)

    def _share_losses(self) -> None:
        """Add what ranks have left out; every step, so that a checkpoint has the sum of all."""
        sums = self.ranks.summed([self._lost_here[kind] for kind in LOST_KINDS])
        self._lost.update(dict(zip(LOST_KINDS, sums, strict=True)))
        self._lost_here.clear()

    def _begin_compiling(self, event: CallbackArgs) -> None:
        self._before_compiling = self.clock.phase
        self.clock.switch("compile")

    def _end_compiling(self, event: CallbackArgs) -> None:
        if self._before_compiling is not None:
            self.clock.switch(self._before_compiling)
        self._before_compiling = None

    def _forget_compiling(self) -> None:
        """Take the callbacks back: the list that they are in belongs to the process."""
        if self._begin_compiling in callback_handler.start_callbacks:
            callback_handler.remove_start_callback(self._begin_compiling)
            callback_handler.remove_end_callback(self._end_compiling)

    def _count_compiled(self, system: LightningModule, batch: Any, step: int) -> None:
        """Count a step whose operations torch does not see."""
        counted = None
        if isinstance(batch, CachedBatch):
            try:
                counted = count_beside(system, batch, step)
            except (NotImplementedError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                _log.warning("no FLOPs and no MFU: a compiled step can't be counted: %s", reason)
        if counted is None:
            self._uncounted.add(self._kind)
        else:
            self._flops_by_kind[self._kind] = counted, 0.0

    def _stop_counting(self, kind: object) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            of_teacher = self._counter.by_place.get("teacher", 0.0)
            self._flops_by_kind[kind] = self._counter.total - of_teacher, of_teacher
            self._counter = None


def _shape_of(batch: Any) -> object:
    """Return what decides how much a step computes: the shapes of a batch's tensors."""
    if not dataclasses.is_dataclass(batch):
        return None
    values = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    return tuple(tuple(one.shape) for one in values if isinstance(one, Tensor))
