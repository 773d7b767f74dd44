"""How a system's networks run: blocks recomputed, compiled or cut over devices, as ``run`` says.

The order is that of the wrappers, from the inside: a block is compiled, then cut; recomputing calls
the block as a whole. None of them changes a key of the state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from cascade.compiled import blocks_of, compile_blocks
from cascade.errors import UserError
from train.settings import RunConfig
from train.sharding import ShardedStrategy, shard_network


@runtime_checkable
class Recomputing(Protocol):
    """A network that can run its blocks again in the backward pass."""

    recompute: bool


def configure_networks(system: LightningModule, run: RunConfig) -> None:
    """Make the trained networks of a system run as ``run`` says; for its ``configure_model``.

    Frozen networks are left alone. Lightning may call a system's ``configure_model`` again.

    Raises:
        UserError: A network has nothing to recompute.
    """
    for name, network in trained_networks(system):
        if run.activation_checkpointing:
            if not isinstance(network, Recomputing):
                raise UserError(
                    f"run.activation_checkpointing: the {name} ({type(network).__name__}) has no "
                    "blocks to recompute; leave it out"
                )
            network.recompute = True
        if run.compile:
            compile_blocks(network)
        strategy = system.trainer.strategy
        if isinstance(strategy, ShardedStrategy) and not isinstance(network, FSDPModule):
            shard_network(network, list(blocks_of(network)), strategy.data_mesh)


def trained_networks(system: LightningModule) -> Iterator[tuple[str, nn.Module]]:
    """Yield the system's networks with something to learn, with their attributes' names."""
    for name, child in system.named_children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            yield name, child


def plain_copy(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Return the network as it is without wrappers, with the tensors of ``state`` themselves.

    Nothing is copied: no second set of weights is needed to export or to draw with other ones.
    """
    if isinstance(network, FSDPModule):
        # fully_shard gives it the class (FSDPModule, its own), and forbids to copy it.
        own_class = type(network).__bases__[1]
        with torch.device("meta"):
            plain: nn.Module = own_class(network.config)
    else:
        kept = network.state_dict(keep_vars=True).values()
        memo = {id(one): _hollow(one) for one in (*network.parameters(), *kept)}
        plain = copy.deepcopy(network, memo)  # type: ignore[arg-type]
    plain.load_state_dict(state, assign=True)
    return plain


def _hollow(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
