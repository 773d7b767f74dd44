"""CLIP's text towers in single files of SD and SDXL: their shape, and OpenCLIP's names.

"Ours" are transformers' published names, with ``text_model.`` before them (SD 1.x, and SDXL's
first), or without it, as its newer versions write them; "original" are OpenCLIP's (SD 2.x, and
SDXL's second), which join query, key and value and turn the projection.

No tensor tells the width of heads, which is 64 in all of them, and the activation: OpenAI's CLIP,
which is 768 wide, was trained with a fast approximation of GELU, OpenCLIP's with GELU itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from torch import Tensor

from cascade.checkpoints.weight_map import (
    Link,
    State,
    Table,
    layer,
    same,
    to_ours,
    to_theirs,
)
from cascade.errors import UserError
from cascade.text.towers import HEAD_CHANNELS, TEXT_PREFIX, TextTowerConfig

Shapes = Mapping[str, tuple[int, ...]]

_TOKENS = "embeddings.token_embedding.weight"
_ORIGINAL_TOKENS = "token_embedding.weight"
_ATTENTION = ("q_proj", "k_proj", "v_proj")


def text_layout(shapes: Shapes) -> Literal["ours", "original"] | None:
    """Tell whose names a text tower's tensors have: "ours", "original"; None: no text tower's."""
    if any(name.startswith(("vision_model.", "visual.")) for name in shapes):
        return None  # a whole CLIP
    if TEXT_PREFIX + _TOKENS in shapes or _TOKENS in shapes:
        return "ours"
    original = _ORIGINAL_TOKENS in shapes and "positional_embedding" in shapes
    return "original" if original else None


def text_config(shapes: Shapes, where: str) -> TextTowerConfig:
    """Read the shape of a text tower, in either layout.

    Raises:
        UserError: If a part of it is missing.
    """
    original = text_layout(shapes) == "original"
    names = (
        (_ORIGINAL_TOKENS, "positional_embedding", "transformer.resblocks.{}.mlp.c_fc.weight")
        if original
        else (
            TEXT_PREFIX + _TOKENS,
            f"{TEXT_PREFIX}embeddings.position_embedding.weight",
            f"{TEXT_PREFIX}encoder.layers.{{}}.mlp.fc1.weight",
        )
    )
    if not original:
        shapes = {_prefixed(name): shape for name, shape in shapes.items()}
    tokens, positions, middle = names
    pattern = re.compile(re.escape(middle).replace(r"\{\}", r"(\d+)"))
    layers = [int(match[1]) for match in map(pattern.match, shapes) if match]
    try:
        vocab, width = shapes[tokens]
        projection = shapes.get("text_projection" if original else "text_projection.weight")
        return TextTowerConfig(
            channels=width,
            num_layers=1 + max(layers, default=-1),
            num_heads=max(1, width // HEAD_CHANNELS),
            mlp_channels=shapes[middle.format(0)][0],
            vocab_size=vocab,
            window=shapes[positions][0],
            projection_channels=None if projection is None else projection[original],
            activation="gelu" if original else "quick_gelu",
            end_token=vocab - 1,
        )
    except KeyError as error:
        raise UserError(f"{where}: a text encoder that lacks {error}; download it again") from error


def text_from_transformers(state: State) -> dict[str, Tensor]:
    """Give transformers' names, with or without the prefix, the prefix; drop what is no weight."""
    return {_prefixed(name): state[name] for name in state if not name.endswith("position_ids")}


def text_from_original(state: State, config: TextTowerConfig) -> dict[str, Tensor]:
    """Rename OpenCLIP's weights, without a single file's prefix, to transformers'; strict."""
    return to_ours(state, _original(config))


def text_to_original(state: State, config: TextTowerConfig) -> dict[str, Tensor]:
    """Rename transformers' weights to OpenCLIP's; strict, and the inverse of the above."""
    return to_theirs(state, _original(config))


def _prefixed(name: str) -> str:
    bare = name.startswith((TEXT_PREFIX, "text_projection."))
    return name if bare else TEXT_PREFIX + name


def _original(config: TextTowerConfig) -> Table:
    yield same(TEXT_PREFIX + _TOKENS, _ORIGINAL_TOKENS)
    yield same(f"{TEXT_PREFIX}embeddings.position_embedding.weight", "positional_embedding")
    for number in range(config.num_layers):
        ours = f"{TEXT_PREFIX}encoder.layers.{number}"
        yield from _layer(ours, f"transformer.resblocks.{number}")
    yield from layer(f"{TEXT_PREFIX}final_layer_norm", "ln_final")
    if config.projection_channels is not None:
        yield Link(("text_projection.weight",), ("text_projection",), transposed=True)


def _layer(ours: str, theirs: str) -> Iterator[Link]:
    for name in ("weight", "bias"):
        joined = tuple(f"{ours}.self_attn.{part}.{name}" for part in _ATTENTION)
        yield Link(joined, (f"{theirs}.attn.in_proj_{name}",), our_parts=(1, 1, 1))
    yield from layer(f"{ours}.self_attn.out_proj", f"{theirs}.attn.out_proj")
    yield from layer(f"{ours}.layer_norm1", f"{theirs}.ln_1")
    yield from layer(f"{ours}.layer_norm2", f"{theirs}.ln_2")
    yield from layer(f"{ours}.mlp.fc1", f"{theirs}.mlp.c_fc")
    yield from layer(f"{ours}.mlp.fc2", f"{theirs}.mlp.c_proj")
