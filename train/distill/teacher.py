"""The teacher of a distillation: loaded where the run trains, frozen, in its own number format.

It is no part of the system: nothing wraps it, no checkpoint and no optimizer holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from cascade.checkpoints.files import check_finite_weights
from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.load import build
from cascade.checkpoints.part_files import find_network
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet, UNetCondition, UNetOutput
from train.clock import PhaseClock

TeacherDtype = Literal["float32", "bfloat16", "float16"]


class FrozenTeacher:
    """A frozen U-Net in evaluation mode."""

    def __init__(self, name: str, dtype: TeacherDtype) -> None:
        """Find the weights; only headers are read.

        Args:
            name: As ``find_network`` takes it.
            dtype: Number format in which it is kept and runs.

        Raises:
            UserError: They are not there, or are another network's.
        """
        self.name = name
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._found: FoundNetwork = find_network(name, "unet")
        self.clock = PhaseClock()
        """The run's."""
        self._network: UNet | None = None

    @property
    def config(self) -> UNetConfig:
        """Its sizes."""
        return cast(UNetConfig, self._found.published.config)

    @property
    def path(self) -> Path:
        """Its file, or the index of its shards."""
        return self._found.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """What its file says beside its sizes."""
        return self._found.opened.metadata

    def unload(self) -> None:
        """Let go of the weights."""
        self._network = None

    def load(self, device: torch.device) -> None:
        """Load the weights onto a device.

        Raises:
            UserError: They are not finite in its number format.
        """
        network = build(self._found.opened, self._found.published, device=device, dtype=self.dtype)
        check_finite_weights(network, f"distill.teacher {self.name}, as {self.dtype}")
        self._network = cast(UNet, network.eval().requires_grad_(False))

    # Not inference_mode, whose tensors no loss could be made of.
    @torch.no_grad()
    def __call__(
        self, x_t: Tensor, timesteps: Tensor, cond: UNetCondition, features: Sequence[str] = ()
    ) -> UNetOutput:
        """Return what the teacher says, under no autocast.

        Args:
            x_t: Noised latents, ``(B, 4, h, w)``.
            timesteps: ``(B,)``.
            cond: What it is told.
            features: Places whose outputs are wanted as well.
        """
        assert self._network is not None, "load() comes first"
        with (
            self.clock.within("teacher", x_t.device),
            torch.autocast(x_t.device.type, enabled=False),
        ):
            return self._network(x_t.to(self.dtype), timesteps, cond, features)
