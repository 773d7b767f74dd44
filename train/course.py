"""Where in its data a run is: steps become batches, whatever devices and windows it had before.

A step takes ``accumulate`` batches of each of ``world`` ranks. A run that goes on with others must
not begin where as many steps of the new kind would have brought it: it would leave out, or see
again, what lies between.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cascade.checkpoints.files import atomic_write_text
from cascade.errors import UserError

_log = logging.getLogger(__name__)

COURSE_FILE = "course.json"
BatchesPerEpoch = Callable[[int, int], int]
"""Of a batch size and ranks: the batches that each of them takes an epoch."""


@dataclass(frozen=True)
class Leg:
    """A part of a run in which all steps take alike."""

    from_step: int
    from_batch: int
    """Batches that each rank would have taken by then, had all steps been as these are."""
    accumulate: int
    world: int
    batch_size: int

    @property
    def samples_per_step(self) -> int:
        """Of all ranks."""
        return self.accumulate * self.world * self.batch_size

    def batch_at(self, step: int) -> int:
        """Return the batches that each rank has taken by a step."""
        return self.from_batch + (step - self.from_step) * self.accumulate


def batch_to_go_on_with(
    legs: Sequence[Leg],
    step: int,
    *,
    accumulate: int,
    world: int,
    batch_size: int,
    batches_per_epoch: BatchesPerEpoch | None = None,
) -> tuple[int, tuple[Leg, ...]]:
    """Return the batch that comes first, and the legs with the one that it begins.

    Args:
        legs: Of the run so far; none: it has always taken as it does now.
        step: Steps done.
        accumulate: Batches a step from here on.
        world: Ranks from here on.
        batch_size: Samples of a rank's batch from here on.
        batches_per_epoch: Where an epoch ends with a smaller batch: the next one begins with it.
    """
    # A checkpoint from before a change, where those after it are damaged, undoes the change.
    walked = [leg for leg in legs if leg.from_step <= step]
    now = (accumulate, world, batch_size)
    if not walked:
        walked = [Leg(0, 0, *now)]
    last = walked[-1]
    if (last.accumulate, last.world, last.batch_size) == now:
        return last.batch_at(step), tuple(walked)
    batch, epoch, first = last.batch_at(step), 0, 0
    if batches_per_epoch is not None:
        epoch, batch = divmod(batch, batches_per_epoch(last.batch_size, last.world))
        first = epoch * batches_per_epoch(batch_size, world)
    samples = batch * last.world * last.batch_size
    new = Leg(step, first + samples // (world * batch_size), *now)
    return new.from_batch, (*walked, new)


def go_on(
    out: Path,
    step: int,
    *,
    accumulate: int,
    world: int,
    batch_size: int,
    writes: bool,
    batches_per_epoch: BatchesPerEpoch | None = None,
) -> int:
    """Return the batch that comes first in each rank, and note with what steps the run goes on.

    Args:
        out: Folder of the run.
        step: Steps done.
        accumulate: Batches a step.
        world: Ranks.
        batch_size: Samples of a rank's batch.
        writes: Whether this is the rank that writes.
        batches_per_epoch: See ``batch_to_go_on_with``.

    Raises:
        UserError: What is noted there can't be read.
    """
    path = out / COURSE_FILE
    earlier: list[Leg] = []
    if step and path.is_file():
        try:
            earlier = [Leg(**leg) for leg in json.loads(path.read_text(encoding="utf-8"))]
            if not all(isinstance(value, int) for leg in earlier for value in vars(leg).values()):
                raise ValueError("its numbers are none")
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: can't be read ({error}); it tells how far the run is in its data: remove "
                "it if devices, run.accumulate and data.batch_size are as they have always been"
            ) from error
    batch, legs = batch_to_go_on_with(
        earlier,
        step,
        accumulate=accumulate,
        world=world,
        batch_size=batch_size,
        batches_per_epoch=batches_per_epoch,
    )
    if writes:
        if len(legs) > 1 and legs[-1].from_step == step:
            _log.warning(
                "%s: a step takes %d samples from here on, and took %d; the run goes on where it "
                "was in its data",
                out,
                legs[-1].samples_per_step,
                legs[-2].samples_per_step,
            )
        atomic_write_text(path, json.dumps([asdict(leg) for leg in legs], indent=2) + "\n")
    return batch
