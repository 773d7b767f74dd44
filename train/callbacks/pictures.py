"""Pictures of fixed prompts while a stage learns, from its raw and from its averaged weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import nn

from cascade.errors import UserError
from cascade.images import image_grid, open_image, save_png
from cascade.pipelines.cascade import CascadePipeline
from train.callbacks.ema import WeightAverage
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.clock import PhaseClock
from train.losses.denoising import DiffusionConfig
from train.networks import plain_copy
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

    The prompts are spread over the ranks. Drawing changes nothing of the training: the pictures'
    noise has generators of its own, and what draws is a copy that shares the weights.
    """

    def __init__(
        self,
        config: PicturesConfig,
        out: Path,
        stage: Literal["stage_b", "stage_c"],
        diffusion: DiffusionConfig,
    ) -> None:
        """Take what to draw, the run's folder, which stage of the model it trains, and how."""
        self.diffusion = diffusion
        self.config = config
        self.folder = out / PICTURES_FOLDER
        self.stage = stage
        self._average: WeightAverage | None = None
        self._clock = PhaseClock()
        self._pipeline: CascadePipeline | None = None
        self._drawn_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the other stages now: a folder that is not there must not end a run in its middle.

        Raises:
            UserError: The model is not there, or its other stages do not fit the one that learns.
        """
        self._average = find_callback(trainer, WeightAverage)
        if (ledger := find_callback(trainer, Ledger)) is not None:
            self._clock = ledger.clock
        with self._clock.within("pictures"):
            device = str(pl_module.device)
            self._pipeline = CascadePipeline.from_folder(self.config.model, device=device)
            spec = self._pipeline.spec
            sampling = self.diffusion.sampled(getattr(spec, self.stage))
            # The model's own stage may have been trained otherwise than the one that learns.
            if self.stage == "stage_b":
                self._pipeline.spec = replace(spec, stage_b=sampling)
            else:
                self._pipeline.spec = replace(spec, stage_c=sampling)
            lent = getattr(self._pipeline, self.stage).config
            learning = getattr(pl_module.network, "config", None)
            for name in ("latent_channels", "text_pooled_channels"):
                one, other = getattr(lent, name, None), getattr(learning, name, None)
                if one != other:
                    raise UserError(
                        f"pictures.model {self.config.model}: its {self.stage} has {name} {one}, "
                        f"the one that learns {other}: its other stages do not fit"
                    )
            self.folder.mkdir(parents=True, exist_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw every so many steps."""
        if ends_step(trainer, batch_idx) and trainer.global_step % self.config.every_steps == 0:
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the run ended with."""
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
        pipeline, network, prompts = self._pipeline, system.network, self.config.prompts
        assert pipeline is not None, "on_train_start comes first"
        assert isinstance(network, nn.Module), "a system's network is a module"
        assert self._average is not None, "every run averages its weights"
        # Under FSDP each rank draws with the whole network: it needs not keep step with the others.
        state = self._average.whole(self.stage) if kind == "ema" else gathered(network.state_dict())
        state = {key: value.to(system.device) for key, value in state.items()}
        drawing = plain_copy(network, state).eval()
        lent = getattr(pipeline, self.stage)
        setattr(pipeline, self.stage, drawing)
        try:
            for number in range(trainer.global_rank, len(prompts), trainer.world_size):
                picture = self._picture(pipeline, number)
                save_png(picture, self._part(kind, step, number))
        finally:
            setattr(pipeline, self.stage, lent)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(kind, step, number) for number in range(len(prompts))]
            pictures: list[Image.Image] = [open_image(part) for part in parts]
            save_png(image_grid(pictures), self.folder / f"step_{step:07d}_{kind}.png")
            for part in parts:
                part.unlink()
            _log.info("drew %s", self.folder / f"step_{step:07d}_{kind}.png")

    def _picture(self, pipeline: CascadePipeline, number: int) -> Image.Image:
        """Draw a prompt. What goes wrong is told and shown as grey: it must not end the run."""
        prompt, seed = self.config.prompts[number], self.config.seed + number
        try:
            return pipeline(prompt, seed=seed, progress=False).pictures[0]
        except Exception as error:  # early weights give black pictures, memory can be short
            _log.warning("no picture of %r: %s", prompt, error)
            size = pipeline.spec.image_size
            return Image.new("RGB", (size, size), "gray")

    def _part(self, kind: Weights, step: int, number: int) -> Path:
        return self.folder / f".step_{step:07d}_{kind}_{number:04d}.png"
