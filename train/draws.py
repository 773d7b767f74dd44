"""Where a training step's random draws come from: functions of (seed, step, rank), nothing else.

A resumed run therefore draws what it would have drawn, and no two purposes share their numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

Purpose = Literal[
    "order", "captions", "noise", "layers", "rests", "crops", "blocks", "buckets", "spares"
]


def derived_seed(purpose: Purpose, seed: int, step: int, rank: int = 0) -> int:
    """Return a 63-bit seed that is unrelated for every other purpose, seed, step or rank."""
    text = f"{purpose}:{seed}:{step}:{rank}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def step_generator(system: LightningModule, seed: int) -> torch.Generator:
    """Return the CPU generator of this step's and rank's crops, times, noise and drops."""
    number = derived_seed("noise", seed, system.global_step, system.global_rank)
    return torch.Generator().manual_seed(number)


class SeedLayers(Callback):
    """Seeds torch before every step: dropout and stochastic depth draw from its generator."""

    def __init__(self, seed: int) -> None:
        """Take the run's seed."""
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the step's draws a function of its number."""
        torch.manual_seed(
            derived_seed("layers", self.seed, trainer.global_step, trainer.global_rank)
        )
