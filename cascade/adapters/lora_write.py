"""Writes LoRAs by PEFT's names, as diffusers does, or by kohya's, as ComfyUI and others read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from cascade.adapters.lora import DEFAULT, LowRank, Updates, adapter_of
from cascade.adapters.lora_metadata import METADATA_KEY, settings_of
from cascade.adapters.lora_names import PARTS, Part, flat, kohya_prefix, published_path
from cascade.checkpoints.files import atomic_path, finite_in
from cascade.checkpoints.unet import unet_original_layers
from cascade.checkpoints.written_tensors import save_tensors
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

Naming = Literal["peft", "kohya"]
NAMINGS: tuple[Naming, ...] = ("peft", "kohya")


def save_lora(
    path: str | Path,
    networks: Mapping[Part, nn.Module],
    *,
    name: str = DEFAULT,
    naming: Naming = "peft",
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter that is attached to networks to one file.

    Args:
        path: The ``.safetensors`` file.
        networks: The U-Net and the text encoders' models that have the adapter; for kohya's names
            of a text encoder alone, see ``write_lora``.
        name: The adapter's.
        naming: Whose names its tensors get.
        dtype: Number format; None: float32, as they are trained.
        metadata: More metadata, all strings.

    Raises:
        ValueError: If a network has no such adapter.
        UserError: If it can't be written, or a number is not finite in ``dtype``.
    """
    updates = {part: adapter_of(network, name).updates() for part, network in networks.items()}
    unet = networks.get("unet")
    config = unet.config if isinstance(unet, UNet) else None
    write_lora(path, updates, naming, unet=config, dtype=dtype, metadata=metadata)


def write_lora(
    path: str | Path,
    updates: Mapping[Part, Updates],
    naming: Naming,
    *,
    unet: UNetConfig | None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write updates of a model's networks to one file.

    Args:
        path: The ``.safetensors`` file.
        updates: By network, and by the path of the layer.
        naming: Whose names: kohya's are, for SDXL and its students, made of the original layout's
            paths, as kohya's own scripts do.
        unet: Sizes of the U-Net; None: only text encoders are updated, numbered if there are two.
        dtype: Number format; None keeps each tensor's own.
        metadata: More metadata, all strings.

    Raises:
        UserError: If it can't be written, or a number is not finite in ``dtype``.
    """
    path = Path(path)
    tensors = named(updates, naming, unet)
    cast = {
        key: finite_in(one, None if key.endswith(".alpha") else dtype, f"{path}, {key}")
        .detach()
        .cpu()
        .contiguous()
        .clone()
        for key, one in tensors.items()
    }
    said = {"format": "pt", **(metadata or {})}
    if naming == "peft":
        said[METADATA_KEY] = settings_of(updates)
    with atomic_path(path) as temporary:
        save_tensors(cast, temporary, said)


def named(
    updates: Mapping[Part, Updates], naming: Naming, unet: UNetConfig | None
) -> dict[str, Tensor]:
    """Return the tensors of a file; the arguments are those of ``write_lora``."""
    return peft_tensors(updates) if naming == "peft" else kohya_tensors(updates, unet)


def peft_tensors(updates: Mapping[Part, Updates]) -> dict[str, Tensor]:
    """Name the tensors as diffusers does; alphas have no place among them."""
    tensors = {}
    for part, layer, update in _walk(updates):
        tensors[f"{part}.{layer}.lora_A.weight"] = update.down
        tensors[f"{part}.{layer}.lora_B.weight"] = update.up
    return tensors


def kohya_tensors(updates: Mapping[Part, Updates], unet: UNetConfig | None) -> dict[str, Tensor]:
    """Name the tensors as kohya's scripts do; see ``write_lora``."""
    assert unet is not None or not updates.get("unet"), "the U-Net's names depend on its sizes"
    is_sdxl = unet is not None and unet.text_pooled_channels is not None
    original = unet_original_layers(unet) if unet is not None and is_sdxl else {}
    tensors = {}
    for part, layer, update in _walk(updates):
        own = original.get(layer, layer) if part == "unet" else layer
        name = kohya_prefix(part, is_sdxl or "text_encoder_2" in updates) + flat(own)
        tensors[f"{name}.lora_down.weight"] = update.down
        tensors[f"{name}.lora_up.weight"] = update.up
        alpha = torch.tensor(float(update.alpha), dtype=torch.float64)
        # float32 as kohya's, unless that would round it.
        tensors[f"{name}.alpha"] = alpha.float() if float(alpha.float()) == alpha else alpha
    return tensors


def _walk(updates: Mapping[Part, Updates]) -> list[tuple[Part, str, LowRank]]:
    """Return each layer's update with the path that files have."""
    return [
        (part, published_path(part, path), update)
        for part in PARTS
        for path, update in updates.get(part, {}).items()
    ]
