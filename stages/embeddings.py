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
    if t.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"the diffusion time came as {t.dtype}; pass it as float32")
    half = dim // 2
    index = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(index * (-math.log(max_period) / (half - 1)))
    angles = t.float()[:, None] * max_period * frequencies[None, :]  # (B, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
