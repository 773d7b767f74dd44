"""Stage A's loss terms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_loss(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean squared error, a scalar."""
    return F.mse_loss(reconstruction.float(), pixels.float())


def feature_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Return the mean distance of unit-length features over layers, a scalar.

    Args:
        ours: Features of the reconstruction by layer, each ``(B, L, D)``.
        theirs: Features of the original, same shapes; no gradient flows into them.

    Reference: Zhang et al., 2018, arXiv:1801.03924 (LPIPS without its learned weights).
    """
    distances = [
        (F.normalize(a.float(), dim=-1) - F.normalize(b.detach().float(), dim=-1))
        .square()
        .sum(dim=-1)
        .mean()
        for a, b in zip(ours, theirs, strict=True)
    ]
    return torch.stack(distances).mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the discriminator's hinge loss, a scalar.

    Reference: Lim & Ye, 2017, arXiv:1705.02894.
    """
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the decoder's adversarial loss, a scalar."""
    return -fake_logits.mean()
