"""The parts of a single file of SD or SDXL: each network is below a prefix of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from cascade.checkpoints.mapped import StoredTensors
from cascade.checkpoints.weight_map import State

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."

V = TypeVar("V")


def part_of(state: State, prefix: str) -> State:
    """Return the tensors below ``prefix``, named without it; of a file, none is read."""
    if isinstance(state, StoredTensors):
        return StoredTensors(_below(state.stored, prefix))
    return _below(state, prefix)


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Put ``prefix`` before every name: the inverse of ``part_of``."""
    return {prefix + name: tensor for name, tensor in state.items()}


def _below(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    return {name[len(prefix) :]: one for name, one in named.items() if name.startswith(prefix)}
