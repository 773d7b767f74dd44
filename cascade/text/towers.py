"""One tower of a CLIP into transformers' model, strictly: nothing missing, nothing left over."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

OTHER_THAN_TEXT = ("vision_model.", "visual_projection.", "logit_scale")
OTHER_THAN_PICTURES = ("text_model.", "text_projection.", "logit_scale")
"""Beginnings of the keys that are not a tower's, in a file of both."""


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
