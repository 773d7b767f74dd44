"""What a plan's picture and control became in latent space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.errors import UserError
from cascade.pipelines.control_network import read_control
from cascade.pipelines.loaded import LoadedCascade
from cascade.pipelines.picture_input import PictureTask
from cascade.pipelines.plan import Plan
from cascade.pipelines.sampling import Shown, Start


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
        control = read_control(
            plan.control, cascade.stage_c, size, cascade.memory, dtype, cascade.encode_picture
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
