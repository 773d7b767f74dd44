"""Exponential moving average of the trained networks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from train.sharding import cut_like, gathered, local_part, part_like


class WeightAverage(Callback):
    """Keeps an averaged copy of the networks that a system exports.

    The system declares them in ``exported_networks``; only these are averaged, so frozen encoders
    cost nothing. The average starts as a copy and follows with
    ``decay_n = min(decay, (1 + n) / (10 + n))``, so that an early export is not the random start.

    Under FSDP each rank averages its own part: every element has one rank, so the average is that
    of one process, element by element.
    """

    def __init__(self, decay: float, *, offload: bool = False) -> None:
        """Take the final decay, in [0, 1), and whether to keep the average on the CPU."""
        self.decay = decay
        self.offload = offload
        self.num_updates = 0
        self.averages: dict[str, dict[str, Tensor]] = {}
        """This rank's parts; whole tensors between reading a checkpoint and the first step."""
        self._networks: dict[str, nn.Module] = {}
        self._last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the present weights, unless a checkpoint brought an average."""
        self._last_step = trainer.global_step
        self._networks = exported_networks(pl_module)
        for name, network in self._networks.items():
            read = self.averages.get(name)
            self.averages[name] = {
                key: self._start(value, None if read is None else read[key])
                for key, value in network.state_dict().items()
            }

    def _start(self, value: Tensor, read: Tensor | None) -> Tensor:
        """Return where an average begins: this rank's part of what was read, or of the weight."""
        part = local_part(value if read is None else part_like(read, value))
        return part.to("cpu" if self.offload else value.device, copy=True)

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
                now = local_part(value).to(average[key].device)
                if value.is_floating_point():
                    average[key].lerp_(now, 1.0 - decay)
                else:
                    average[key].copy_(now)

    def whole(self, name: str) -> dict[str, Tensor]:
        """Return a network's average; under FSDP whole CPU tensors, and all ranks must take part.

        Without FSDP these are the tensors that the average goes on in.
        """
        if name not in self._networks:  # no step was left to make: as the checkpoint brought it
            return self.averages[name]
        return gathered(self.loadable(name))

    def loadable(self, name: str) -> dict[str, Tensor]:
        """Return a network's average as its ``load_state_dict`` takes it, cut as it is."""
        return cut_as(self._networks[name], self.averages[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the average for the resumable checkpoint."""
        averages = {name: self.whole(name) for name in self.averages}
        return {"num_updates": self.num_updates, "averages": averages}

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


def cut_as(network: nn.Module, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state whose parts this rank has, as the network's own is cut."""
    state = network.state_dict()
    return {key: cut_like(part, state[key]) for key, part in parts.items()}


def exported_networks(system: LightningModule) -> dict[str, nn.Module]:
    """Return the networks that ``system`` trains for export, by file name."""
    networks = system.exported_networks()  # type: ignore[operator]
    if not networks:
        raise ValueError(f"{type(system).__name__}.exported_networks() names no network")
    return networks
