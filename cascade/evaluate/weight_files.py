"""Published weights of yardsticks: safetensors, or a ``.pth`` of which tensors alone are taken."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cascade.errors import UserError


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors: safetensors, or a ``.pth`` from which nothing but tensors is taken.

    Raises:
        UserError: If it is missing or no such file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of weights; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable file of weights ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path}: not a plain table of tensors, which the network's weights are")
    return content
