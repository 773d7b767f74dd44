"""Sinusoidal embeddings of diffusion time and of other scalar conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

GUIDANCE_UNIT = 1e-4
"""What a guidance scale is multiplied by before it is embedded as a time is: its fastest wave then
has one radian for each unit of the scale, so that neighbouring scales look alike."""


def time_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed scalars in [0, 1] as sines and cosines, in float32 whatever the network's dtype.

    Of float64 scalars the embedding is float64.

    At ``t * 10000`` a bfloat16 time is off by up to 40 periods' worth, so the time must never be
    rounded before this point.

    Args:
        t: Shape ``(B,)``.
        dim: Even size of the embedding.
        max_period: Both the factor on ``t`` and the longest period.

    Returns:
        Shape ``(B, dim)``: sines first, then cosines.

    Raises:
        ValueError: ``t`` was rounded to a 16-bit format.
    """
    _refuse_rounded(t, "the diffusion time")
    half = dim // 2
    dtype = torch.promote_types(t.dtype, torch.float32)
    index = torch.arange(half, device=t.device, dtype=dtype)
    frequencies = torch.exp(index * (-math.log(max_period) / (half - 1)))
    angles = t.to(dtype)[:, None] * max_period * frequencies[None, :]  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def scalar_embeddings(told: Mapping[str, Tensor | None], dim: int, device: torch.device) -> Tensor:
    """Embed the scalars that a stage is told beside the time.

    Args:
        told: ``(B,)`` by name, in the network's order; None is 0, or no guidance for "cfg".
        dim: Even size of each embedding.
        device: Where to, if none is given.

    Returns:
        ``(B, num_scalars, dim)``; one row for all pictures if no scalar is given.
    """
    batch = max((len(value) for value in told.values() if value is not None), default=1)
    rows = []
    for name, value in told.items():
        if value is None:
            value = torch.full((batch,), 1.0 if name == "cfg" else 0.0, device=device)
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        rows.append(time_embedding(value * GUIDANCE_UNIT if name == "cfg" else value, dim))
    return torch.stack(rows, dim=1) if rows else torch.zeros(batch, 0, dim, device=device)


def timestep_embedding(values: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed timesteps, sizes or other whole numbers as cosines and sines, in float32.

    The embedding of the published U-Nets. Steps up to 999 and sizes of thousands of pixels have
    more digits than a 16-bit format, so they must never be rounded before this point.

    Args:
        values: Shape ``(B,)``, of any float32, float64 or integer values.
        dim: Even size of the embedding.
        max_period: The longest period, over 2 pi.

    Returns:
        Shape ``(B, dim)``, float32: cosines first, then sines.

    Raises:
        ValueError: ``values`` were rounded to a 16-bit format.

    Reference: Ho et al., 2020, arXiv:2006.11239, appendix B; the order of the halves is that of
    Rombach et al., 2022, arXiv:2112.10752.
    """
    _refuse_rounded(values, "timesteps and sizes")
    half = dim // 2
    index = torch.arange(half, device=values.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(max_period) * index / half)
    angles = values.float()[:, None] * frequencies[None, :]  # (B, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _refuse_rounded(values: Tensor, name: str) -> None:
    if values.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"{name} came as {values.dtype}; pass float32")
