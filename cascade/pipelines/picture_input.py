"""A picture that the user gives, and what is to be done with it, at a size that the model makes.

References: Stable Cascade's notebooks (reconstruction, variation, image-to-image); Meng et al.,
2022, SDEdit, arXiv:2108.01073 (strength); Lugmayr et al., 2022, RePaint, arXiv:2201.09865 (masks).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from cascade.config import not_among
from cascade.errors import UserError
from cascade.images import flatten, image_to_pixels, pixels_to_images
from cascade.pipelines.sizes import Sized, fit_size, is_far

Mode = Literal["img2img", "variation", "inpaint", "outpaint", "reconstruct"]
MODES: tuple[Mode, ...] = get_args(Mode)
NEEDS_PROMPT: tuple[Mode, ...] = ("img2img", "inpaint", "outpaint")
STRENGTHS: dict[Mode, float] = {"img2img": 0.8, "inpaint": 1.0, "outpaint": 1.0}
"""Default strengths of the modes that have one; 0.8 as in Stable Cascade's notebook."""


@dataclass(frozen=True)
class PictureInput:
    """What the user gives."""

    image: Image.Image
    """The picture, of any size and mode."""
    mode: Mode = "img2img"
    """``img2img``: noise its Stage C latents and denoise them by the prompt. ``variation``: only
    its CLIP embedding is told. ``inpaint``: draw its masked part anew. ``outpaint``: draw what is
    around it. ``reconstruct``: compress it and bring it back."""
    mask: Image.Image | None = None
    """For ``inpaint``, as large as the picture: white is drawn anew, black is kept."""
    strength: float | None = None
    """Diffusion time in (0, 1] at which sampling starts: 1 starts from noise. Of a U-Net the share
    of its steps that are walked, rounded down. None is the mode's own."""


@dataclass(frozen=True)
class PictureTask:
    """A picture ready to work with, at the plan's size."""

    mode: Mode
    pixels: Tensor
    """``(1, 3, H, W)`` float32 in [0, 1]; for a variation at the picture's own size. Where all of
    a hole is drawn anew, it is filled in with what is around it: nothing hidden shines through."""
    mask: Tensor | None
    """``(1, 1, H, W)`` float32: 1 is drawn anew, 0 is kept."""
    strength: float
    """In (0, 1]."""

    def kept(self, size: tuple[int, int]) -> Tensor | None:
        """Return ``(1, 1, h, w)``: 1 for latent cells that hold no pixel to draw anew, else 0."""
        if self.mask is None:
            return None
        return 1.0 - F.adaptive_max_pool2d(self.mask, size)


def fit_picture(
    spec: Sized, given: PictureInput, width: int | None, height: int | None
) -> tuple[PictureTask, int, int, list[str]]:
    """Bring a picture to a size that the model makes.

    Without a width and height the picture keeps its size if the model makes it and was trained near
    it, and else is scaled to about the model's own area. It is cut at the middle where the ratio of
    its sides is another. For outpainting width and height are those of the whole.

    Returns:
        The task; width and height in pixels; notices of what was changed.

    Raises:
        UserError: For a mode, mask, strength or size that makes no sense.
    """
    _check(given)
    strength = STRENGTHS.get(given.mode, 1.0) if given.strength is None else float(given.strength)
    if given.mode == "variation":
        fitted_width, fitted_height, notices = fit_size(spec, width, height)
        pixels = image_to_pixels(given.image)[None]
        return PictureTask("variation", pixels, None, 1.0), fitted_width, fitted_height, notices
    if given.mode == "outpaint":
        return _on_canvas(spec, given.image, strength, width, height)
    own = given.image.size
    if width is None and height is None:
        width, height = _near_size(spec, *own)
        notices = []
    else:
        width, height, notices = fit_size(spec, width, height)
    image, mask = given.image, given.mask
    if mask is not None and strength == 1:  # before scaling, which would spread what is hidden
        filled = _filled(image_to_pixels(image)[None], 1.0 - _hole(mask))
        image = pixels_to_images(filled)[0]
    if own != (width, height):
        notices.append(f"the picture is scaled and cut from {own[0]}x{own[1]} to {width}x{height}")
        image = ImageOps.fit(flatten(image), (width, height), Image.Resampling.LANCZOS)
    hole = None
    if mask is not None:
        hole = _cut(_hole(mask), (height, width))
        if not bool(hole.any()):
            raise UserError(
                f"nothing white of the mask is left when it is cut to {width}x{height}: name a "
                "width and height of the picture's own ratio"
            )
        if bool(hole.all()):
            notices.append("the mask covers the whole picture: nothing of it is kept")
    task = PictureTask(given.mode, image_to_pixels(image)[None], hole, strength)
    return task, width, height, notices


