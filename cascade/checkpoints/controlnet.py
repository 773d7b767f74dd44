"""Rename tables of the ControlNets published with Stable Cascade.

The published extractors are one flat list each; that of EfficientNetV2 has torchvision's names, as
in the compressor's file. All are pure renames: no tensor changes its shape.
"""

from __future__ import annotations

from torch import Tensor, nn

from cascade.checkpoints.autoencoders import trunk
from cascade.checkpoints.weight_map import State, Table, layer, same, to_ours, to_theirs
from stages.controlnet import ControlNetConfig


def controlnet_from_original(
    state: State, config: ControlNetConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published ControlNet weights to ours; strict."""
    return to_ours(state, _controlnet(config), network)


def controlnet_to_original(state: State, config: ControlNetConfig) -> dict[str, Tensor]:
    """Rename our ControlNet's weights to the published names; strict."""
    return to_theirs(state, _controlnet(config))


def _controlnet(config: ControlNetConfig) -> Table:
    if config.bottleneck == "effnet":
        yield from trunk("backbone", "backbone", config.stages)
    elif config.bottleneck == "large":
        yield from _large(config.residual_blocks)
    else:
        yield from layer("backbone.stem", "backbone.0")
        yield from layer("backbone.head", "backbone.2")
    for index in range(len(config.blocks)):
        yield same(f"projections.{index}.mix.weight", f"projections.{index}.0.weight")
        yield same(f"projections.{index}.out.weight", f"projections.{index}.2.weight")


def _large(num_blocks: int) -> Table:
    yield from layer("backbone.stem", "backbone.0")
    yield from layer("backbone.narrow", "backbone.2")
    for block in range(num_blocks):
        # Six published entries per block: norm, GELU, convolution, and the same again.
        theirs = f"backbone.{block + 3}.blocks"
        for index, name in enumerate(("norm_in", "conv_in", "norm_out", "conv_out")):
            yield from layer(f"backbone.blocks.{block}.{name}", f"{theirs}.{(0, 2, 3, 5)[index]}")
    yield from layer("backbone.head", f"backbone.{num_blocks + 3}")
