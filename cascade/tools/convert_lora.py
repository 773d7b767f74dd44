"""Writes a LoRA's file by the other names: PEFT's, as diffusers does, or kohya's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from torch import nn

from cascade.adapters.lora import LowRank
from cascade.adapters.lora_files import LoraFile
from cascade.adapters.lora_names import Part
from cascade.adapters.lora_write import Naming, named, write_lora
from cascade.checkpoints.files import on_meta
from cascade.checkpoints.part_files import unet_alone
from cascade.errors import UserError
from cascade.pipelines.unet_parts import open_unet_source
from cascade.text.towers import TextTowerConfig, build_text_tower
from cascade.tools.written import check_new
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

_CLIP_L = TextTowerConfig()
_OPEN_CLIP_H = TextTowerConfig(
    channels=1024, num_layers=24, num_heads=16, mlp_channels=4096, activation="gelu"
)
_OPEN_CLIP_BIG_G = TextTowerConfig(
    channels=1280,
    num_layers=32,
    num_heads=20,
    mlp_channels=5120,
    projection_channels=1280,
    activation="gelu",
)


def convert_lora(path: Path, naming: Naming, out: Path, model: Path | None = None) -> None:
    """Write a LoRA by other names; its numbers stay as they are, to the bit.

    Args:
        path: The LoRA.
        naming: Whose names it gets.
        out: The ``.safetensors`` file to write.
        model: The model that it is for, or its U-Net alone; None: a published one, if its names
            tell which.

    Raises:
        UserError: If ``out`` is there, ``path`` is no plain LoRA, or it fits neither the model nor
            one published one alone.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: name a .safetensors file to write")
    check_new(out)
    file = LoraFile(path)
    config, updates = _fit(file, naming, model)
    write_lora(out, updates, naming, unet=config, metadata=file.told)


def _fit(
    file: LoraFile, naming: Naming, model: Path | None
) -> tuple[UNetConfig, dict[Part, dict[str, LowRank]]]:
    if model is not None:
        if (alone := unet_alone(model)) is not None:
            config = cast(UNetConfig, alone.published.config)
            with on_meta():
                unet = UNet(config)
            return config, file.fit({"unet": unet})
        parts = open_unet_source(model).load_as_stored()
        return parts.unet.config, file.fit(parts.updatable)
    found = []
    for config, networks in _published():
        try:
            found.append((config, file.fit(networks)))
        except UserError:
            continue
    if not found:
        raise UserError(f"{file.where}: fits no published U-Net; name its model with --model")
    # A student's layers may all be its teacher's as well, which kohya's names number otherwise.
    if len({frozenset(named(updates, naming, config)) for config, updates in found}) > 1:
        raise UserError(
            f"{file.where}: fits several published U-Nets, whose layers have different names "
            f"there; name its model with --model"
        )
    return found[0]


def _published() -> Iterator[tuple[UNetConfig, Mapping[Part, nn.Module]]]:
    """Yield the networks of published models, without their weights."""
    texts: dict[int, dict[Part, TextTowerConfig]] = {
        2048: {"text_encoder": _CLIP_L, "text_encoder_2": _OPEN_CLIP_BIG_G},
        1024: {"text_encoder": _OPEN_CLIP_H},
        768: {"text_encoder": _CLIP_L},
    }
    towers = {
        width: {part: build_text_tower(tower) for part, tower in own.items()}
        for width, own in texts.items()
    }
    for config in (
        UNetConfig.sdxl(),
        UNetConfig.sd15(),
        UNetConfig.sd21(),
        UNetConfig.ssd_1b(),
        UNetConfig.vega(),
        UNetConfig.koala_1b(),
        UNetConfig.koala_700m(),
        UNetConfig.bk_base(),
        UNetConfig.bk_small(),
        UNetConfig.bk_tiny(),
        UNetConfig.bk_v2_base(),
        UNetConfig.bk_v2_small(),
        UNetConfig.bk_v2_tiny(),
    ):
        with on_meta():
            unet = UNet(config)
        yield config, {"unet": unet, **towers[config.text_channels]}
