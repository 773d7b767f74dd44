"""What pipelines give back."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from cascade.pipelines.picture_input import PictureTask, fingerprint
from cascade.pipelines.plan import PicturePlan, Plan


@dataclass(frozen=True)
class Picture:
    """One finished picture and how it came to be."""

    image: Image.Image
    """RGB, 8 bits."""
    pixels: Tensor = field(repr=False)
    """``(3, H, W)`` float32 in [0, 1], on the CPU."""
    prompt: str
    """Its prompt."""
    seed: int
    """Its seed; alone, with the same settings, it gives the same picture."""
    seconds: dict[str, float]
    """Seconds by stage; a batch's seconds are shared out evenly among its pictures."""
    metadata: dict[str, str] = field(repr=False)
    """Text for the PNG: all that is needed to make the picture again."""


@dataclass(frozen=True)
class CascadePicture(Picture):
    """A picture of a cascade."""

    stage_c_latents: Tensor = field(repr=False)
    """``(16, h, w)`` float32, what Stage C drew."""
    stage_b_latents: Tensor = field(repr=False)
    """``(4, H/4, W/4)`` float32, what Stage B drew and Stage A decoded."""


@dataclass(frozen=True)
class UNetPicture(Picture):
    """A picture of a U-Net."""

    latents: Tensor = field(repr=False)
    """``(4, H/8, W/8)`` float32, what the U-Net drew and the autoencoder decoded."""


P = TypeVar("P", bound=Picture)


@dataclass(frozen=True)
class Output:
    """All pictures of a call, in the order of its plan."""

    pictures: list[Image.Image]
    """RGB pictures."""
    pixels: Tensor = field(repr=False)
    """``(N, 3, H, W)`` float32 in [0, 1], on the CPU."""
    prompts: list[str]
    """The prompt of each picture."""
    seeds: list[int]
    """The seed of each picture."""
    seconds: dict[str, float]
    """Seconds by stage, all pictures together."""
    notices: list[str]
    """What was changed, and what the user should know."""
    metadata: list[dict[str, str]] = field(repr=False)
    """Text for each picture's PNG."""


@dataclass(frozen=True)
class CascadeOutput(Output):
    """The pictures of a cascade."""

    stage_c_latents: Tensor = field(repr=False)
    """``(N, 16, h, w)`` float32, what Stage C drew."""
    stage_b_latents: Tensor = field(repr=False)
    """``(N, 4, H/4, W/4)`` float32, what Stage B drew and Stage A decoded."""


@dataclass(frozen=True)
class UNetPictures(Output):
    """The pictures of a U-Net."""

    latents: Tensor = field(repr=False)
    """``(N, 4, H/8, W/8)`` float32, what the U-Net drew and the autoencoder decoded."""


def collect(pictures: Sequence[CascadePicture], notices: Sequence[str]) -> CascadeOutput:
    """Put finished pictures of one size together; at least one is needed."""
    return CascadeOutput(
        **vars(_together(pictures, notices)),
        stage_c_latents=torch.stack([picture.stage_c_latents for picture in pictures]),
        stage_b_latents=torch.stack([picture.stage_b_latents for picture in pictures]),
    )


def collect_unet(pictures: Sequence[UNetPicture], notices: Sequence[str]) -> UNetPictures:
    """Put finished pictures of one size together; at least one is needed."""
    latents = torch.stack([picture.latents for picture in pictures])
    return UNetPictures(**vars(_together(pictures, notices)), latents=latents)


def _together(pictures: Sequence[Picture], notices: Sequence[str]) -> Output:
    stages = pictures[0].seconds
    return Output(
        pictures=[picture.image for picture in pictures],
        pixels=torch.stack([picture.pixels for picture in pictures]),
        prompts=[picture.prompt for picture in pictures],
        seeds=[picture.seed for picture in pictures],
        seconds={name: sum(picture.seconds[name] for picture in pictures) for name in stages},
        notices=list(notices),
        metadata=[picture.metadata for picture in pictures],
    )


