"""Rename tables of Stage A, the semantic compressor and the previewer.

"Original" are the files of Stable Cascade and Wuerstchen, whose compressor holds its trunk under
torchvision's names; "diffusers" is the Hub's ``PaellaVQModel``. All are pure renames: no tensor
changes its shape.

A table lists ``(ours, published)`` pairs of tensor names in the network's own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from cascade.errors import UserError
from stages.previewer import PreviewerConfig
from stages.semantic_compressor import CompressorConfig, TrunkStage
from stages.stage_a import StageAConfig

State = Mapping[str, Tensor]
Pairs = Iterator[tuple[str, str]]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SHOWN = 5


# Stage A


def stage_a_from_original(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename published Stage A weights to ours; strict."""
    return _to_ours(state, _stage_a(config, codebook="vquantizer.codebook.weight"))


def stage_a_to_original(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename our Stage A weights to the published names; strict."""
    return _to_published(state, _stage_a(config, codebook="vquantizer.codebook.weight"))


def stage_a_from_diffusers(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename the weights of a diffusers ``PaellaVQModel`` to ours; strict."""
    return _to_ours(state, _stage_a(config, codebook="vquantizer.embedding.weight"))


def stage_a_to_diffusers(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename our Stage A weights to those of a diffusers ``PaellaVQModel``; strict."""
    return _to_published(state, _stage_a(config, codebook="vquantizer.embedding.weight"))


def _stage_a(config: StageAConfig, codebook: str) -> Pairs:
    yield from _layer("encoder.stem", "in_block.1")
    index = 0  # the published encoder and decoder are one flat list each
    for level, blocks in enumerate(config.encoder_blocks):
        if level > 0:
            yield from _layer(f"encoder.levels.{level}.downsample", f"down_blocks.{index}")
            index += 1
        for block in range(blocks):
            ours = f"encoder.levels.{level}.blocks.{block}"
            yield from _stage_a_block(ours, f"down_blocks.{index}")
            index += 1
    yield "encoder.to_latents.weight", f"down_blocks.{index}.0.weight"
    yield from _batch_norm("encoder.norm", f"down_blocks.{index}.1")
    yield "quantizer.codebook", codebook
    yield from _layer("decoder.from_latents", "up_blocks.0.0")
    index = 1
    for level, blocks in enumerate(config.decoder_blocks):
        for block in range(blocks):
            yield from _stage_a_block(
                f"decoder.levels.{level}.blocks.{block}", f"up_blocks.{index}"
            )
            index += 1
        if level + 1 < len(config.decoder_blocks):
            yield from _layer(f"decoder.levels.{level}.upsample", f"up_blocks.{index}")
            index += 1
    yield from _layer("decoder.to_patches", "out_block.0")


def _stage_a_block(ours: str, published: str) -> Pairs:
    yield f"{ours}.gammas", f"{published}.gammas"
    yield from _layer(f"{ours}.depthwise", f"{published}.depthwise.1")
    yield from _layer(f"{ours}.expand", f"{published}.channelwise.0")
    yield from _layer(f"{ours}.project", f"{published}.channelwise.2")


# Semantic compressor


def compressor_from_original(state: State, config: CompressorConfig) -> dict[str, Tensor]:
    """Rename the weights of a published ``effnet_encoder`` to ours; strict."""
    return _to_ours(state, _compressor(config))


def compressor_to_original(state: State, config: CompressorConfig) -> dict[str, Tensor]:
    """Rename our compressor's weights to those of the published ``effnet_encoder``; strict."""
    return _to_published(state, _compressor(config))


def _compressor(config: CompressorConfig) -> Pairs:
    yield from _conv_norm("trunk.stem", "backbone.0")
    for number, stage in enumerate(config.stages):
        for block in range(stage.layers):
            ours = f"trunk.stages.{number}.{block}"
            yield from _trunk_block(ours, f"backbone.{number + 1}.{block}.block", stage)
    yield from _conv_norm("trunk.head", f"backbone.{len(config.stages) + 1}")
    yield "mapper.weight", "mapper.0.weight"
    yield from _batch_norm("norm", "mapper.1", affine=config.affine)


def _trunk_block(ours: str, published: str, stage: TrunkStage) -> Pairs:
    # torchvision numbers the layers that a block has, leaving none free for those it has not.
    layers = ["spatial"]
    if stage.kind == "mb":
        layers += ["gate", "project"]
        if stage.expand > 1:
            layers.insert(0, "expand")
    elif stage.expand > 1:
        layers.append("project")
    for index, layer in enumerate(layers):
        if layer == "gate":
            yield from _layer(f"{ours}.gate.squeeze", f"{published}.{index}.fc1")
            yield from _layer(f"{ours}.gate.excite", f"{published}.{index}.fc2")
        else:
            yield from _conv_norm(f"{ours}.{layer}", f"{published}.{index}")


# Previewer


def previewer_from_original(state: State, config: PreviewerConfig) -> dict[str, Tensor]:
    """Rename published previewer weights to ours; strict."""
    return _to_ours(state, _previewer(config))


def previewer_to_original(state: State, config: PreviewerConfig) -> dict[str, Tensor]:
    """Rename our previewer's weights to the published names; strict."""
    return _to_published(state, _previewer(config))


def _previewer(config: PreviewerConfig) -> Pairs:
    num_blocks = 2 * len(config.channels)
    for block in range(num_blocks):
        # Three published entries per block: convolution, GELU, batch norm.
        yield from _layer(f"blocks.{block}.conv", f"blocks.{3 * block}")
        yield from _batch_norm(f"blocks.{block}.norm", f"blocks.{3 * block + 2}")
    yield from _layer("to_pixels", f"blocks.{3 * num_blocks}")


# Layers


def _layer(ours: str, published: str) -> Pairs:
    for name in ("weight", "bias"):
        yield f"{ours}.{name}", f"{published}.{name}"


def _batch_norm(ours: str, published: str, affine: bool = True) -> Pairs:
    for name in (("weight", "bias") if affine else ()) + _STATISTICS:
        yield f"{ours}.{name}", f"{published}.{name}"


def _conv_norm(ours: str, published: str) -> Pairs:
    yield f"{ours}.conv.weight", f"{published}.0.weight"
    yield from _batch_norm(f"{ours}.norm", f"{published}.1")


def _to_ours(state: State, pairs: Pairs) -> dict[str, Tensor]:
    return _renamed(state, {published: ours for ours, published in pairs})


def _to_published(state: State, pairs: Pairs) -> dict[str, Tensor]:
    return _renamed(state, dict(pairs))


def _renamed(state: State, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename every tensor.

    Raises:
        UserError: If a tensor of the table is missing or one of the weights is not in it.
    """
    missing = [key for key in names if key not in state]
    unexpected = [key for key in state if key not in names]
    if missing or unexpected:
        raise UserError(
            f"weights do not fit the configuration: {len(missing)} missing {missing[:_SHOWN]}, "
            f"{len(unexpected)} unexpected {unexpected[:_SHOWN]}"
        )
    return {new: state[old] for old, new in names.items()}