def fingerprint(*tensors: Tensor | None) -> str:
    """Return 12 hex digits of a picture and its mask, by which a PNG knows what it was made of."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.mul(255).round().to(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _check(given: PictureInput) -> None:
    if given.mode not in MODES:
        raise not_among("mode", given.mode, MODES)
    if given.mode == "inpaint":
        if given.mask is None:
            raise UserError("inpainting needs a mask beside the picture: white is drawn anew")
        if given.mask.size != given.image.size:
            raise UserError(
                f"the mask is {given.mask.width}x{given.mask.height} but the picture "
                f"{given.image.width}x{given.image.height}; they must be equally large"
            )
        if not bool(_hole(given.mask).any()):
            raise UserError("the mask is black everywhere: paint white what is to be drawn anew")
    elif given.mask is not None:
        raise UserError(f"a mask has no use with mode {given.mode!r}; it belongs to 'inpaint'")
    if given.strength is not None:
        if given.mode not in STRENGTHS:
            raise UserError(f"strength has no use with mode {given.mode!r}; leave it out")
        if isinstance(given.strength, bool) or not isinstance(given.strength, (int, float)):
            raise UserError(f"strength {given.strength!r}: a number above 0 and up to 1 is needed")
        if not 0 < given.strength <= 1:
            raise UserError(
                f"strength {given.strength:g}: above 0 and up to 1; 1 draws without regard to the "
                "picture, and a cascade's mode 'reconstruct' changes nothing of it"
            )


def _near_size(spec: Sized, width: int, height: int) -> tuple[int, int]:
    """Return the picture's own size if the model makes it well, or one of the model's area."""
    sides = (width, height)
    fits = all(
        spec.min_size <= side <= spec.max_size and side % spec.size_multiple == 0 for side in sides
    )
    if fits and not is_far(spec, width, height):
        return width, height
    ratio, area = width / height, spec.image_size**2
    sizes = range(spec.min_size, spec.max_size + 1, spec.size_multiple)

    def misfit(size: tuple[int, int]) -> float:
        # The ratio before the area: a picture is better scaled a little more than cut.
        own_ratio, own_area = size[0] / size[1], size[0] * size[1]
        return abs(math.log(own_ratio / ratio)) + abs(math.log(own_area / area)) / 4

    def near(side: float) -> Iterator[int]:
        number = int((side - sizes[0]) // spec.size_multiple)
        return (sizes[min(max(one, 0), len(sizes) - 1)] for one in (number, number + 1))

    return min(((w, h) for w in sizes for h in near(w / ratio)), key=misfit)


def _on_canvas(
    spec: Sized, image: Image.Image, strength: float, width: int | None, height: int | None
) -> tuple[PictureTask, int, int, list[str]]:
    """Lay the picture into the middle of a larger one, whose rest is to be drawn."""
    if width is None and height is None:
        raise UserError("outpainting needs a width or height larger than the picture's")
    step = spec.size_multiple
    up = [-(-side // step) * step for side in image.size]  # a side not named holds the picture
    width, height, notices = fit_size(
        spec, up[0] if width is None else width, up[1] if height is None else height
    )
    if image.width > width or image.height > height or image.size == (width, height):
        raise UserError(
            f"the picture is {image.width}x{image.height} and the whole {width}x{height}: the "
            "whole must be larger; choose a larger width or height, or a smaller picture"
        )
    left, top = (width - image.width) // 2, (height - image.height) // 2
    border = (left, width - image.width - left, top, height - image.height - top)
    # What the compressor sees around the picture goes on as at its edge.
    pixels = F.pad(image_to_pixels(image)[None], border, mode="replicate")
    mask = F.pad(torch.zeros(1, 1, image.height, image.width), border, value=1.0)
    return PictureTask("outpaint", pixels, mask, strength), width, height, notices


def _hole(mask: Image.Image) -> Tensor:
    """Return ``(1, 1, H, W)``, 1 where the mask is lighter than mid grey and not transparent."""
    return (image_to_pixels(flatten(mask, "black").convert("L"))[None, :1] > 0.5).float()


def _filled(pixels: Tensor, known: Tensor) -> Tensor:
    """Fill ``(1, 3, H, W)`` where ``known`` is 0 with averages of what is near, coarser inside."""
    if bool(known.all()):
        return pixels
    if not bool(known.any()):
        return torch.full_like(pixels, 0.5)
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    means = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = _filled(means, (share > 0).float())
    coarse = F.interpolate(coarse, size=pixels.shape[-2:], mode="bilinear")
    return torch.where(known > 0, pixels, coarse)


def _cut(hole: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut and scale a hole as ``ImageOps.fit`` does a picture; scaling loses no white pixel."""
    height, width = hole.shape[-2:]
    scale = min(height / size[0], width / size[1])
    rows, columns = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - rows) // 2, (width - columns) // 2
    return F.adaptive_max_pool2d(hole[..., top : top + rows, left : left + columns], size)
