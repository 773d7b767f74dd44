"""Exponential moving average of the trained networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class WeightAverage(Callback):
    """Keeps an averaged copy of the networks that a system exports.

    The system declares them in ``exported_networks``; only these are averaged, so frozen encoders
    cost nothing. The average starts as a copy and follows with
    ``decay_n = min(decay, (1 + n) / (10 + n))``, so that an early export is not the random start.
    """

    def __init__(self, decay: float) -> None:
        """Take the final decay, in [0, 1)."""
        self.decay = decay
        self.num_updates = 0
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the present weights, unless a checkpoint brought an average."""
        self._last_step = trainer.global_step
        for name, network in exported_networks(pl_module).items():
            state = network.state_dict()
            if name not in self.averages:
                self.averages[name] = {key: value.clone() for key, value in state.items()}
            else:  # a checkpoint is read into the CPU's memory
                average = self.averages[name]
                self.averages[name] = {k: average[k].to(v.device) for k, v in state.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights once per optimizer step (not per accumulated micro-batch)."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, network in exported_networks(pl_module).items():
            average = self.averages[name]
            for key, value in network.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1.0 - decay)
                else:
                    average[key].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the average for the resumable checkpoint."""
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the average back."""
        self.num_updates = state_dict["num_updates"]
        self.averages = state_dict["averages"]


@contextlib.contextmanager
def with_weights(
    networks: dict[str, nn.Module], weights: dict[str, dict[str, Tensor]] | None
) -> Iterator[None]:
    """Put networks into evaluation mode, with other weights if given; then all of it back."""
    modes = {one: one.training for network in networks.values() for one in network.modules()}
    own: dict[str, dict[str, Tensor]] = {}
    if weights is not None:
        for name, network in networks.items():
            own[name] = {key: value.clone() for key, value in network.state_dict().items()}
            network.load_state_dict(weights[name])
    for network in networks.values():
        network.eval()
    try:
        yield
    finally:
        for name, state in own.items():
            networks[name].load_state_dict(state)
        for module, training in modes.items():
            module.training = training


def exported_networks(system: LightningModule) -> dict[str, nn.Module]:
    """Return the networks that ``system`` trains for export, by file name."""
    networks = system.exported_networks()  # type: ignore[operator]
    if not networks:
        raise ValueError(f"{type(system).__name__}.exported_networks() names no network")
    return networks
