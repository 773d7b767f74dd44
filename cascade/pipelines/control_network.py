"""A ControlNet's file, and the maps that it makes of its picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cascade.checkpoints.load import identify, load_any
from cascade.checkpoints.readers import open_weights
from cascade.control import Maps, control_kind, control_maps, control_signal
from cascade.errors import UserError
from cascade.pipelines.control_input import ControlTask
from cascade.pipelines.offload import Memory
from stages.controlnet import ControlNet, ControlNetConfig
from stages.stage_c import StageC


def control_config(task: ControlTask, stage_c: nn.Module) -> ControlNetConfig:
    """Return the sizes of a control's network; of its file only the header is read.

    Raises:
        UserError: If the file is no ControlNet, or does not fit this Stage C.
    """
    found = [identify(opened) for opened in open_weights(task.network)]
    for published in found:
        if published.kind != "controlnet":
            raise UserError(f"{task.network}: holds a {published.kind}, but controlnet is needed")
    if len(found) != 1:
        raise UserError(f"{task.network}: {len(found)} ControlNets in it; name the file of one")
    config = found[0].config
    assert isinstance(config, ControlNetConfig), "its kind says so"
    if not isinstance(stage_c, StageC):
        raise UserError(f"{task.network}: ControlNets are for Stable Cascade's Stage C (v3)")
    control_kind(config)
    widths = stage_c.config.block_channels
    for block, channels in zip(config.blocks, config.out_channels, strict=True):
        if block >= len(widths) or widths[block] != channels:
            has = f"{widths[block]} channels" if block < len(widths) else f"{len(widths)} blocks"
            raise UserError(
                f"{task.network}: made for a Stage C with {channels} channels in block {block}, "
                f"but this one has {has}; published ones are for the full Stage C, not the lite one"
            )
    return config


def small_size(height: int, width: int) -> tuple[int, int]:
    """Return the size of the picture that super-resolution begins with."""
    return height // 2, width // 2


def read_control(
    task: ControlTask,
    stage_c: nn.Module,
    latent_size: tuple[int, int],
    memory: Memory,
    dtype: torch.dtype,
    encode: Callable[[Tensor], Tensor],
) -> tuple[Maps, Maps]:
    """Load a ControlNet, run it on its picture, and let it go.

    Args:
        task: The control.
        stage_c: The network that it is to lead.
        latent_size: Height and width of Stage C's latents.
        memory: Has it on the device while it runs.
        dtype: Number format.
        encode: Compresses pictures, for super-resolution.

    Returns:
        ``StageCCondition.control`` of the conditional and the unconditional half, one picture each.

    Raises:
        UserError: If the file is no ControlNet, or does not fit this Stage C.
    """
    config = control_config(task, stage_c)
    pixels = task.pixels.to(memory.device)
    if control_kind(config) == "super_resolution":
        size = small_size(*pixels.shape[-2:])
        pixels = nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    mask = None if task.mask is None else task.mask.to(memory.device)
    signal = control_signal(config, pixels, latent_size, mask=mask, encode=encode).to(dtype)
    home = memory.home("controlnet")
    [(_, network)] = load_any(task.network, expect=("controlnet",), device=home, dtype=dtype)
    assert isinstance(network, ControlNet), "load_any was told to expect one"
    with memory.guest("controlnet", network), memory.on("controlnet"):
        return control_maps(network, signal, task.strength)
