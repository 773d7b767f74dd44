"""How far two sets of features lie apart: Frechet, kernel (KID), RBF (CMMD), precision and recall.

Pure maths on ``(N, D)`` features, in float64: the covariances of a thousand dimensions have
eigenvalues that float32 does not tell from zero. Nothing here knows what made the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024
"""Rows of one set that meet the other set at a time."""
_TIE = 1e-9
"""Squared distances this close, relative to the vectors' lengths, are equal: the product form of a
distance cancels to about 1e-15 of them."""
CMMD_BANDWIDTH = 10.0
CMMD_SCALE = 1000.0


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of features."""

    mean: Tensor
    """``(D,)`` float64."""
    covariance: Tensor
    """``(D, D)`` float64, unbiased."""
    count: int
    """Features that it was made of."""


class Moments:
    """Mean and covariance of features that come in batches; no feature is kept.

    Reference: Chan, Golub and LeVeque, 1983, "Algorithms for computing the sample variance": the
        batches' own moments are joined, so nothing large is subtracted from anything large.
    """

    def __init__(self, channels: int) -> None:
        """Start without features."""
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Take a batch ``(N, D)``.

        Raises:
            ValueError: If a feature is not finite, or the width is another.
        """
        features = checked(features)
        count, mean = len(features), features.mean(dim=0)
        centred = features - mean
        apart = mean - self._mean
        total = self.count + count
        self._scatter += centred.T @ centred
        self._scatter += torch.outer(apart, apart) * (self.count * count / total)
        self._mean += apart * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Return the moments of all batches.

        Raises:
            ValueError: Of fewer than two features: they have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} features have no covariance; at least 2 are needed")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1), self.count)


def gaussian_of(features: Tensor) -> Gaussian:
    """Return mean and covariance of ``(N, D)`` features, taken in blocks."""
    moments = Moments(features.shape[1])
    for block in features.split(_BLOCK):
        moments.update(block)
    return moments.gaussian()


def checked(features: Tensor) -> Tensor:
    """Return ``(N, D)`` features in float64 on the CPU.

    Raises:
        ValueError: If they have another shape, there are none, or a value is not finite.
    """
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features of shape {tuple(features.shape)}: (N, D) is needed")
    features = features.detach().cpu().double()
    if not bool(features.isfinite().all()):
        raise ValueError("a feature is not finite: the network or a picture is broken")
    return features


def matrix_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a symmetric positive semi-definite ``(D, D)`` matrix.

    Eigenvalues that rounding made negative count as zero, so that a covariance of fewer pictures
    than dimensions has a root as well.
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(first: Gaussian, second: Gaussian, root: Tensor | None = None) -> float:
    """Return ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``: of Inception's features the FID.

    The trace of the root is taken from the eigenvalues of ``C1^(1/2) C2 C1^(1/2)``, which is
    symmetric: no complex numbers, no offset on the diagonal.

    Args:
        first: One set.
        second: The other.
        root: ``matrix_root(first.covariance)``, where it is known already.

    Returns:
        At least 0, in the features' units squared.

    Reference: Heusel et al., 2017, arXiv:1706.08500, eq. 6.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of {len(first.mean)} and {len(second.mean)} dimensions are of two networks"
        )
    root = matrix_root(first.covariance) if root is None else root
    product = root @ second.covariance @ root
    values = torch.linalg.eigvalsh((product + product.T) / 2)
    traces = first.covariance.trace() + second.covariance.trace()
    apart = (first.mean - second.mean).square().sum()
    distance = apart + traces - 2 * values.clamp(min=0).sqrt().sum()
    return max(0.0, float(distance))


def spread_by_halves(
    distance: Callable[[Tensor], float], count: int, generator: torch.Generator, resamples: int
) -> float | None:
    """Return the standard deviation that other pictures of the same model would give a distance.

    Of random halves of the pictures, drawn without replacement, the distances differ as much as
    those of whole sets do (the jackknife that leaves half of them out). The bootstrap is no way
    here: a picture drawn twice takes the covariance of few pictures a dimension, and is its own
    neighbour in a kernel. What neither shows is the bias of small numbers of pictures.

    Args:
        distance: Of the pictures in ``(n,)`` rows from the real ones, which stay.
        count: Pictures.
        generator: Source of the draws, on the CPU.
        resamples: How often, at least 2.

    Returns:
        None of fewer than four pictures.

    Reference: Shao and Wu, "A general theory for jackknife variance estimation", 1989.
    """
    if count < 4:
        return None
    found = [
        distance(torch.randperm(count, generator=generator)[: count // 2]) for _ in range(resamples)
    ]
    return float(torch.tensor(found, dtype=torch.float64).std())


@dataclass(frozen=True)
class KernelDistance:
    """KID over subsets."""

    mean: float
    spread: float | None
    """Standard deviation over the subsets; None where they are much the same pictures."""
    subsets: int
    subset_size: int


def kernel_distance(
    first: Tensor, second: Tensor, subsets: int, subset_size: int, generator: torch.Generator
) -> KernelDistance:
    """Return the squared MMD under the cubic kernel ``(x.y / D + 1)^3``, the KID.

    Unbiased, so it may fall below zero for sets of one distribution. Where a set is smaller than
    ``subset_size``, subsets have its size.

    Args:
        first: ``(N, D)``.
        second: ``(M, D)``.
        subsets: Random subsets whose mean it is.
        subset_size: Features of each set in a subset.
        generator: Source of the draws, on the CPU.

    Raises:
        ValueError: If a set has fewer than two features.

    Reference: Binkowski et al., 2018, arXiv:1801.01401.
    """
    first, second = checked(first), checked(second)
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f"sets of {len(first)} and {len(second)} features: 2 each are needed")
    found = []
    for _ in range(subsets):
        x = first[torch.randperm(len(first), generator=generator)[:size]]
        y = second[torch.randperm(len(second), generator=generator)[:size]]
        found.append(cubic_mmd(x, y))
    values = torch.tensor(found, dtype=torch.float64)
    differ = subsets > 1 and 2 * size <= min(len(first), len(second))
    return KernelDistance(
        float(values.mean()), float(values.std()) if differ else None, subsets, size
    )


def cubic_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of ``(N, D)`` and ``(M, D)`` under the KID's kernel."""
    x, y = checked(x), checked(y)
    k_xx, k_yy, k_xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_xx, k_yy))
    return float(within - 2 * k_xy.mean())


