"""What a plan's picture and control became in latent space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cascade.checkpoints.load import load_any
from cascade.control import Maps, control_kind, control_maps, control_signal
from cascade.errors import UserError
from cascade.pipelines.control_input import ControlTask
from cascade.pipelines.loaded import LoadedCascade
from cascade.pipelines.picture_input import PictureTask
from cascade.pipelines.plan import Plan
from cascade.pipelines.sampling import Shown, Start
from stages.controlnet import ControlNet
from stages.stage_c import StageC


@dataclass(frozen=True)
class Given:
    """The same for all pictures of a plan."""

    shown: Shown
    """What Stage C is shown beside the prompts."""
    stage_c: Start | None = None
    """Where Stage C starts."""
    stage_b: Start | None = None
    """Where Stage B starts: only with a mask, whose other side it keeps."""
    reconstructed: Tensor | None = None
    """``(1, 16, h, w)``: a picture's latents, in place of what Stage C would draw."""
    picture: PictureTask | None = None
    """With a mask: what is kept of the picture is laid over the result."""

    def pasted(self, pixels: Tensor) -> Tensor:
        """Lay the kept pixels over ``(B, 3, H, W)``: Stage A gives nearly them, these are exact."""
        if self.picture is None or self.picture.mask is None:
            return pixels
        return torch.where(self.picture.mask > 0.5, pixels, self.picture.pixels)


@torch.inference_mode()
def read_given(cascade: LoadedCascade, plan: Plan) -> Given:
    """Run what a plan's picture and control need once: encoders and the ControlNet.

    Raises:
        UserError: If the cascade lacks a network for it, or the ControlNet does not fit.
    """
    size = cascade.spec.stage_c_size((plan.height, plan.width))
    control = None
    if plan.control is not None:
        dtype = cascade.dtypes.stage_c
        control = _read_control(
            plan.control, cascade.stage_c, size, cascade.device, dtype, cascade.encode_picture
        )
    picture = plan.picture
    if picture is None:
        return Given(Shown(control=control))
    if picture.mode == "variation":
        embeds = cascade.embed_picture(picture.pixels)
        return Given(Shown(image=embeds, control=control))
    latents = cascade.encode_picture(picture.pixels)
    if picture.mode == "reconstruct":
        return Given(Shown(), reconstructed=latents)
    start_c = Start(latents, picture.strength, picture.kept(size))
    if picture.mask is None:
        return Given(Shown(control=control), stage_c=start_c)
    shape = cascade.latent_shape(plan.height, plan.width, latents)
    stage_a_latents = cascade.encode_stage_a(picture.pixels)
    if stage_a_latents.shape[1:] != shape:
        raise UserError(
            "masks need Stage A's latents to follow the picture's size; in the dialect of "
            "diffusers they do not: use the official dialect"
        )
    return Given(
        Shown(control=control),
        stage_c=start_c,
        stage_b=Start(stage_a_latents, kept=picture.kept((shape[1], shape[2]))),
        picture=picture,
    )


def _read_control(
    task: ControlTask,
    stage_c: nn.Module,
    latent_size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    encode: Callable[[Tensor], Tensor],
) -> tuple[Maps, Maps]:
    """Load a ControlNet and run it on its picture.

    Args:
        task: The control.
        stage_c: The network that it is to lead.
        latent_size: Height and width of Stage C's latents.
        device: Where to run it.
        dtype: Number format.
        encode: Compresses pictures, for super-resolution.

    Returns:
        ``StageCCondition.control`` of the conditional and the unconditional half, one picture each.

    Raises:
        UserError: If the file is no ControlNet, or does not fit this Stage C.
    """
    loaded = load_any(task.network, expect=("controlnet",), device=device, dtype=dtype)
    if len(loaded) != 1:
        raise UserError(f"{task.network}: {len(loaded)} ControlNets in it; name the file of one")
    network = loaded[0][1]
    assert isinstance(network, ControlNet), "load_any was told to expect one"
    if not isinstance(stage_c, StageC):
        raise UserError(f"{task.network}: ControlNets are for Stable Cascade's Stage C (v3)")
    widths = stage_c.config.block_channels
    for block, channels in zip(network.config.blocks, network.config.out_channels, strict=True):
        if block >= len(widths) or widths[block] != channels:
            has = f"{widths[block]} channels" if block < len(widths) else f"{len(widths)} blocks"
            raise UserError(
                f"{task.network}: made for a Stage C with {channels} channels in block {block}, "
                f"but this one has {has}; published ones are for the full Stage C, not the lite one"
            )
    pixels = task.pixels.to(device)
    if control_kind(network.config) == "super_resolution":
        half = tuple(side // 2 for side in pixels.shape[-2:])
        pixels = nn.functional.interpolate(pixels, size=half, mode="bilinear", antialias=True)
    mask = None if task.mask is None else task.mask.to(device)
    signal = control_signal(network.config, pixels, latent_size, mask=mask, encode=encode)
    return control_maps(network, signal.to(dtype), task.strength)
