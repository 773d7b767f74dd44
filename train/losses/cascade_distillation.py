"""What a cascade's Stage C is told by a U-Net that sees the same picture in another latent space.

Nothing here compares latents of the two: features are compared by direction after a learnt
projection, tokens by how alike they are to each other, estimates after they were brought into the
cascade's own space.

References: Yu et al., 2024, REPA, arXiv:2410.06940 (projected features, cosine); Lee et al., 2023,
KOALA, arXiv:2312.04005 (self-attention carries structure); Park et al., 2019, relational
distillation, arXiv:1904.05068; Sauer et al., 2023, ADD, arXiv:2311.17042 (a teacher's estimate as
the target).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import run


class FeatureProjector(nn.Module):
    """A two-layer MLP at every position: from the student's width to the teacher's."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        """Take the widths."""
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hidden_channels),
            nn.SiLU(),
            nn.Linear(hidden_channels, out_channels),
        )
        self.recompute = False
        """Whether the backward pass runs it again."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C_out, h, w)."""
        tokens = features.permute(0, 2, 3, 1)
        projected: Tensor = run(self.mlp, tokens, recompute=self.recompute)
        return projected.permute(0, 3, 1, 2)


class FeatureProjectors(nn.ModuleDict):
    """Several projections by name."""

    @property
    def recompute(self) -> bool:
        """Whether the backward pass runs them again."""
        return any(bool(one.recompute) for one in self.values())

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for one in self.values():
            one.recompute = value  # type: ignore[assignment]


def on_grid(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize features (B, C, h, w) to another grid, antialiased, in float32."""
    features = features.float()
    if features.shape[-2:] == size:
        return features
    return F.interpolate(features, size=size, mode="bilinear", antialias=True, align_corners=False)


def cosine_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return ``1 - cosine`` of each sample's positions, averaged, ``(B,)`` in float32.

    Args:
        ours: Projected features, (B, C, h, w).
        theirs: The teacher's, (B, C, h', w'), brought to our grid.
    """
    height, width = ours.shape[-2:]
    target = on_grid(theirs.detach(), (height, width))
    cosines = F.cosine_similarity(ours.float(), target, dim=1, eps=1e-6)  # (B, h, w)
    return 1.0 - cosines.flatten(1).mean(dim=1)


def affinities(features: Tensor) -> Tensor:
    """Return how alike the positions of a picture are: ``(B, L, L)`` cosines, float32.

    What all positions of a picture have in common is taken away first, which would make all of
    them alike. Neither scale nor offset nor a rotation of the features changes the result.

    Args:
        features: (B, C, h, w) with L = h * w.
    """
    tokens = features.float().flatten(2).mT  # (B, L, C)
    tokens = F.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=-1, eps=1e-6)
    return tokens @ tokens.mT


def relation_distances(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return each sample's mean squared difference of affinities, ``(B,)`` in float32.

    Args:
        ours: The student's features, (B, C, h, w).
        theirs: The teacher's, (B, C', h', w'). The finer of the two grids is brought to the
            coarser.
    """
    height = min(ours.shape[-2], theirs.shape[-2])
    width = min(ours.shape[-1], theirs.shape[-1])
    student = affinities(on_grid(ours, (height, width)))
    teacher = affinities(on_grid(theirs.detach(), (height, width)))
    return (student - teacher).square().flatten(1).mean(dim=1)


def estimate_distances(x0_hat: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Return each sample's ``alpha^2 |x0_hat - target|^2``, averaged, ``(B,)`` in float32.

    That is the published weight of an error in x0.

    Args:
        x0_hat: The student's estimate, (B, C, h, w).
        target: The teacher's, in the student's space.
        alpha: Signal scale of each sample, (B,).
    """
    error = (x0_hat.float() - target.detach().float()).square().flatten(1).mean(dim=1)
    return alpha.float().square() * error


def mean_over_batch(values: Tensor, count: int) -> Tensor:
    """Return the sum of some samples' losses over all samples' number: a scalar.

    Samples that a term leaves out count as zero, so that no split into micro-batches or processes
    changes what a sample weighs.
    """
    return values.sum() / count


def interpolate_curve(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Return a curve of rising ``xs`` (N,) at ``x`` of any shape, linear between its points.

    Beyond its ends it is its ends.
    """
    above = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    low, high = xs[above - 1], xs[above]
    share = ((x - low) / (high - low)).clamp(0.0, 1.0)
    return ys[above - 1] + share * (ys[above] - ys[above - 1])
