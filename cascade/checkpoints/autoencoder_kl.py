"""Rename tables of AutoencoderKL, the autoencoder of SD and SDXL.

"Original" are the authors' own files, where it is below ``first_stage_model.``; "diffusers" are the
Hub's folders. Ours have the names of today's; older ones name their attention otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from cascade.checkpoints.files import on_meta
from cascade.checkpoints.weight_map import State, Table, by_module, same, to_ours, to_theirs
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

_ATTENTIONS = ("encoder.mid_block.attentions.0", "decoder.mid_block.attentions.0")
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_ORIGINAL_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def autoencoder_kl_from_original(
    state: State, config: AutoencoderKLConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of an original autoencoder, without their prefix, to ours; strict."""
    network = network or _meta_autoencoder(config)
    return to_ours(state, _original(config, network), network)


def autoencoder_kl_to_original(state: State, config: AutoencoderKLConfig) -> dict[str, Tensor]:
    """Rename our autoencoder's weights to the original names, without a prefix; strict."""
    network = _meta_autoencoder(config)
    return to_theirs(state, _original(config, network), network)


def autoencoder_kl_from_diffusers(
    state: State, config: AutoencoderKLConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers autoencoder, of any age, to ours; strict."""
    network = network or _meta_autoencoder(config)
    modules = {part: part for part, _ in network.named_children()}
    if f"{_ATTENTIONS[0]}.query.weight" in state:
        modules |= {
            f"{attention}.{new}": f"{attention}.{old}"
            for attention in _ATTENTIONS
            for new, old in _OLD_ATTENTION.items()
        }
    return to_ours(state, by_module(network.state_dict(), modules), network)


def autoencoder_kl_to_diffusers(state: State, config: AutoencoderKLConfig) -> dict[str, Tensor]:
    """Return our autoencoder's weights, which have diffusers' names of today; strict."""
    network = _meta_autoencoder(config)
    return to_theirs(state, [same(name, name) for name in network.state_dict()], network)


def _meta_autoencoder(config: AutoencoderKLConfig) -> nn.Module:
    with on_meta():
        return AutoencoderKL(config)


def _original(config: AutoencoderKLConfig, network: nn.Module) -> Table:
    for link in by_module(network.state_dict(), dict(_modules(config))):
        name = link.ours[0]
        # What is a linear layer here is a 1x1 convolution there.
        linear = name.startswith(_ATTENTIONS) and ".to_" in name and name.endswith(".weight")
        yield replace(link, their_trailing_ones=2) if linear else link


def _modules(config: AutoencoderKLConfig) -> Iterator[tuple[str, str]]:
    levels = len(config.channels)
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    for level in range(levels):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        yield from _resnets(ours, f"{theirs}.block", config.blocks_per_level)
        yield f"{ours}.downsamplers.0.conv", f"{theirs}.downsample.conv"
        # Theirs are numbered from the finest level on both ways, ours as they run.
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        yield from _resnets(ours, f"{theirs}.block", config.blocks_per_level + 1)
        yield f"{ours}.upsamplers.0.conv", f"{theirs}.upsample.conv"
    for side, attention in zip(("encoder", "decoder"), _ATTENTIONS, strict=True):
        for name in ("conv_in", "conv_out"):
            yield f"{side}.{name}", f"{side}.{name}"
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for number in (0, 1):
            middle = f"{side}.mid_block.resnets.{number}"
            yield from _resnet(middle, f"{side}.mid.block_{number + 1}")
        for part, original in _ORIGINAL_ATTENTION.items():
            yield f"{attention}.{part}", f"{side}.mid.attn_1.{original}"


def _resnets(ours: str, theirs: str, count: int) -> Iterator[tuple[str, str]]:
    for number in range(count):
        yield from _resnet(f"{ours}.resnets.{number}", f"{theirs}.{number}")


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield ours, theirs
    yield f"{ours}.conv_shortcut", f"{theirs}.nin_shortcut"
