"""What a file of published weights is, told by its tensors' names and shapes, never by its name.

Reference: FACTS of the published checkpoints: Stable Cascade's and Würstchen's own files, and the
folders of diffusers; of SD's and SDXL's see ``detect_unet`` and ``text_tower``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cascade.checkpoints.blocks import Layout
from cascade.checkpoints.detect_unet import (
    autoencoder_kl_config,
    autoencoder_kl_layout,
    unet_config,
    unet_layout,
)
from cascade.checkpoints.text_tower import text_config, text_layout
from cascade.errors import UserError
from stages.controlnet import ALL_BLOCKS, PUBLISHED_BLOCKS, ControlNetConfig
from stages.previewer import PreviewerConfig
from stages.semantic_compressor import EFFICIENTNET_V2_S, CompressorConfig
from stages.stage_a import StageAConfig
from stages.stage_b import StageBConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config

Kind = Literal[
    "stage_a",
    "stage_a_fast",
    "stage_b",
    "stage_c",
    "compressor",
    "previewer",
    "controlnet",
    "unet",
    "autoencoder_kl",
    "text_encoder",
]
Generation = Literal["v2", "v3"]
FileLayout = Literal["ours", "original", "diffusers"]
Shapes = Mapping[str, tuple[int, ...]]
Declared = Mapping[str, Any]
"""A diffusers ``config.json``: what shapes do not tell, such as the number of heads."""

HEAD_CHANNELS = 64
"""Width of an attention head in every published network."""


@dataclass(frozen=True)
class Published:
    """What published weights are."""

    kind: Kind
    generation: Generation | None
    """None where the generations share the network (Stage A), or where there are none."""
    layout: FileLayout
    config: Any
    """Configuration of our network that takes these weights."""


def detect(shapes: Shapes, where: str, declared: Declared | None = None) -> Published:
    """Tell what the tensors of a file are, and the sizes of the network.

    Args:
        shapes: Shape of each tensor, by its published name without wrappers' prefixes.
        where: Name of the file, for errors.
        declared: The ``config.json`` beside the file, if there is one.

    Raises:
        UserError: If the tensors are none of the published networks'.
    """
    declared = declared or {}
    layout: Layout = "diffusers" if any(".attention.to_q." in key for key in shapes) else "original"
    try:
        if "clip_txt_mapper.weight" in shapes:
            return Published("stage_c", "v3", layout, _stage_c(shapes, declared))
        if "cond_mapper.0.weight" in shapes and "projection.weight" in shapes:
            return Published("stage_c", "v2", layout, _stage_c_v2(shapes, declared))
        if any(key.startswith("effnet_mappers.") for key in shapes):
            return Published("stage_b", "v2", layout, _stage_b_v2(shapes, declared))
        if "effnet_mapper.0.weight" in shapes:
            return Published("stage_b", "v3", layout, _stage_b(shapes, declared))
        if any(key.startswith("vquantizer.") for key in shapes):
            named = "vquantizer.embedding.weight" in shapes
            return Published(
                "stage_a", None, "diffusers" if named else "original", _stage_a(shapes, declared)
            )
        if "projections.0.0.weight" in shapes:
            return Published("controlnet", "v3", "original", _controlnet(shapes, where))
        if "mapper.0.weight" in shapes and "backbone.0.0.weight" in shapes:
            generation: Generation = "v2" if "mapper.1.weight" in shapes else "v3"
            return Published("compressor", generation, "original", _compressor(shapes))
        if "blocks.0.weight" in shapes and len(shapes["blocks.0.weight"]) == 4:
            return Published("previewer", "v3", "original", _previewer(shapes))
        if (found := _of_unet_pipelines(shapes, where, declared)) is not None:
            return found
    except (KeyError, IndexError, StopIteration, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: looks like a published network, but lacks {error}; download it again"
        ) from error
    except UserError:
        raise
    except ValueError as error:  # shapes of which no configuration can be made
        raise UserError(
            f"{where}: looks like a published network, but {error}; download it again"
        ) from error
    first = ", ".join(sorted(shapes)[:5]) or "none at all"
    raise UserError(
        f"{where}: none of the networks of Stable Cascade, Würstchen, SD or SDXL; its first "
        f"tensors: {first}"
    )


def _of_unet_pipelines(shapes: Shapes, where: str, declared: Declared) -> Published | None:
    """Tell the parts of SD and SDXL: a U-Net, teacher or student, its autoencoder, its text."""
    if (layout := unet_layout(shapes)) is not None:
        return Published("unet", None, layout, unet_config(shapes, where, declared))
    if (layout_kl := autoencoder_kl_layout(shapes)) is not None:
        config = autoencoder_kl_config(shapes, where, declared)
        return Published("autoencoder_kl", None, layout_kl, config)
    if (layout_text := text_layout(shapes)) is not None:
        return Published("text_encoder", None, layout_text, text_config(shapes, where))
    return None


# Stage C


def _stage_c(shapes: Shapes, declared: Declared) -> StageCConfig:
    cond, text = shapes["clip_txt_mapper.weight"]
    pooled_rows, pooled = shapes["clip_txt_pooled_mapper.weight"]
    image = shapes.get("clip_img_mapper.weight")
    patch = int(declared.get("patch_size", 1))
    levels = _levels(shapes, "down_blocks", declared)
    first = shapes["down_blocks.0.1.mapper.weight"]
    return StageCConfig(
        latent_channels=shapes["embedding.1.weight"][1] // patch**2,
        patch_size=patch,
        time_channels=first[1],
        cond_channels=cond,
        hidden_channels=tuple(level.width for level in levels),
        num_heads=tuple(level.heads for level in levels),
        down_blocks=tuple(level.blocks for level in levels),
        up_blocks=tuple(level.blocks for level in _levels(shapes, "up_blocks", declared)),
        text_channels=text,
        text_pooled_channels=pooled,
        pooled_tokens=pooled_rows // cond,
        image_channels=None if image is None else image[1],
        kernel_size=shapes["down_blocks.0.0.depthwise.weight"][-1],
        dropout=_dropout(declared, (0.1,))[0],
        time_conds=_time_conds(shapes),
    )


def _stage_c_v2(shapes: Shapes, declared: Declared) -> StageCV2Config:
    width = shapes["projection.weight"][0]
    heads = int(declared.get("nhead", 0)) or _heads(width, {}, 0)
    return StageCV2Config(
        latent_channels=shapes["projection.weight"][1],
        time_channels=shapes["blocks.1.mapper.weight"][1],
        hidden_channels=width,
        num_blocks=1 + _last(shapes, r"blocks\.(\d+)\.depthwise\.weight") // 3,
        num_heads=heads,
        text_channels=shapes["cond_mapper.0.weight"][1],
        kernel_size=shapes["blocks.0.depthwise.weight"][-1],
        dropout=float(declared.get("dropout", 0.1)),
    )


# Stage B


def _stage_b(shapes: Shapes, declared: Declared) -> StageBConfig:
    compressed = shapes["effnet_mapper.0.weight"][1]
    # The mapper's own width is four times the first level's: only an attention tells the tokens'.
    cond = next(shape[1] for key, shape in shapes.items() if key.endswith(".kv_mapper.1.weight"))
    pooled_name = "clip_txt_pooled_mapper.weight"
    pooled = shapes[pooled_name if pooled_name in shapes else "clip_mapper.weight"]
    patch = int(declared.get("patch_size", 2))
    levels = _levels(shapes, "down_blocks", declared)
    up_levels = _levels(shapes, "up_blocks", declared)
    repeats = [
        2 + _last(shapes, rf"up_repeat_mappers\.{index}\.(\d+)\.weight")
        for index in range(len(up_levels))
    ]
    return StageBConfig(
        latent_channels=shapes["embedding.1.weight"][1] // patch**2,
        patch_size=patch,
        time_channels=shapes["down_blocks.0.1.mapper.weight"][1],
        cond_channels=cond,
        hidden_channels=tuple(level.width for level in levels),
        num_heads=tuple(level.heads for level in levels),
        down_blocks=tuple(level.blocks for level in levels),
        up_blocks=tuple(level.blocks for level in up_levels),
        up_repeats=tuple(repeats),
        compressed_channels=compressed,
        text_pooled_channels=pooled[1],
        pooled_tokens=pooled[0] // cond,
        pixel_condition="pixels_mapper.0.weight" in shapes,
        kernel_size=shapes["down_blocks.0.0.depthwise.weight"][-1],
        dropout=_dropout(declared, (0.0, 0.0, *(0.1,) * len(levels))[: len(levels)]),
        time_conds=_time_conds(shapes),
    )


def _stage_b_v2(shapes: Shapes, declared: Declared) -> StageBV2Config:
    levels = _levels(shapes, "down_blocks", declared)
    patch = int(declared.get("patch_size", 2))
    mapped = [f"effnet_mappers.{level}.weight" for level in range(len(levels))]
    cond, text = shapes["clip_mapper.weight"]
    mapper = next(shapes[name] for name in mapped if name in shapes)
    return StageBV2Config(
        latent_channels=shapes["embedding.1.weight"][1] // patch**2,
        patch_size=patch,
        time_channels=shapes["down_blocks.0.1.mapper.weight"][1],
        cond_channels=cond,
        hidden_channels=tuple(level.width for level in levels),
        num_heads=tuple(level.heads for level in levels),
        num_blocks=tuple(level.blocks for level in levels),
        reads_compressed=tuple(name in shapes for name in mapped),
        compressed_channels=mapper[1],
        text_channels=text,
        kernel_size=shapes["down_blocks.0.0.depthwise.weight"][-1],
        dropout=_dropout(declared, (0.1,) * len(levels)),
    )


# The autoencoders


def _stage_a(shapes: Shapes, declared: Declared) -> StageAConfig:
    """Read the flat lists of the published VQ model: blocks, and 4x4 convolutions between them."""
    encoder, channels = _autoencoder_levels(shapes, "down_blocks")
    decoder, _ = _autoencoder_levels(shapes, "up_blocks")
    entries, latent = shapes[
        "vquantizer.embedding.weight"
        if "vquantizer.embedding.weight" in shapes
        else "vquantizer.codebook.weight"
    ]
    config = StageAConfig(
        channels=tuple(channels),
        encoder_blocks=tuple(encoder),
        decoder_blocks=tuple(decoder),
        latent_channels=latent,
        codebook_size=entries,
    )
    if "scale_factor" in declared:
        config = replace(config, scale=float(declared["scale_factor"]))
    return config


def _autoencoder_levels(shapes: Shapes, where: str) -> tuple[list[int], list[int]]:
    """Return the blocks of each level in execution order, and each level's width."""
    blocks, widths = [0], []
    for index in range(1 + _last(shapes, rf"{where}\.(\d+)\.")):
        gammas = f"{where}.{index}.gammas"
        if gammas in shapes:
            if blocks[-1] == 0:
                widths.append(shapes[f"{where}.{index}.channelwise.2.weight"][0])
            blocks[-1] += 1
        elif f"{where}.{index}.weight" in shapes:  # a convolution that halves or doubles
            blocks.append(0)
    return blocks, widths


