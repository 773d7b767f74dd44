"""What a network predicts, and how it becomes an estimate of x0."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Prediction(str, Enum):
    """The network's output: the noise, a velocity, or the clean sample."""

    EPSILON = "epsilon"
    V = "v"
    X0 = "x0"
    FLOW = "flow"


def target(kind: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a network of this kind should output.

    Args:
        kind: The prediction.
        x0: Clean samples.
        noise: The noise in ``x_t``.
        alpha: Signal scale, broadcastable to ``x0``.
        sigma: Noise scale, broadcastable to ``x0``.

    References: v is ``alpha noise - sigma x0``, Salimans & Ho, 2022, arXiv:2202.00512, appendix D;
    flow is ``noise - x0``, the velocity of the straight path, Liu et al., 2022, arXiv:2209.03003.
    """
    if kind is Prediction.EPSILON:
        return noise
    if kind is Prediction.V:
        return alpha * noise - sigma * x0
    if kind is Prediction.FLOW:
        return noise - x0
    return x0


def to_x0(predicted: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """Turn a prediction at ``x_t`` into an estimate of x0.

    v is that of a schedule with ``alpha^2 + sigma^2 = 1``; the others fit any.
    """
    if kind is Prediction.EPSILON:
        return (x_t - sigma * predicted) / alpha
    if kind is Prediction.V:
        return alpha * x_t - sigma * predicted
    if kind is Prediction.FLOW:
        return (x_t - sigma * predicted) / (alpha + sigma)
    return predicted


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """Turn an estimate of x0 at ``x_t`` into a prediction: the inverse of ``to_x0``."""
    if kind is Prediction.X0:
        return x0
    noise = (x_t - alpha * x0) / sigma
    return target(kind, x0, noise, alpha, sigma)
