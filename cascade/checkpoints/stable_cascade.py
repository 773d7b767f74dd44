"""Rename tables of Stage B and Stage C of Stable Cascade (v3).

"Original" are Stability AI's single files (``stage_b*.safetensors``, ``stage_c*.safetensors``);
"diffusers" are the Hub's folders with a ``StableCascadeUNet``.
"""

from __future__ import annotations

from torch import Tensor, nn

from cascade.checkpoints.blocks import Layout, attn_block, res_block, timestep_block
from cascade.checkpoints.files import on_meta
from cascade.checkpoints.weight_map import State, Table, layer, to_ours, to_theirs
from cascade.errors import UserError
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC, StageCConfig

# Stage C


def stage_c_from_original(
    state: State, config: StageCConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published Stage C weights to ours; strict."""
    return to_ours(state, _stage_c(config, "original"), network or _meta_stage_c(config))


def stage_c_to_original(state: State, config: StageCConfig) -> dict[str, Tensor]:
    """Rename our Stage C weights to the published names; strict."""
    return to_theirs(state, _stage_c(config, "original"), _meta_stage_c(config))


def stage_c_from_diffusers(
    state: State, config: StageCConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers Stage C to ours; strict."""
    return to_ours(state, _stage_c(config, "diffusers"), network or _meta_stage_c(config))


def stage_c_to_diffusers(state: State, config: StageCConfig) -> dict[str, Tensor]:
    """Rename our Stage C weights to those of a diffusers Stage C; strict."""
    return to_theirs(state, _stage_c(config, "diffusers"), _meta_stage_c(config))


def _meta_stage_c(config: StageCConfig) -> nn.Module:
    with on_meta():
        return StageC(config)


def _refuse_distilled(config: StageBConfig | StageCConfig) -> None:
    """Refuse what the published code would load and run otherwise.

    Raises:
        UserError: The network is told a guidance scale, or times in another unit.
    """
    if "cfg" in config.time_conds or config.time_unit != 1.0:
        raise UserError(
            "this network is told a guidance scale, or its time in a unit of its own (time_unit), "
            "which the published layouts do not know; write our own layout"
        )


def _stage_c(config: StageCConfig, layout: Layout) -> Table:
    _refuse_distilled(config)
    if config.qk_norm:
        raise UserError(
            "this Stage C was trained with qk_norm, which the published layouts have no keys for; "
            "write our own layout"
        )
    yield from layer("text_mapper", "clip_txt_mapper")
    yield from layer("pooled_mapper", "clip_txt_pooled_mapper")
    if config.image_channels is not None:
        yield from layer("image_mapper", "clip_img_mapper")
    yield from layer("embedding", "embedding.1")
    levels = len(config.hidden_channels)
    for level in range(1, levels):
        ours, theirs = f"down_changes.{level - 1}.conv", f"down_downscalers.{level}.1.blocks.0"
        yield from layer(ours, theirs)
    heads = config.num_heads
    for way, counts, heads_by_index in (
        ("down_blocks", config.down_blocks, heads),
        ("up_blocks", config.up_blocks, heads[::-1]),
    ):
        for index, count in enumerate(counts):
            where = f"{way}.{index}"
            yield from _level(where, count, heads_by_index[index], config.time_conds, layout)
    for index in range(levels - 1):
        yield from layer(f"up_changes.{index}.conv", f"up_upscalers.{index}.1.blocks.1")
    yield from layer("out", "clf.1")


# Stage B


def stage_b_from_original(
    state: State, config: StageBConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename published Stage B weights to ours; strict."""
    return to_ours(state, _stage_b(config, "original"), network or _meta_stage_b(config))


def stage_b_to_original(state: State, config: StageBConfig) -> dict[str, Tensor]:
    """Rename our Stage B weights to the published names; strict."""
    return to_theirs(state, _stage_b(config, "original"), _meta_stage_b(config))


def stage_b_from_diffusers(
    state: State, config: StageBConfig, network: nn.Module | None = None
) -> dict[str, Tensor]:
    """Rename the weights of a diffusers Stage B to ours; strict."""
    return to_ours(state, _stage_b(config, "diffusers"), network or _meta_stage_b(config))


def stage_b_to_diffusers(state: State, config: StageBConfig) -> dict[str, Tensor]:
    """Rename our Stage B weights to those of a diffusers Stage B; strict."""
    return to_theirs(state, _stage_b(config, "diffusers"), _meta_stage_b(config))


def _meta_stage_b(config: StageBConfig) -> nn.Module:
    with on_meta():
        return StageB(config)


def _stage_b(config: StageBConfig, layout: Layout) -> Table:
    _refuse_distilled(config)
    yield from _condition_mapper("compressed_mapper", "effnet_mapper")
    if config.pixel_condition:
        yield from _condition_mapper("pixel_mapper", "pixels_mapper")
    pooled = "clip_txt_pooled_mapper" if layout == "diffusers" else "clip_mapper"
    yield from layer("pooled_mapper", pooled)
    yield from layer("embedding", "embedding.1")
    levels = len(config.hidden_channels)
    for level in range(1, levels):
        yield from layer(f"down_samplers.{level - 1}.conv", f"down_downscalers.{level}.1")
    heads = config.num_heads
    for way, counts, heads_by_index in (
        ("down_blocks", config.down_blocks, heads),
        ("up_blocks", config.up_blocks, heads[::-1]),
    ):
        for index, count in enumerate(counts):
            where = f"{way}.{index}"
            yield from _level(where, count, heads_by_index[index], config.time_conds, layout)
    for index, repeats in enumerate(config.up_repeats):
        for repeat in range(repeats - 1):
            mapper = f"{index}.{repeat}"
            yield from layer(f"repeat_mappers.{mapper}", f"up_repeat_mappers.{mapper}")
    for index in range(levels - 1):
        yield from layer(f"up_samplers.{index}.conv", f"up_upscalers.{index}.1")
    yield from layer("out", "clf.1")


def _condition_mapper(ours: str, theirs: str) -> Table:
    yield from layer(f"{ours}.expand", f"{theirs}.0")
    yield from layer(f"{ours}.project", f"{theirs}.2")


# Both


def _level(
    where: str, count: int, num_heads: int, time_conds: tuple[str, ...], layout: Layout
) -> Table:
    """Link a level's blocks; theirs are one flat list of residual, modulation and attention."""
    parts = 3 if num_heads else 2
    for block in range(count):
        ours, first = f"{where}.{block}", block * parts
        yield from res_block(f"{ours}.residual", f"{where}.{first}")
        yield from timestep_block(f"{ours}.modulation", f"{where}.{first + 1}", time_conds)
        if num_heads:
            yield from attn_block(f"{ours}.attention", f"{where}.{first + 2}", layout)
