"""Keeps what an average of any length can be made of when the run is over.

Two averages of a power-function profile are stored every so many steps;
``python -m train.posthoc_ema`` makes any other length of them.

Reference: Karras et al., 2023, arXiv:2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from cascade.checkpoints.files import save_network
from train.callbacks.ema import cut_as, exported_networks
from train.callbacks.export import own_metadata
from train.callbacks.find import find_callback
from train.callbacks.ledger import Ledger
from train.clock import PhaseClock
from train.networks import plain_copy
from train.sharding import gathered, local_part, part_like
from train.steps import ends_step, steps_done

FOLDER = "ema"
LENGTH_KEY, STEP_KEY = "ema_length", "train_steps"


@dataclass(frozen=True)
class PosthocEmaConfig:
    """Which averages are stored, and how often."""

    every_steps: int = 1000
    """Steps between snapshots; a file of the network's size for each length and snapshot."""
    lengths: tuple[float, ...] = (0.05, 0.1)
    """Relative standard deviations of the stored profiles (0.05 and 0.1 in the paper)."""
    dtype: Literal["float32", "float16"] = "float16"
    """Number format of the snapshots (float16 in the paper)."""

    def __post_init__(self) -> None:
        """Refuse lengths that no power function has."""
        if self.every_steps < 1:
            raise ValueError(f"every_steps is {self.every_steps}; at least 1 is needed")
        if len(set(self.lengths)) < 2:
            raise ValueError(f"lengths is {self.lengths}; two different ones are needed")
        for length in self.lengths:
            exponent(length)


def exponent(length: float) -> float:
    """Return gamma of the profile ``t^gamma`` whose standard deviation is ``length`` of the run.

    Raises:
        ValueError: No profile is so long or so short.
    """
    if not 0.001 <= length <= 0.28:
        raise ValueError(f"length is {length}; power-function averages lie in [0.001, 0.28]")
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class PosthocEma(Callback):
    """Writes ``OUT/ema/NAME_LENGTH_STEP.safetensors``: each is an export like any other."""

    def __init__(self, config: PosthocEmaConfig, out: Path) -> None:
        """Take what to keep, and the run's folder."""
        self.config = config
        self.folder = out / FOLDER
        self._exponents = {length: exponent(length) for length in config.lengths}
        self.averages: dict[str, dict[str, Tensor]] = {}
        """By ``NAME_LENGTH``, float32; under FSDP this rank's parts."""
        self._networks: dict[str, nn.Module] = {}
        self._last_step = -1
        self._clock = PhaseClock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the averages of a resumed run to its device."""
        if (ledger := find_callback(trainer, Ledger)) is not None:
            self._clock = ledger.clock
        self._last_step = steps_done(pl_module, trainer)
        self._networks = exported_networks(pl_module)
        for named, average in self.averages.items():
            for key, value in self._network_of(named).state_dict().items():
                average[key] = local_part(part_like(average[key], value)).to(pl_module.device)

    def _network_of(self, named: str) -> nn.Module:
        """Return the network of an average ``NAME_LENGTH``."""
        return self._networks[named.rpartition("_")[0]]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights once a step; store every so many."""
        step = steps_done(pl_module, trainer)
        if step == self._last_step:
            return
        self._last_step = step
        for name, network in exported_networks(pl_module).items():
            state = {key: local_part(value) for key, value in network.state_dict().items()}
            for length in self.config.lengths:
                # At step 1 the share is 1: the average starts as the weights themselves.
                share = 1.0 - (1.0 - 1.0 / step) ** (self._exponents[length] + 1.0)
                average = self.averages.setdefault(
                    f"{name}_{length:g}", {key: value.clone() for key, value in state.items()}
                )
                for key, value in state.items():
                    if value.is_floating_point():
                        average[key].lerp_(value, share)
                    else:
                        average[key].copy_(value)
        if ends_step(trainer, batch_idx) and step % self.config.every_steps == 0:
            self._store(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store what the run ended with."""
        self._store(trainer, pl_module, steps_done(pl_module, trainer))

    def _store(self, trainer: Trainer, system: LightningModule, step: int) -> None:
        if not self.averages:
            return
        with self._clock.within("checkpoint"):
            averages = self._whole()
            if not trainer.is_global_zero:
                return
            self.folder.mkdir(exist_ok=True)
            for name, network in exported_networks(system).items():
                more = own_metadata(system, name)
                for length in self.config.lengths:
                    averaged = plain_copy(network, averages[f"{name}_{length:g}"])
                    save_network(
                        self.folder / f"{name}_{length:g}_{step:08d}.safetensors",
                        averaged,
                        dtype=getattr(torch, self.config.dtype),
                        metadata={LENGTH_KEY: f"{length:g}", STEP_KEY: str(step), **more},
                    )

    def _whole(self) -> dict[str, dict[str, Tensor]]:
        """Return whole averages; under FSDP all ranks must take part."""
        if not self._networks:  # no step was left to make: as the checkpoint brought them
            return self.averages
        return {
            named: gathered(cut_as(self._network_of(named), average))
            for named, average in self.averages.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the averages for the resumable checkpoint."""
        return {"averages": self._whole()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the averages back."""
        self.averages = state_dict["averages"]
