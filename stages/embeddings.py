"""Sinusoidal embeddings of diffusion time and of other scalar conditions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def time_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed scalars in [0, 1] as sines and cosines, in float32 whatever the network's dtype.

    At ``t * 10000`` a bfloat16 time is off by up to 40 periods' worth, so the time must never be
    rounded before this point.

    Args:
        t: Shape ``(B,)``.
        dim: Even size of the embedding.
        max_period: Both the factor on ``t`` and the longest period.

    Returns:
        Shape ``(B, dim)``, float32: sines first, then cosines.

    Raises:
        ValueError: ``t`` was rounded to a 16-bit format.
    """
    _refuse_rounded(t, "the diffusion time")
    half = dim // 2
    index = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(index * (-math.log(max_period) / (half - 1)))
    angles = t.float()[:, None] * max_period * frequencies[None, :]  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


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
