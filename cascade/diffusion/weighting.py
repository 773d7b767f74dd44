"""Training only: how the loss is weighted over noise levels, and which levels are drawn."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion.prediction import Prediction


def p2(log_snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """Return ``(k + SNR)^-gamma``, the weight of an epsilon loss.

    Reference: Choi et al., 2022, arXiv:2204.00227, eq. 8; Würstchen uses k = gamma = 1.
    """
    return (k + log_snr.exp()).pow(-gamma)


def min_snr(
    log_snr: Tensor, gamma: float = 5.0, prediction: Prediction = Prediction.EPSILON
) -> Tensor:
    """Return the weight that makes the x0 loss weigh ``min(SNR, gamma)``.

    Reference: Hang et al., 2023, arXiv:2303.09556, section 3.4.
    """
    snr = log_snr.exp()
    clipped = snr.clamp(max=gamma)
    if prediction is Prediction.EPSILON:
        return clipped / snr
    if prediction is Prediction.V:
        return clipped / (snr + 1.0)
    if prediction is Prediction.FLOW:
        return clipped / (snr.sqrt() + 1.0).square()
    return clipped


def draw_t(
    n: int,
    generator: torch.Generator,
    kind: Literal["uniform", "logit_normal", "official", "noisy"] = "uniform",
    *,
    stratified: bool = False,
) -> Tensor:
    """Draw ``n`` diffusion times in [0, 1], float32, on the generator's device.

    Args:
        n: How many.
        generator: Source of the draws.
        kind: "uniform"; "logit_normal": the sigmoid of a standard normal, more of the middle;
            "official": Würstchen's ``(1 - U) * 1.08 + 0.001`` clamped to [0.001, 1], which puts
            about 8 % of the draws at pure noise; "noisy": density 2t, three quarters of the draws
            in the noisier half, where a prompt decides what the picture shows.
        stratified: Draw one from each of ``n`` equal parts of the distribution, in random order.
    """
    device = generator.device
    u = torch.rand(n, generator=generator, device=device)
    if stratified:
        order = torch.randperm(n, generator=generator, device=device)
        u = (order + u) / n
    if kind == "uniform":
        return u
    if kind == "logit_normal":
        return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)).sigmoid()
    if kind == "official":
        return ((1.0 - u) * 1.08 + 0.001).clamp(0.001, 1.0)
    if kind == "noisy":
        return u.sqrt()
    raise ValueError(f"kind is {kind!r}; it is uniform, logit_normal, official or noisy")
