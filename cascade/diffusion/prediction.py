"""What a network predicts, and how it becomes an estimate of x0."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Prediction(str, Enum):
    """The network's output: the noise, the velocity, or the clean sample."""

    EPSILON = "epsilon"
    V = "v"
    X0 = "x0"


def target(kind: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return what a network of this kind should output.

    Args:
        kind: The prediction.
        x0: Clean samples.
        noise: The noise in ``x_t``.
        alpha: Signal scale, broadcastable to ``x0``.
        sigma: Noise scale, broadcastable to ``x0``.

    Reference: v is ``alpha noise - sigma x0``, Salimans & Ho, 2022, arXiv:2202.00512, appendix D.
    """
    if kind is Prediction.EPSILON:
        return noise
    if kind is Prediction.V:
        return alpha * noise - sigma * x0
    return x0


def to_x0(predicted: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """Turn a prediction at ``x_t`` into an estimate of x0."""
    if kind is Prediction.EPSILON:
        return (x_t - sigma * predicted) / alpha
    if kind is Prediction.V:
        return alpha * x_t - sigma * predicted
    return predicted


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: Prediction) -> Tensor:
    """Turn an estimate of x0 at ``x_t`` into a prediction: the inverse of ``to_x0``."""
    if kind is Prediction.X0:
        return x0
    noise = (x_t - alpha * x0) / sigma
    return noise if kind is Prediction.EPSILON else alpha * noise - sigma * x0
