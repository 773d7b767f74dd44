"""Rename tables of the U-Nets of SD and SDXL and of their students.

"Original" are the authors' own single files, whose U-Net is below ``model.diffusion_model.``; ours
have the names of diffusers' folders, which need no table.

A student's file has as many entries as layers, numbered without gaps, so one rule serves all.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from cascade.checkpoints.files import on_meta
from cascade.checkpoints.weight_map import State, Table, by_module, same, to_ours, to_theirs
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_from_original(
    state: State, config: UNetConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of an original U-Net, without their prefix, to ours; strict."""
    network = network or _meta_unet(config)
    return to_ours(state, _unet(config, network), network)


def unet_to_original(state: State, config: UNetConfig) -> dict[str, Tensor]:
    """Rename our U-Net's weights to the original names, without a prefix; strict."""
    network = _meta_unet(config)
    return to_theirs(state, _unet(config, network), network)


def unet_to_diffusers(state: State, config: UNetConfig) -> dict[str, Tensor]:
    """Return our U-Net's weights, which have diffusers' names; strict."""
    network = _meta_unet(config)
    return to_theirs(state, [same(name, name) for name in network.state_dict()], network)


def unet_original_layers(config: UNetConfig) -> dict[str, str]:
    """Return the original path of each of our layers that has a weight."""
    layers = {}
    for link in _unet(config, _meta_unet(config)):
        (ours,), (theirs,) = link.ours, link.theirs
        if ours.endswith(".weight"):
            layers[ours.removesuffix(".weight")] = theirs.removesuffix(".weight")
    return layers


def _meta_unet(config: UNetConfig) -> nn.Module:
    with on_meta():
        return UNet(config)


def _unet(config: UNetConfig, network: nn.Module) -> Table:
    modules = dict([*_ENDS.items(), *_down(config), *_middle(config), *_up(config)])
    return by_module(network.state_dict(), modules)


def _down(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 1  # the first entry is the convolution at the start
    for level, depths in enumerate(config.down_depths):
        for layer in range(len(depths)):
            yield from _layer(f"down_blocks.{level}", layer, f"input_blocks.{number}")
            number += 1
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{number}.0.op"
        number += 1


def _middle(config: UNetConfig) -> Iterator[tuple[str, str]]:
    if config.mid_depth is not None:
        yield from _resnet("mid_block.resnets.0", "middle_block.0")
        yield "mid_block.attentions.0", "middle_block.1"
        yield from _resnet("mid_block.resnets.1", "middle_block.2")


def _up(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 0
    for index, depths in enumerate(config.up_depths):
        for layer in range(len(depths)):
            yield from _layer(f"up_blocks.{index}", layer, f"output_blocks.{number}")
            number += 1
        # Resampling is a part of the last layer's entry, behind what that has.
        last = f"output_blocks.{number - 1}.{2 if depths[-1] else 1}"
        yield f"up_blocks.{index}.upsamplers.0.conv", f"{last}.conv"


def _layer(block: str, layer: int, entry: str) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{block}.resnets.{layer}", f"{entry}.0")
    yield f"{block}.attentions.{layer}", f"{entry}.1"


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name, original in _RESNET.items():
        yield f"{ours}.{name}", f"{theirs}.{original}"
