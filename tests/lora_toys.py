"""LoRAs of tiny networks, with updates that are not zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from cascade.adapters.lora import TEXT_TARGETS, UNET_TARGETS, LowRank, layers_of, lora_shapes
from cascade.adapters.lora_names import Part
from cascade.pipelines.unet_parts import UNetParts

EVERYTHING = ("",)


def updates_of(
    network: nn.Module,
    ends: Sequence[str] = UNET_TARGETS,
    *,
    rank: int = 4,
    alpha: float = 6.0,
    seed: int = 0,
    scale: float = 0.2,
) -> dict[str, LowRank]:
    """Return updates of the layers whose paths end so."""
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, layer in layers_of(network).items():
        if path.endswith(tuple(ends)):
            down, up = lora_shapes(layer, rank)
            updates[path] = LowRank(
                scale * torch.randn(down, generator=generator),
                scale * torch.randn(up, generator=generator),
                alpha,
            )
    assert updates
    return updates


def lora_of(
    parts: UNetParts,
    ends: Sequence[str] = UNET_TARGETS,
    odd_ones: Sequence[Part] = ("unet", "text_encoder", "text_encoder_2"),
) -> dict[Part, dict[str, LowRank]]:
    """Return updates of a model's U-Net and text encoders, one of another rank and alpha."""
    found: dict[Part, dict[str, LowRank]] = {}
    for part, network in parts.updatable.items():
        found[part] = updates_of(network, ends if part == "unet" else TEXT_TARGETS)
        if part not in odd_ones:
            continue
        path = next(iter(found[part]))
        odd = updates_of(network, (path,), rank=3, alpha=0.1, seed=1)
        found[part][path] = odd[path]
    return found


def same_updates(one: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> bool:
    """Tell whether updates are the same to the bit, whatever their order."""
    return one.keys() == other.keys() and all(
        torch.equal(own.down, other[path].down)
        and torch.equal(own.up, other[path].up)
        and own.alpha == other[path].alpha
        for path, own in one.items()
    )
