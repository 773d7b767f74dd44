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
    raise _error(where, dtype, 1.0 - finite.double().mean().item())


class FiniteSteps:
    """Checks every step of a sampler: on a CPU at once, elsewhere when all are done.

    To ask a GPU for a value is to wait for it; its next steps could not be queued meanwhile.
    """

    def __init__(self, stage: str, dtype: torch.dtype) -> None:
        """Take the name of the stage, for messages, and its network's number format."""
        self._stage = stage
        self._dtype = dtype
        self._shares: list[Tensor] = []

    def see(self, values: Tensor, step: int, num_steps: int) -> None:
        """Take what a step gave.

        Raises:
            NonFiniteError: On a CPU, if a value is infinite or not a number.
        """
        if values.device.type == "cpu":
            check_finite(values, self._stage, self._dtype, step=step, num_steps=num_steps)
        elif not values.is_meta:
            self._shares.append(torch.isfinite(values).double().mean())

    def check(self) -> None:
        """Check all steps that were not checked at once.

        Raises:
            NonFiniteError: If a value was infinite or not a number; it names the first such step.
        """
        if not self._shares:
            return
        shares = torch.stack(self._shares).tolist()
        for step, share in enumerate(shares):
            if share < 1:
                where = f"{self._stage}, step {step + 1} of {len(shares)}"
                raise _error(where, self._dtype, 1.0 - share)


def _error(where: str, dtype: torch.dtype, share: float) -> NonFiniteError:
    name = str(dtype).removeprefix("torch.")
    cure = (
        "float16 overflows in these networks; use --dtype bfloat16 or float32"
        if dtype == torch.float16
        else "the weights may be damaged, or a guidance scale is extreme"
    )
    return NonFiniteError(f"{where} ({name}): {share:.1%} of the values are not finite; {cure}")


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