def _compressor(shapes: Shapes) -> CompressorConfig:
    base = CompressorConfig.v2() if "mapper.1.weight" in shapes else CompressorConfig.v3()
    latent, head = shapes["mapper.0.weight"][:2]
    stem = shapes["backbone.0.0.weight"][0]
    if (latent, head, stem) != (base.latent_channels, base.head_channels, base.stem_channels) or (
        1 + _last(shapes, r"backbone\.(\d+)\.") != len(EFFICIENTNET_V2_S) + 2
    ):
        raise KeyError("the sizes of the published EfficientNetV2-S")
    return base


def _previewer(shapes: Shapes) -> PreviewerConfig:
    channels = [shapes["blocks.0.weight"][0]]
    for index in range(6, 1 + _last(shapes, r"blocks\.(\d+)\.weight"), 6):
        weight = shapes[f"blocks.{index}.weight"]
        if weight[-1] == 2:  # a transposed convolution: (in, out, 2, 2)
            channels.append(weight[1])
    return PreviewerConfig(latent_channels=shapes["blocks.0.weight"][1], channels=tuple(channels))


# ControlNet


def _controlnet(shapes: Shapes, where: str) -> ControlNetConfig:
    count = 1 + _last(shapes, r"projections\.(\d+)\.")
    # A file says how many blocks are steered, but not which.
    known = {len(blocks): blocks for blocks in (PUBLISHED_BLOCKS, ALL_BLOCKS)}
    if count not in known:
        raise UserError(
            f"{where}: a ControlNet of {count} projections does not tell which blocks they steer; "
            f"only the published ones, of {' or '.join(map(str, known))}, are known"
        )
    features = shapes["projections.0.0.weight"][1]
    out = tuple(shapes[f"projections.{index}.2.weight"][0] for index in range(count))
    base = ControlNetConfig(blocks=known[count], out_channels=out, feature_channels=features)
    if "backbone.0.0.weight" in shapes:
        if 1 + _last(shapes, r"backbone\.(\d+)\.") != len(EFFICIENTNET_V2_S) + 2:
            raise KeyError("the sizes of the published EfficientNetV2-S")
        stem, channels = shapes["backbone.0.0.weight"][:2]
        return replace(base, in_channels=channels, stem_channels=stem)
    stem, channels = shapes["backbone.0.weight"][:2]
    base = replace(base, bottleneck="large", in_channels=channels, stem_channels=stem)
    num_blocks = 1 + _last(shapes, r"backbone\.(\d+)\.blocks\.") - 3
    if num_blocks < 1:
        return replace(base, bottleneck="simple")
    width = shapes["backbone.2.weight"][0]
    return replace(base, residual_channels=width, residual_blocks=num_blocks)


