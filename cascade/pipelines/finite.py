"""Checks between stages: a value that is not a number is an error, not a black picture."""

from __future__ import annotations

import torch
from torch import Tensor

from cascade.errors import UserError


class NonFiniteError(UserError):
    """A stage gave values that are infinite or not a number."""


class BlankPictureError(UserError):
    """A picture came out entirely black."""


def check_finite(
    values: Tensor,
    stage: str,
    dtype: torch.dtype,
    *,
    step: int | None = None,
    num_steps: int | None = None,
) -> None:
    """Let finite values pass.

    Args:
        values: What the stage gave.
        stage: Name of the stage, for the message.
        dtype: Number format that its network ran in.
        step: Step of its sampler, from 0; None outside of one.
        num_steps: Steps of its sampler.

    Raises:
        NonFiniteError: If a value is infinite or not a number.
    """
    finite = torch.isfinite(values)
    if values.is_meta or bool(finite.all()):  # on meta there are no values, only their memory
        return
    where = stage if step is None else f"{stage}, step {step + 1} of {num_steps}"
    share = 1.0 - finite.double().mean().item()
    name = str(dtype).removeprefix("torch.")
    cure = (
        "float16 overflows in these networks; use --dtype bfloat16 or float32"
        if dtype == torch.float16
        else "the weights may be damaged, or a guidance scale is extreme"
    )
    raise NonFiniteError(f"{where} ({name}): {share:.1%} of the values are not finite; {cure}")


def check_not_black(pixels: Tensor, dtype: torch.dtype, decoder: str = "Stage A") -> None:
    """Let pictures with any light in them pass.

    Args:
        pixels: ``(B, 3, H, W)`` in [0, 1].
        dtype: Number format that the last network ran in.
        decoder: Name of that network, for the message.

    Raises:
        BlankPictureError: If a picture would be entirely black in 8 bits.
    """
    brightest = pixels.flatten(1).amax(dim=1)
    if bool((brightest < 0.5 / 255).any()):
        name = str(dtype).removeprefix("torch.")
        raise BlankPictureError(
            f"{decoder} ({name}): the picture is entirely black; try another seed, or --dtype "
            "float32"
        )
