"""Where a teacher's path leads from one of sampling's steps to the next, walked in small steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cascade.diffusion.trigflow import clean
from train.losses.consistency import Velocity


@torch.no_grad()
def walked(teacher: Velocity, noise: Tensor, bounds: Tensor, small_steps: int) -> Tensor:
    """Walk a teacher's path from noise to the clean end.

    One evaluation a step; the estimate of x0 is taken where it would be in the step's middle, had
    it gone on changing along the angle as it did, as DPM-Solver++ 2M (arXiv:2211.01095) does along
    the log-SNR, in which there is no step to the clean end.

    Args:
        teacher: The teacher as TrigFlow.
        noise: Where it starts, ``(B, ...)``.
        bounds: Angles, falling, ``(n + 1,)``, on the CPU.
        small_steps: From each bound to the next.

    Returns:
        The points at all bounds, ``(n + 1, B, ...)``.
    """
    points, x = [noise], noise
    before: tuple[Tensor, float] | None = None  # the last estimate of x0, and where it was made
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for number in range(small_steps):
            t, s = (first + (last - first) * share / small_steps for share in (number, number + 1))
            angle = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
            x0 = clean(teacher(x, angle), x, angle)
            ahead = x0
            if before is not None:
                ahead = x0 + (0.5 * (t - s) / (before[1] - t)) * (x0 - before[0])
            x = (math.sin(s) * x + math.sin(t - s) * ahead) / math.sin(t)
            before = (x0, t)
        points.append(x)
    return torch.stack(points)
