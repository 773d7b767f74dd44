"""Rename tables of Stage B and Stage C of Würstchen v2.

"Original" are the authors' own files; "diffusers" are the Hub's folders with a
``WuerstchenDiffNeXt`` (B) or a ``WuerstchenPrior`` (C).
"""

from __future__ import annotations

from torch import Tensor, nn

from cascade.checkpoints.blocks import Layout, attn_block, res_block, timestep_block
from cascade.checkpoints.files import on_meta
from cascade.checkpoints.weight_map import State, Table, layer, to_ours, to_theirs
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c_v2 import StageCV2, StageCV2Config

# Stage C


def stage_c_from_original(
    state: State, config: StageCV2Config, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published prior weights to ours; strict."""
    return to_ours(state, _stage_c(config, "original"), network or _meta_stage_c(config))


def stage_c_to_original(state: State, config: StageCV2Config) -> dict[str, Tensor]:
    """Rename our prior's weights to the published names; strict."""
    return to_theirs(state, _stage_c(config, "original"), _meta_stage_c(config))


def stage_c_from_diffusers(
    state: State, config: StageCV2Config, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers ``WuerstchenPrior`` to ours; strict."""
    return to_ours(state, _stage_c(config, "diffusers"), network or _meta_stage_c(config))


def stage_c_to_diffusers(state: State, config: StageCV2Config) -> dict[str, Tensor]:
    """Rename our prior's weights to those of a diffusers ``WuerstchenPrior``; strict."""
    return to_theirs(state, _stage_c(config, "diffusers"), _meta_stage_c(config))


def _meta_stage_c(config: StageCV2Config) -> nn.Module:
    with on_meta():
        return StageCV2(config)


def _stage_c(config: StageCV2Config, layout: Layout) -> Table:
    yield from layer("text_expand", "cond_mapper.0")
    yield from layer("text_project", "cond_mapper.2")
    yield from layer("embedding", "projection")
    for block in range(config.num_blocks):
        yield from _block(f"blocks.{block}", "blocks", 3 * block, attention=True, layout=layout)
    yield from layer("out", "out.1")


# Stage B


def stage_b_from_original(
    state: State, config: StageBV2Config, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published Stage B weights to ours; strict."""
    return to_ours(state, _stage_b(config, "original"), network or _meta_stage_b(config))


def stage_b_to_original(state: State, config: StageBV2Config) -> dict[str, Tensor]:
    """Rename our Stage B weights to the published names; strict."""
    return to_theirs(state, _stage_b(config, "original"), _meta_stage_b(config))


def stage_b_from_diffusers(
    state: State, config: StageBV2Config, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers ``WuerstchenDiffNeXt`` to ours; strict."""
    return to_ours(state, _stage_b(config, "diffusers"), network or _meta_stage_b(config))


def stage_b_to_diffusers(state: State, config: StageBV2Config) -> dict[str, Tensor]:
    """Rename our Stage B weights to those of a diffusers ``WuerstchenDiffNeXt``; strict."""
    return to_theirs(state, _stage_b(config, "diffusers"), _meta_stage_b(config))


def _meta_stage_b(config: StageBV2Config) -> nn.Module:
    with on_meta():
        return StageBV2(config)


def _stage_b(config: StageBV2Config, layout: Layout) -> Table:
    yield from layer("text_mapper", "clip_mapper")
    levels = len(config.hidden_channels)
    for level, reads in enumerate(config.reads_compressed):
        if reads:
            # Theirs are one list: the way down, then the way up, deepest level first.
            yield from layer(f"down_mappers.{level}", f"effnet_mappers.{level}")
            yield from layer(f"up_mappers.{level}", f"effnet_mappers.{2 * levels - 1 - level}")
    yield from layer("embedding", "embedding.1")
    for level in range(levels):
        first = 0
        if level > 0:  # theirs begin a level with the layer that leads to it
            yield from layer(f"down_samplers.{level - 1}.conv", f"down_blocks.{level}.0.1")
            first = 1
        yield from _level(config, level, f"down_blocks.{level}", first, layout)
    for index, level in enumerate(reversed(range(levels))):
        yield from _level(config, level, f"up_blocks.{index}", 0, layout)
        if level > 0:  # and end it with the layer that leads on
            last = config.num_blocks[level] * _parts(config, level)
            yield from layer(f"up_samplers.{index}.conv", f"up_blocks.{index}.{last}.1")
    yield from layer("out", "clf.1")


def _level(config: StageBV2Config, level: int, where: str, first: int, layout: Layout) -> Table:
    parts = _parts(config, level)
    for block in range(config.num_blocks[level]):
        index = first + block * parts
        yield from _block(f"{where}.{block}", where, index, attention=parts == 3, layout=layout)


def _parts(config: StageBV2Config, level: int) -> int:
    return 3 if config.num_heads[level] else 2


# Both


def _block(ours: str, where: str, first: int, *, attention: bool, layout: Layout) -> Table:
    """Link a block to the two or three entries of their flat list that it is there."""
    yield from res_block(f"{ours}.residual", f"{where}.{first}")
    yield from timestep_block(f"{ours}.modulation", f"{where}.{first + 1}")
    if attention:
        yield from attn_block(f"{ours}.attention", f"{where}.{first + 2}", layout)
