"""The shape of a U-Net or of its autoencoder, read from its tensors' names and shapes.

Depths, widths and what is missing can be read, of teachers and of any student. What can't:

- the number of attention heads: SD 1.x, whose transformers are entered by convolutions, has 8 at
  every level; all others have heads of 64;
- the groups of the norms: 32 in all published networks;
- where the pooled text ends and the six sizes begin: 256 values a size in SDXL and its students;
- the autoencoder's scale and shift, which no tensor tells: SD's and SDXL's are the same network;
- what a U-Net predicts, epsilon or v, which is no part of its configuration.

A ``config.json`` beside the file says these, and is believed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.unet.config import NUM_SIZES, Depths, UNetConfig

Shapes = Mapping[str, tuple[int, ...]]
Declared = Mapping[str, Any]
"""A diffusers ``config.json``."""

HEAD_CHANNELS = 64
SD1_HEADS = 8
NORM_GROUPS = 32
SIZE_CHANNELS = 256
_REFINER_CHANNELS = 384


@dataclass(frozen=True)
class _Structure:
    """What differs between the layouts: where layers are."""

    channels: tuple[int, ...]
    down_depths: Depths
    mid_depth: int | None
    up_depths: Depths


def unet_layout(shapes: Shapes) -> Literal["ours", "original"] | None:
    """Tell whose names a U-Net's tensors have; ours are those of diffusers. None: no U-Net's."""
    if "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes:
        return "original"
    if "conv_in.weight" in shapes and "time_embedding.linear_1.weight" in shapes:
        return "ours"
    return None


def unet_config(shapes: Shapes, where: str, declared: Declared | None = None) -> UNetConfig:
    """Read the shape of a U-Net, teacher or student, in either layout.

    Args:
        shapes: Shape of each tensor by name, without a single file's prefix.
        where: Name of the file, for errors.
        declared: The ``config.json`` beside the file, if there is one.

    Raises:
        UserError: If the tensors are no U-Net's, or of one that is not known here.
    """
    declared = declared or {}
    original = unet_layout(shapes) == "original"
    if unet_layout(shapes) is None:
        first = ", ".join(sorted(shapes)[:5]) or "none at all"
        raise UserError(f"{where}: no U-Net of SD or SDXL; its first tensors: {first}")
    try:
        found = _original(shapes) if original else _ours(shapes)
        return _config(shapes, found, original, declared)
    except KeyError as error:
        raise UserError(f"{where}: a U-Net that lacks {error}; download it again") from error
    except ValueError as error:  # shapes of which no configuration can be made
        raise UserError(f"{where}: a U-Net that is not known here: {error}") from error


def _config(shapes: Shapes, found: _Structure, original: bool, declared: Declared) -> UNetConfig:
    start, end = ("input_blocks.0.0", "out.2") if original else ("conv_in", "conv_out")
    added = shapes.get("label_emb.0.0.weight" if original else "add_embedding.linear_1.weight")
    entries = [shape for key, shape in shapes.items() if key.endswith(".proj_in.weight")]
    texts = [shape[1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight")]
    if not entries or not texts:
        raise KeyError("attention")
    linear = len(entries[0]) == 2
    size_channels = int(declared.get("addition_time_embed_dim") or SIZE_CHANNELS)
    if found.channels[0] == _REFINER_CHANNELS:
        raise ValueError("SDXL's refiner is told other sizes than SDXL")
    if added is not None and added[1] <= NUM_SIZES * size_channels:
        raise ValueError(f"{added[1]} values of pooled text and {NUM_SIZES} sizes are too few")
    return UNetConfig(
        in_channels=shapes[f"{start}.weight"][1],
        out_channels=shapes[f"{end}.weight"][0],
        channels=found.channels,
        num_heads=_heads(found.channels, linear, declared),
        down_depths=found.down_depths,
        mid_depth=found.mid_depth,
        up_depths=found.up_depths,
        text_channels=texts[0],
        text_pooled_channels=None if added is None else added[1] - NUM_SIZES * size_channels,
        size_channels=None if added is None else size_channels,
        linear_projection=linear,
        norm_groups=int(declared.get("norm_num_groups") or NORM_GROUPS),
    )


def _heads(channels: tuple[int, ...], linear: bool, declared: Declared) -> tuple[int, ...]:
    # attention_head_dim is the number of heads: the name is a slip that published files keep.
    heads = declared.get("num_attention_heads") or declared.get("attention_head_dim")
    if isinstance(heads, int):
        return (heads,) * len(channels)
    if isinstance(heads, (list, tuple)) and len(heads) == len(channels):
        return tuple(int(value) for value in heads)
    if linear:
        return tuple(max(1, width // HEAD_CHANNELS) for width in channels)
    return (SD1_HEADS,) * len(channels)


def _ours(shapes: Shapes) -> _Structure:
    levels = _count(shapes, r"down_blocks\.(\d+)\.")
    middle = _depth(shapes, "mid_block.attentions.0")
    return _Structure(
        channels=tuple(
            shapes[f"down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(levels)
        ),
        down_depths=tuple(_block(shapes, f"down_blocks.{level}") for level in range(levels)),
        mid_depth=middle if "mid_block.resnets.0.conv1.weight" in shapes else None,
        up_depths=tuple(
            _block(shapes, f"up_blocks.{index}")
            for index in range(_count(shapes, r"up_blocks\.(\d+)\."))
        ),
    )


def _block(shapes: Shapes, where: str) -> tuple[int, ...]:
    layers = _count(shapes, rf"{re.escape(where)}\.resnets\.(\d+)\.")
    return tuple(_depth(shapes, f"{where}.attentions.{layer}") for layer in range(layers))


def _original(shapes: Shapes) -> _Structure:
    down: list[list[int]] = [[]]
    channels = []
    for number in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        entry = f"input_blocks.{number}"
        if f"{entry}.0.op.weight" in shapes:
            down.append([])
            continue
        if not down[-1]:
            channels.append(shapes[f"{entry}.0.out_layers.3.weight"][0])
        down[-1].append(_depth(shapes, f"{entry}.1"))
    up: list[list[int]] = [[]]
    for number in range(_count(shapes, r"output_blocks\.(\d+)\.")):
        entry = f"output_blocks.{number}"
        up[-1].append(_depth(shapes, f"{entry}.1"))
        if any(f"{entry}.{part}.conv.weight" in shapes for part in (1, 2)):
            up.append([])
    middle = _depth(shapes, "middle_block.1")
    return _Structure(
        channels=tuple(channels),
        down_depths=tuple(map(tuple, down)),
        mid_depth=middle if "middle_block.0.in_layers.2.weight" in shapes else None,
        up_depths=tuple(map(tuple, up)),
    )


def _depth(shapes: Shapes, stack: str) -> int:
    return _count(shapes, rf"{re.escape(stack)}\.transformer_blocks\.(\d+)\.")


def _count(shapes: Shapes, pattern: str) -> int:
    """Return how many there are of what the pattern numbers, at the start of a name."""
    compiled = re.compile(pattern)
    found = (compiled.match(name) for name in shapes)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


# The autoencoder


def autoencoder_kl_layout(shapes: Shapes) -> Literal["ours", "diffusers", "original"] | None:
    """Tell whose names an AutoencoderKL's tensors have; "diffusers" are those of its first years.

    None: no AutoencoderKL's.
    """
    if "encoder.conv_in.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        return None
    if "decoder.mid.block_1.conv1.weight" in shapes:
        return "original"
    if "decoder.mid_block.resnets.0.conv1.weight" not in shapes:
        return None
    return "diffusers" if "decoder.mid_block.attentions.0.query.weight" in shapes else "ours"


def autoencoder_kl_config(
    shapes: Shapes, where: str, declared: Declared | None = None, scale: float | None = None
) -> AutoencoderKLConfig:
    """Read the shape of an autoencoder, in either layout.

    Args:
        shapes: Shape of each tensor by name, without a single file's prefix.
        where: Name of the file, for errors.
        declared: The ``config.json`` beside the file, if there is one.
        scale: What its latents are multiplied by, where nothing is declared.

    Raises:
        UserError: If the tensors are no AutoencoderKL's, or if nobody says its scale.
    """
    declared = declared or {}
    original = "decoder.mid.block_1.conv1.weight" in shapes
    level = r"encoder\.down\.(\d+)\." if original else r"encoder\.down_blocks\.(\d+)\."
    scale = scale if scale is not None else declared.get("scaling_factor")
    if scale is None and declared.get("_class_name") == "AutoencoderKL":
        scale = AutoencoderKLConfig.sd().scale  # diffusers' own default, which SD's leave out
    if scale is None:
        raise UserError(
            f"{where}: no tensor tells an autoencoder's scale; give it: "
            f"{AutoencoderKLConfig.sd().scale} for SD, {AutoencoderKLConfig.sdxl().scale} for SDXL"
        )
    names = ("down.{}.block", "block") if original else ("down_blocks.{}.resnets", "resnets")
    try:
        widths = [
            shapes[f"encoder.{names[0].format(number)}.0.conv2.weight"][0]
            for number in range(_count(shapes, level))
        ]
        return AutoencoderKLConfig(
            channels=tuple(widths),
            blocks_per_level=_count(shapes, rf"{level.replace('(', '(?:')}{names[1]}\.(\d+)\."),
            latent_channels=shapes["decoder.conv_in.weight"][1],
            quant_convs="quant_conv.weight" in shapes,
            norm_groups=int(declared.get("norm_num_groups") or NORM_GROUPS),
            scale=float(scale),
            shift=float(declared.get("shift_factor") or 0.0),
        )
    except KeyError as error:
        raise UserError(f"{where}: no AutoencoderKL: it lacks {error}") from error
    except ValueError as error:
        raise UserError(f"{where}: an autoencoder that is not known here: {error}") from error
