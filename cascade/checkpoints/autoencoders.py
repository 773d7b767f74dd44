"""Rename tables of Stage A, the semantic compressor and the previewer.

"Original" are the files of Stable Cascade and Wuerstchen, whose compressor holds its trunk under
torchvision's names; "diffusers" is the Hub's ``PaellaVQModel``. All are pure renames: no tensor
changes its shape.

Shapes are left to whoever puts the weights into a network.
"""

from __future__ import annotations

from torch import Tensor, nn

from cascade.checkpoints.weight_map import (
    State,
    Table,
    batch_norm,
    layer,
    same,
    to_ours,
    to_theirs,
)
from stages.previewer import PreviewerConfig
from stages.semantic_compressor import CompressorConfig, TrunkStage
from stages.stage_a import StageAConfig

# Stage A


def stage_a_from_original(
    state: State, config: StageAConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published Stage A weights to ours; strict."""
    return to_ours(state, _stage_a(config, codebook="vquantizer.codebook.weight"), network)


def stage_a_to_original(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename our Stage A weights to the published names; strict."""
    return to_theirs(state, _stage_a(config, codebook="vquantizer.codebook.weight"))


def stage_a_from_diffusers(
    state: State, config: StageAConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers ``PaellaVQModel`` to ours; strict."""
    return to_ours(state, _stage_a(config, codebook="vquantizer.embedding.weight"), network)


def stage_a_to_diffusers(state: State, config: StageAConfig) -> dict[str, Tensor]:
    """Rename our Stage A weights to those of a diffusers ``PaellaVQModel``; strict."""
    return to_theirs(state, _stage_a(config, codebook="vquantizer.embedding.weight"))


def _stage_a(config: StageAConfig, codebook: str) -> Table:
    yield from layer("encoder.stem", "in_block.1")
    index = 0  # the published encoder and decoder are one flat list each
    for level, blocks in enumerate(config.encoder_blocks):
        if level > 0:
            yield from layer(f"encoder.levels.{level}.downsample", f"down_blocks.{index}")
            index += 1
        for block in range(blocks):
            ours = f"encoder.levels.{level}.blocks.{block}"
            yield from _stage_a_block(ours, f"down_blocks.{index}")
            index += 1
    yield same("encoder.to_latents.weight", f"down_blocks.{index}.0.weight")
    yield from batch_norm("encoder.norm", f"down_blocks.{index}.1")
    yield same("quantizer.codebook", codebook)
    yield from layer("decoder.from_latents", "up_blocks.0.0")
    index = 1
    for level, blocks in enumerate(config.decoder_blocks):
        for block in range(blocks):
            yield from _stage_a_block(
                f"decoder.levels.{level}.blocks.{block}", f"up_blocks.{index}"
            )
            index += 1
        if level + 1 < len(config.decoder_blocks):
            yield from layer(f"decoder.levels.{level}.upsample", f"up_blocks.{index}")
            index += 1
    yield from layer("decoder.to_patches", "out_block.0")


def _stage_a_block(ours: str, published: str) -> Table:
    yield same(f"{ours}.gammas", f"{published}.gammas")
    yield from layer(f"{ours}.depthwise", f"{published}.depthwise.1")
    yield from layer(f"{ours}.expand", f"{published}.channelwise.0")
    yield from layer(f"{ours}.project", f"{published}.channelwise.2")


# Semantic compressor


def compressor_from_original(
    state: State, config: CompressorConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a published ``effnet_encoder`` to ours; strict."""
    return to_ours(state, _compressor(config), network)


def compressor_to_original(state: State, config: CompressorConfig) -> dict[str, Tensor]:
    """Rename our compressor's weights to those of the published ``effnet_encoder``; strict."""
    return to_theirs(state, _compressor(config))


def _compressor(config: CompressorConfig) -> Table:
    yield from trunk("trunk", "backbone", config.stages)
    yield same("mapper.weight", "mapper.0.weight")
    yield from batch_norm("norm", "mapper.1", affine=config.affine)


def trunk_from_torchvision(state: State, stages: tuple[TrunkStage, ...]) -> dict[str, Tensor]:
    """Rename torchvision's whole EfficientNetV2 to our trunk; its classifier is left out."""
    features = {key: state[key] for key in state if not key.startswith("classifier.")}
    renamed = to_ours(features, trunk("trunk", "features", stages))
    return {key.removeprefix("trunk."): value for key, value in renamed.items()}


def trunk(ours: str, published: str, stages: tuple[TrunkStage, ...]) -> Table:
    """Link an EfficientNetV2 to torchvision's ``features``."""
    yield from _conv_norm(f"{ours}.stem", f"{published}.0")
    for number, stage in enumerate(stages):
        for block in range(stage.layers):
            theirs = f"{published}.{number + 1}.{block}.block"
            yield from _trunk_block(f"{ours}.stages.{number}.{block}", theirs, stage)
    yield from _conv_norm(f"{ours}.head", f"{published}.{len(stages) + 1}")


def _trunk_block(ours: str, published: str, stage: TrunkStage) -> Table:
    # torchvision numbers the layers that a block has, leaving none free for those it has not.
    names = ["spatial"]
    if stage.kind == "mb":
        names += ["gate", "project"]
        if stage.expand > 1:
            names.insert(0, "expand")
    elif stage.expand > 1:
        names.append("project")
    for index, name in enumerate(names):
        if name == "gate":
            yield from layer(f"{ours}.gate.squeeze", f"{published}.{index}.fc1")
            yield from layer(f"{ours}.gate.excite", f"{published}.{index}.fc2")
        else:
            yield from _conv_norm(f"{ours}.{name}", f"{published}.{index}")


# Previewer


def previewer_from_original(
    state: State, config: PreviewerConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published previewer weights to ours; strict."""
    return to_ours(state, _previewer(config), network)


def previewer_to_original(state: State, config: PreviewerConfig) -> dict[str, Tensor]:
    """Rename our previewer's weights to the published names; strict."""
    return to_theirs(state, _previewer(config))


def _previewer(config: PreviewerConfig) -> Table:
    num_blocks = 2 * len(config.channels)
    for block in range(num_blocks):
        # Three published entries per block: convolution, GELU, batch norm.
        yield from layer(f"blocks.{block}.conv", f"blocks.{3 * block}")
        yield from batch_norm(f"blocks.{block}.norm", f"blocks.{3 * block + 2}")
    yield from layer("to_pixels", f"blocks.{3 * num_blocks}")


# Layers


def _conv_norm(ours: str, published: str) -> Table:
    yield same(f"{ours}.conv.weight", f"{published}.0.weight")
    yield from batch_norm(f"{ours}.norm", f"{published}.1")
