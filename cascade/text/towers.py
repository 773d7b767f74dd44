"""One tower of a CLIP into transformers' model, strictly: nothing missing, nothing left over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

TEXT_PREFIX = "text_model."
"""What published names of a text tower begin with."""
HEAD_CHANNELS = 64
"""Width of an attention head in every published text tower."""
OTHER_THAN_TEXT = ("vision_model.", "visual_projection.", "logit_scale")
OTHER_THAN_PICTURES = ("text_model.", "text_projection.", "logit_scale")
"""Beginnings of the keys that are not a tower's, in a file of both."""


@dataclass(frozen=True)
class TextTowerConfig:
    """Sizes of a CLIP's text tower; the defaults are OpenAI's ViT-L/14 (123,060,480 parameters)."""

    channels: int = 768
    """Width of the states."""
    num_layers: int = 12
    """Transformer layers."""
    num_heads: int = 12
    """Attention heads."""
    mlp_channels: int = 3072
    """Width inside of the MLPs."""
    vocab_size: int = 49408
    """Tokens."""
    window: int = 77
    """Positions."""
    projection_channels: int | None = None
    """Width of the projected pooled state; None: there is no projection."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the MLPs: OpenAI's approximation, or OpenCLIP's GELU."""
    end_token: int = 49407
    """Token that ends a prompt, at which the pooled state is taken."""

    @classmethod
    def of_transformers(cls, model: Any) -> TextTowerConfig:
        """Return the sizes of a tower that transformers built.

        Raises:
            ValueError: If its activation is neither.
        """
        config = model.config
        activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
        if config.hidden_act == "gelu":
            activation = "gelu"
        elif config.hidden_act != "quick_gelu":
            raise ValueError(f"a text encoder with {config.hidden_act}: gelu or quick_gelu")
        # 2 is transformers' mark of an early export, which pools at the highest token.
        early = config.eos_token_id == 2
        return cls(
            channels=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_channels=config.intermediate_size,
            vocab_size=config.vocab_size,
            window=config.max_position_embeddings,
            projection_channels=(
                config.projection_dim if hasattr(model, "text_projection") else None
            ),
            activation=activation,
            end_token=config.vocab_size - 1 if early else config.eos_token_id,
        )


def build_text_tower(config: TextTowerConfig) -> nn.Module:
    """Build transformers' text model of these sizes on the meta device."""
    # transformers takes seconds to import as a whole; these modules are enough.
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    from cascade.checkpoints.files import on_meta

    values = CLIPTextConfig(
        hidden_size=config.channels,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_channels,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.window,
        projection_dim=config.projection_channels or config.channels,
        hidden_act=config.activation,
        bos_token_id=config.end_token - 1,
        eos_token_id=config.end_token,
        pad_token_id=config.end_token,
    )
    values._attn_implementation = "sdpa"
    projects = config.projection_channels is not None
    with on_meta():
        return (CLIPTextModelWithProjection if projects else CLIPTextModel)(values)


def read_tower(
    folder: Path, others: tuple[str, ...], device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Read a tower's weights out of the folder of a CLIP or of that tower alone.

    Args:
        folder: Weights in one file, or in shards with an index.
        others: Beginnings of the keys to leave out.
        device: Where the weights go.
        dtype: Number format; None keeps the file's.

    Raises:
        UserError: If the weights are missing or broken.
    """
    from cascade.checkpoints.readers import open_weights

    [opened] = open_weights(folder)
    tensors = opened.tensors.moved(device, dtype)
    return {
        key: tensors[key]
        for key in tensors
        if not key.startswith(others) and not key.endswith("position_ids")
    }


def fill_tower(
    model: nn.Module,
    state: dict[str, Tensor],
    where: str,
    device: str | torch.device,
    prefix: str,
) -> None:
    """Fill a tower that was built on the meta device.

    Args:
        model: The tower.
        state: Its weights.
        where: For messages.
        device: Where the weights are.
        prefix: What published keys begin with, and transformers' own do or do not by its version.

    Raises:
        UserError: Naming the first missing, unexpected and misshapen keys.
    """
    from cascade.checkpoints.files import assign_strictly

    own = set(model.state_dict())
    if not own & set(state):
        if all(prefix + key in own for key in state):
            state = {prefix + key: value for key, value in state.items()}
        elif all(key.removeprefix(prefix) in own for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    assign_strictly(model, state, where)
    # Position ids are no weights: transformers makes them in the constructor, here on meta.
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                assert name == "position_ids", f"unknown buffer {name} in the tower"
                ids = torch.arange(buffer.shape[-1], device=device).view(buffer.shape)
                module.register_buffer(name, ids, persistent=False)
