"""Pictures of fixed prompts while a stage learns, from its raw and from its averaged weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import nn

from cascade.images import image_grid, open_image, save_png
from train.callbacks.drawing import Drawing
from train.callbacks.ema import WeightAverage
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.callbacks.stop import all_are_to_end, was_told_to_end
from train.clock import PhaseClock
from train.loggers import show_picture
from train.networks import plain_copy
from train.rank_errors import RankErrors
from train.sharding import gathered
from train.steps import ends_step

_log = logging.getLogger(__name__)

Weights = Literal["raw", "ema"]
PICTURES_FOLDER = "pictures"


@dataclass(frozen=True)
class PicturesConfig:
    """What is drawn while a stage learns."""

    model: str
    """Model folder that lends the other stages, the text encoder and the sampling settings."""
    prompts: tuple[str, ...]
    """The same ones each time; prompt k has seed ``seed + k``, so that pictures can be compared."""
    every_steps: int = 1000
    """Steps between drawings; the end of the run draws as well."""
    seed: int = 0
    """Seed of the first prompt."""

    def __post_init__(self) -> None:
        """Refuse what draws nothing."""
        if not self.prompts or self.every_steps < 1:
            raise ValueError(
                f"prompts has {len(self.prompts)} entries and every_steps is {self.every_steps}; "
                "at least 1 of each is needed"
            )


class SamplePictures(Callback):
    """Writes ``OUT/pictures/step_N_raw.png`` and ``step_N_ema.png``, a grid of all prompts each.

    TensorBoard and Weights & Biases show them too.

    The prompts are spread over the ranks. Drawing changes nothing of the training: the pictures'
    noise has generators of its own, and what draws is a copy that shares the weights.
    """

    def __init__(self, config: PicturesConfig, out: Path, drawing: Drawing) -> None:
        """Take what to draw, the run's folder, and what draws with the network that learns."""
        self.config = config
        self.folder = out / PICTURES_FOLDER
        self.drawing = drawing
        self._average: WeightAverage | None = None
        self._clock = PhaseClock()
        self._errors = RankErrors()
        self._drawn_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the other parts now: a folder that is not there must not end a run in its middle.

        Raises:
            UserError: The model is not there, or its other parts do not fit the one that learns.
        """
        self._average = find_callback(trainer, WeightAverage)
        if (ledger := find_callback(trainer, Ledger)) is not None:
            self._clock, self._errors = ledger.clock, ledger.errors
        with self._clock.within("pictures"):
            self.drawing.load(_network(pl_module), pl_module.device)
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every so many steps."""
        due = ends_step(trainer, batch_idx) and trainer.global_step % self.config.every_steps == 0
        if due and not all_are_to_end(trainer):
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the run ended with; not if it was told to end: who told it may not wait."""
        if not all_are_to_end(trainer):
            self.draw(trainer, pl_module)

    def draw(self, trainer: Trainer, system: LightningModule) -> None:
        """Draw this rank's prompts with both weights; the first rank lays all out in grids."""
        step = trainer.global_step
        if step == self._drawn_step:
            return
        self._drawn_step = step
        with self._clock.within("pictures"):
            kinds: tuple[Weights, ...] = ("raw", "ema")
            for kind in kinds:
                self._draw(kind, step, trainer, system)

    def _draw(self, kind: Weights, step: int, trainer: Trainer, system: LightningModule) -> None:
        network, prompts = _network(system), self.config.prompts
        assert self._average is not None, "every run averages its weights"
        # Under FSDP each rank draws with the whole network: it needs not keep step with the others.
        if kind == "ema":
            own = getattr(system, "averaged_state", None)
            whole = self._average.whole
            state = whole(self.drawing.network_name) if own is None else own(self._average)
        else:
            state = gathered(network.state_dict())
        state = {key: value.to(system.device) for key, value in state.items()}
        drawing = plain_copy(network, state).eval()
        for number in range(trainer.global_rank, len(prompts), trainer.world_size):
            if was_told_to_end(trainer):
                break  # the ranks meet below all the same
            with self._errors.kept():
                save_png(self._picture(drawing, number), self._part(kind, step, number))
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(kind, step, number) for number in range(len(prompts))]
        with self._errors.kept():
            if all(part.is_file() for part in parts):
                pictures: list[Image.Image] = [open_image(part) for part in parts]
                grid, path = image_grid(pictures), self.folder / f"step_{step:07d}_{kind}.png"
                save_png(grid, path)
                show_picture(trainer.loggers, f"pictures/{kind}", grid, step)
                _log.info("drew %s", path)
            for part in parts:
                part.unlink(missing_ok=True)

    def _picture(self, network: nn.Module, number: int) -> Image.Image:
        """Draw a prompt. What goes wrong is told and shown as grey: it must not end the run."""
        prompt, seed = self.config.prompts[number], self.config.seed + number
        try:
            return self.drawing.draw(network, prompt, seed)
        except Exception as error:  # early weights give black pictures, memory can be short
            _log.warning("no picture of %r: %s", prompt, error)
            size = self.drawing.image_size
            return Image.new("RGB", (size, size), "gray")

    def _part(self, kind: Weights, step: int, number: int) -> Path:
        return self.folder / f".step_{step:07d}_{kind}_{number:04d}.png"


def _network(system: LightningModule) -> nn.Module:
    network = system.network
    assert isinstance(network, nn.Module), "a system's network is a module"
    return network
