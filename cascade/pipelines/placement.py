"""Where networks run, and in which number format."""

from __future__ import annotations

import torch

from cascade.config import nearest
from cascade.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name: str) -> torch.device:
    """Return the device of a name; "auto" takes a GPU if there is one.

    Raises:
        UserError: If there is no such device here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, here in available.items() if here), "cpu"))
    kind = name.split(":", 1)[0]
    if kind not in DEVICES[1:]:
        guess = nearest(name, DEVICES)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise UserError(f"device {name!r}: {hint}valid: {', '.join(DEVICES)}")
    if not available.get(kind, True):
        raise UserError(f"device {name!r}: torch finds none on this machine; use 'auto' or 'cpu'")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: {error}") from error
    if kind != "cuda":  # there is one; weights files know it by its plain name
        if device.index:
            raise UserError(f"device {name!r}: there is one {kind}; name it {kind!r}")
        return torch.device(kind)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the number format of a name.

    "auto" is bfloat16 on GPUs that compute in it and float32 elsewhere: never float16, which
    overflows in the published Stage C.

    Raises:
        UserError: For a name that is none.
    """
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name == "auto":
        in_hardware = device.type == "cuda" and torch.cuda.is_bf16_supported(False)
        return torch.bfloat16 if in_hardware else torch.float32
    if name not in DTYPES:
        guess = nearest(name, DTYPES)
        hint = f"did you mean {guess!r}? " if guess else ""
        raise UserError(f"dtype {name!r}: {hint}valid: auto, {', '.join(DTYPES)}")
    return DTYPES[name]
