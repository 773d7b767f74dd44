"""The autoencoders' loss terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_loss(
    reconstruction: Tensor, pixels: Tensor, distance: Literal["l1", "mse"] = "mse"
) -> Tensor:
    """Return the mean absolute or squared error, a scalar."""
    loss = F.l1_loss if distance == "l1" else F.mse_loss
    return loss(reconstruction.float(), pixels.float())


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the KL divergence of Gaussians from a standard normal.

    Args:
        mean: Shape ``(B, ...)``.
        log_variance: Same shape.

    Returns:
        ``(B,)`` float32: summed over a sample's values.

    Reference: Kingma & Welling, 2014, arXiv:1312.6114, appendix B.
    """
    mean, log_variance = mean.float(), log_variance.float()
    values = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
    return values.flatten(1).sum(dim=1)


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
