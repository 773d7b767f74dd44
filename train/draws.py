"""Where a training step's random draws come from."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule


def step_generator(system: LightningModule, seed: int) -> torch.Generator:
    """Return the CPU generator of this step and rank.

    It depends on nothing else, so a resumed run draws what it would have drawn.
    """
    number = (seed * 1_000_003 + system.global_step) * 4_099 + system.global_rank
    return torch.Generator().manual_seed(number)
