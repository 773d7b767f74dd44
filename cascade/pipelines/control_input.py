"""A picture that a ControlNet leads Stage C by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from cascade.checkpoints.files import file_hash
from cascade.errors import UserError
from cascade.images import flatten, image_to_pixels
from cascade.pipelines.picture_input import PictureTask, fingerprint


@dataclass(frozen=True)
class ControlInput:
    """What the user gives."""

    network: Path
    """The ControlNet's file; which kind it is is told by its content."""
    image: Image.Image | None = None
    """The picture whose edges, surroundings or small version it sees, cut to the plan's ratio;
    None: the picture that the plan starts from."""
    strength: float = 1.0
    """Factor on what it says; 0 is no control."""


@dataclass(frozen=True)
class ControlTask:
    """A control ready to run."""

    network: Path
    network_hash: str
    """First 12 hex digits of its SHA-256."""
    pixels: Tensor
    """``(1, 3, H, W)`` float32 in [0, 1], at the plan's size."""
    mask: Tensor | None
    """``(1, 1, H, W)``, of the plan's picture: 1 is drawn anew."""
    strength: float

    def described(self) -> dict[str, object]:
        """Return what a PNG tells of it: the network's hash, the picture's, the strength."""
        return {
            "network": self.network_hash,
            "fingerprint": fingerprint(self.pixels, self.mask),
            "strength": self.strength,
        }


def fit_control(
    given: ControlInput, picture: PictureTask | None, width: int, height: int
) -> ControlTask:
    """Bring a control's picture to the plan's size.

    Raises:
        UserError: If there is no picture or no such file, if the strength is no number, or if the
            plan has no Stage C to lead.
    """
    number = isinstance(given.strength, Real) and not isinstance(given.strength, bool)
    if not number or not math.isfinite(given.strength):
        raise UserError(f"control strength {given.strength!r}: a finite number is needed")
    if picture is not None and picture.mode == "reconstruct":
        raise UserError("a ControlNet leads Stage C, which a reconstruction does not run")
    if given.image is None and (picture is None or picture.mode == "variation"):
        raise UserError(
            "a ControlNet needs a picture to look at: its edges, what is around a hole, or its "
            "small version"
        )
    network_hash = file_hash(given.network)
    mask = None if picture is None else picture.mask
    if given.image is not None:
        image = ImageOps.fit(flatten(given.image), (width, height), Image.Resampling.LANCZOS)
        pixels = image_to_pixels(image)[None]
    else:
        assert picture is not None, "checked above"
        pixels = picture.pixels
    return ControlTask(given.network, network_hash, pixels, mask, float(given.strength))