# Shared


@dataclass(frozen=True)
class _Level:
    width: int
    heads: int
    blocks: int


def _levels(shapes: Shapes, way: str, declared: Declared) -> list[_Level]:
    """Read the levels of ``way`` in execution order."""
    levels = []
    count = 1 + _last(shapes, rf"{way}\.(\d+)\.")
    for level in range(count):
        pattern = re.compile(rf"{way}\.{level}\.(\d+)\.channelwise\.4\.weight")
        widths = [shapes[key][0] for key in shapes if pattern.fullmatch(key)]
        attends = any(key.startswith(f"{way}.{level}.") and ".attention." in key for key in shapes)
        number = level if way == "down_blocks" else count - 1 - level
        heads = _heads(widths[0], declared, number) if attends else 0
        levels.append(_Level(widths[0], heads, len(widths)))
    return levels


def _heads(width: int, declared: Declared, level: int) -> int:
    for name in ("num_attention_heads", "nhead"):
        heads = declared.get(name)
        if isinstance(heads, (list, tuple)) and level < len(heads):
            return int(heads[level])
    return max(1, width // HEAD_CHANNELS)


def _dropout(declared: Declared, published: tuple[float, ...]) -> tuple[float, ...]:
    """Return the dropout of each level; it matters in training alone."""
    levels = len(published)
    dropout = declared.get("dropout")
    if isinstance(dropout, (int, float)):
        return (float(dropout),) * levels
    if isinstance(dropout, (list, tuple)) and len(dropout) >= levels:
        return tuple(float(value) for value in dropout[:levels])
    return published


def _time_conds(shapes: Shapes) -> tuple[str, ...]:
    """Return the extra time conditions in the order of the file, "sca" before "crp"."""
    prefix = "down_blocks.0.1.mapper_"
    names = {key[len(prefix) :].split(".")[0] for key in shapes if key.startswith(prefix)}
    known = [name for name in ("sca", "crp") if name in names]
    return (*known, *sorted(names - set(known)))


def _last(shapes: Iterable[str], pattern: str) -> int:
    """Return the largest number that the pattern finds at the start of a name, or -1."""
    compiled = re.compile(pattern)
    found = (compiled.match(key) for key in shapes)
    return max((int(match.group(1)) for match in found if match), default=-1)


def num_parameters(shapes: Shapes) -> int:
    """Return the number of values in all tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