@dataclass(frozen=True)
class RbfDistance:
    """CMMD's distance."""

    value: float
    spread: float | None
    """The bootstrap's standard deviation; None without one."""


def rbf_distance(
    first: Tensor,
    second: Tensor,
    resamples: int = 0,
    generator: torch.Generator | None = None,
) -> RbfDistance:
    """Return 1000 times the squared MMD under a Gaussian kernel of bandwidth 10: CMMD's form.

    Each feature is brought to unit length first, as CLIP's are. The estimate is the biased one of
    the published code: 0 for a set and itself, never negative.

    Args:
        first: ``(N, D)``, the real features.
        second: ``(M, D)``.
        resamples: How often ``second`` is drawn again, with replacement, for the spread.
        generator: Source of these draws, on the CPU.

    Reference: Jayasumana et al., 2024, arXiv:2401.09603.
    """
    x, y = (torch.nn.functional.normalize(checked(one), dim=1) for one in (first, second))
    count = len(y)
    # A resample is how often each feature was drawn; the first column takes each once.
    draws = [torch.ones(count, dtype=torch.float64)]
    for _ in range(resamples):
        rows = torch.randint(count, (count,), generator=generator)
        draws.append(torch.bincount(rows, minlength=count).double())
    weights = torch.stack(draws, dim=1) / count  # (M, 1 + resamples)
    own = torch.full((len(x), 1), 1 / len(x), dtype=torch.float64)
    values = (
        _weighted_kernel(x, x, own, own)
        + _weighted_kernel(y, y, weights, weights)
        - 2 * _weighted_kernel(x, y, own.expand(-1, weights.shape[1]), weights)
    )
    values = CMMD_SCALE * values.clamp(min=0)
    spread = float(values[1:].std()) if resamples > 1 else None
    return RbfDistance(float(values[0]), spread)


def _weighted_kernel(x: Tensor, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T (K - 1) right`` of each column: ``(C,)``.

    K is near 1 for unit vectors; its difference from 1 keeps the digits, and the ones cancel.
    """
    total = torch.zeros(right.shape[1], dtype=torch.float64)
    start = 0
    for squared in _squared_distances(x, y):
        kernel = torch.expm1(-squared / (2 * CMMD_BANDWIDTH**2))
        total += (left[start : start + len(squared)] * (kernel @ right)).sum(dim=0)
        start += len(squared)
    return total


@dataclass(frozen=True)
class Coverage:
    """How two sets cover each other, as hits of a number of trials."""

    precise: int
    """Of the generated features, those within the real manifold."""
    num_generated: int
    recalled: int
    """Of the real features, those within the generated manifold."""
    num_real: int


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> Coverage:
    """Count which features lie within the other set's manifold.

    A set's manifold is the union of balls around its features, each as wide as the way to the
    ``neighbours``-th nearest of the same set.

    Args:
        real: ``(N, D)``.
        generated: ``(M, D)``.
        neighbours: The k of the method.

    Raises:
        ValueError: If a set has no k-th neighbour.

    Reference: Kynkaanniemi et al., 2019, arXiv:1904.06991, "improved precision and recall".
    """
    real, generated = checked(real), checked(generated)
    fewest = min(len(real), len(generated))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"{fewest} features have no neighbour number {neighbours}")
    return Coverage(
        precise=_num_within(generated, real, neighbours),
        num_generated=len(generated),
        recalled=_num_within(real, generated, neighbours),
        num_real=len(real),
    )


def _num_within(points: Tensor, centres: Tensor, neighbours: int) -> int:
    """Count the points that lie in a ball of the centres."""
    radii = torch.cat(
        # The nearest of all is the feature itself.
        [block.kthvalue(neighbours + 1, dim=1).values for block in _squared_distances(centres)]
    )
    slack = _TIE * float(centres.square().sum(dim=1).max() + points.square().sum(dim=1).max())
    within = 0
    for block in _squared_distances(points, centres):
        within += int((block <= radii + slack).any(dim=1).sum())
    return within


def _squared_distances(x: Tensor, y: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the squared distances of ``(N, D)`` to ``(M, D)``, blocks of rows ``(n, M)``."""
    y = x if y is None else y
    lengths = y.square().sum(dim=1)
    for block in x.split(_BLOCK):
        own = block.square().sum(dim=1, keepdim=True)
        yield (own + lengths - 2 * block @ y.T).clamp(min=0)


def covariance_warning(count: int, channels: int) -> str | None:
    """Return what a Frechet distance of few pictures should be told with, None of enough."""
    if count > channels:
        return None
    return (
        f"{count} pictures for {channels} dimensions: the covariance is singular and the distance "
        f"biased upwards; more than {channels} are needed, {10 * channels:,} are usual; compare "
        "equal numbers only"
    )


def mean_interval(values: Tensor, z: float = 1.959964) -> tuple[float, float | None]:
    """Return the mean of ``(N,)`` values and half the width of its 95 % interval, None of one."""
    values = values.double()
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), z * float(values.std()) / math.sqrt(len(values))