def gather(pictures: Iterable[P], num_wanted: int) -> list[P]:
    """Take pictures as they are finished.

    Raises:
        Interrupted: On Ctrl-C; it holds the pictures that were finished.
    """
    finished: list[P] = []
    try:
        for picture in pictures:
            finished.append(picture)
    except KeyboardInterrupt as error:
        # Whoever keeps the error, as an interactive Python does, would keep what was on the
        # device in that moment.
        traceback.clear_frames(error.__traceback__)
        raise Interrupted(finished, num_wanted) from error
    return finished


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a call: what was finished by then is kept."""

    def __init__(self, finished: Sequence[Picture], num_wanted: int) -> None:
        """Keep the finished pictures."""
        super().__init__(f"interrupted after {len(finished)} of {num_wanted} pictures")
        self.finished = list(finished)


@dataclass(frozen=True)
class Preview:
    """A rough look at pictures that Stage C or a U-Net is still drawing."""

    images: list[Image.Image]
    """Small RGB pictures, one for each of ``indices``."""
    indices: tuple[int, ...]
    """Positions of the pictures in the plan."""
    step: int
    """Steps done."""
    num_steps: int
    """Steps of Stage C, or of the U-Net."""


@dataclass(frozen=True)
class Reconstruction:
    """Pictures that went down the cascade and came up again."""

    pixels: Tensor
    """``(B, 3, H, W)`` float32 in [0, 1], on the CPU."""
    stage_c_latents: Tensor | None
    """``(B, 16, h, w)`` float32, what the compressor kept; None if only Stage A was used."""
    stage_b_latents: Tensor
    """``(B, 4, H/4, W/4)`` float32, what Stage A decoded."""


def join(made: Sequence[Reconstruction]) -> Reconstruction:
    """Put reconstructions of one size together; at least one is needed."""
    kept = [one.stage_c_latents for one in made if one.stage_c_latents is not None]
    return Reconstruction(
        pixels=torch.cat([one.pixels for one in made]),
        stage_c_latents=torch.cat(kept) if kept else None,
        stage_b_latents=torch.cat([one.stage_b_latents for one in made]),
    )


def describe(plan: Plan, index: int, *, model: str, weights: str, dtype: str) -> dict[str, str]:
    """Return the PNG text of a plan's picture; the same picture always has the same text.

    Args:
        plan: The plan.
        index: Position of the picture in it.
        model: Name of the model.
        weights: Hash of its files.
        dtype: Number format that it ran in.
    """
    settings: dict[str, object] = {"stage_b": asdict(plan.stage_b)}
    if plan.picture is None or plan.picture.mode != "reconstruct":
        settings["stage_c"] = asdict(plan.stage_c)
    if plan.few:
        settings["few"] = sorted(plan.few)
    if plan.picture is not None:
        settings["picture"] = picture_settings(plan.picture)
    if plan.control is not None:
        settings["control"] = plan.control.described()
    return text_of(plan, index, settings, model=model, weights=weights, dtype=dtype)


def picture_settings(picture: PictureTask) -> dict[str, object]:
    """Return what a PNG says of the picture that it was made of."""
    return {
        "mode": picture.mode,
        "strength": picture.strength,
        "fingerprint": fingerprint(picture.pixels, picture.mask),
    }


def text_of(
    plan: PicturePlan,
    index: int,
    settings: dict[str, object],
    *,
    model: str,
    weights: str,
    dtype: str,
) -> dict[str, str]:
    """Return the PNG text of any plan's picture.

    Args:
        plan: The plan.
        index: Position of the picture in it.
        settings: What else makes the picture.
        model: Name of the model.
        weights: Hash of its files.
        dtype: Number format that it ran in.
    """
    request = plan.requests[index]
    settings = {**settings, "width": plan.width, "height": plan.height, "dtype": dtype}
    return {
        "prompt": request.prompt,
        "negative_prompt": plan.negative_prompt,
        "seed": str(request.seed),
        "settings": json.dumps(settings, sort_keys=True),
        "model": model,
        "model_hash": weights,
    }
