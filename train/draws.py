"""Where a training step's random draws come from: functions of (seed, step, rank), nothing else.

A resumed run therefore draws what it would have drawn, and no two purposes share their numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

Purpose = Literal[
    "order", "captions", "layers", "rests", "crops", "blocks", "buckets", "spares", "lora", "mix"
]


def derived_seed(purpose: Purpose, seed: int, step: int, rank: int = 0) -> int:
    """Return a 63-bit seed that is unrelated for every other purpose, seed, step or rank."""
    text = f"{purpose}:{seed}:{step}:{rank}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class StepDraws:
    """The draws of one rank's micro-batch, as parts of the draws of the whole global batch.

    A sample's noise depends on its place in the global batch alone: one process with a batch of 8,
    two with 4, and one that accumulates two micro-batches of 4 all see the same. Every draw has a
    name, so that a new one does not move the others.
    """

    seed: int
    """The run's."""
    step: int
    """Optimizer steps done."""
    rank: int = 0
    world: int = 1
    micro: int = 0
    """Which micro-batch of the step."""
    micros: int = 1
    """Micro-batches a step."""

    def generator(self, name: str) -> torch.Generator:
        """Return the CPU generator of what is drawn for the whole batch, the same on all ranks."""
        return torch.Generator().manual_seed(self._number(name, 0))

    def scalar(self, name: str) -> float:
        """Return a number in [0, 1) for the whole batch."""
        return float(torch.rand((), generator=self.generator(name)))

    def share(
        self, name: str, count: int, draw: Callable[[int, torch.Generator], Tensor]
    ) -> Tensor:
        """Draw for the global batch and return this micro-batch's part.

        Args:
            name: Which draw.
            count: Samples of this micro-batch; all ranks have as many.
            draw: Maps (samples, generator) to a tensor with a sample a row.
        """
        whole = draw(count * self.world * self.micros, self.generator(name))
        first = (self.micro * self.world + self.rank) * count
        return whole[first : first + count]

    def uniform(self, name: str, count: int) -> Tensor:
        """Return ``(count,)`` numbers in [0, 1)."""
        return self.share(name, count, lambda n, generator: torch.rand(n, generator=generator))

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise of shape ``(B, ...)``; each sample has its own generator."""
        count = shape[0]
        first = (self.micro * self.world + self.rank) * count
        generator = torch.Generator()
        return torch.stack(
            [
                torch.randn(
                    tuple(shape[1:]),
                    generator=generator.manual_seed(self._number(name, first + index + 1)),
                )
                for index in range(count)
            ]
        )

    def _number(self, name: str, sample: int) -> int:
        text = f"step:{name}:{self.seed}:{self.step}:{sample}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def step_draws(system: LightningModule, seed: int, batch_idx: int) -> StepDraws:
    """Return the draws of the micro-batch that ``system`` trains on."""
    trainer = system.trainer
    micros = trainer.accumulate_grad_batches
    return StepDraws(
        seed=seed,
        step=trainer.global_step,
        rank=trainer.global_rank,
        world=trainer.world_size,
        micro=batch_idx % micros,
        micros=micros,
    )


class SeedLayers(Callback):
    """Seeds torch before every step: dropout and stochastic depth draw from its generator."""

    def __init__(self, seed: int) -> None:
        """Take the run's seed."""
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the draws a function of the step, the micro-batch and the rank."""
        micro = batch_idx % trainer.accumulate_grad_batches
        place = micro * trainer.world_size + trainer.global_rank
        torch.manual_seed(derived_seed("layers", self.seed, trainer.global_step, place))
