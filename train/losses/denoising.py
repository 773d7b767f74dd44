"""The denoising loss of Stage B and Stage C."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion import weighting
from cascade.diffusion.prediction import Prediction, target
from cascade.diffusion.schedules import CosineSchedule
from train.draws import StepDraws


@dataclass(frozen=True)
class DiffusionConfig:
    """How a stage is noised, what it predicts, how its loss is weighted."""

    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    """What the network outputs (epsilon in all published stages)."""
    weight: Literal["p2", "min_snr", "constant", "adaptive"] = "p2"
    """Loss weight over log-SNR (p2 in the papers; adaptive, 1 over the loss's own average at that
    noise level, in Stable Cascade's trainers)."""
    draw: Literal["uniform", "logit_normal", "official", "noisy"] = "uniform"
    """Distribution of the diffusion time."""
    stratified: bool = True
    """Spread the times of a batch evenly over the distribution: less noise in the gradient."""
    shift: float = 1.0
    """Resolution shift of the schedule in training."""
    time_input: Literal["cosine", "raw"] = "cosine"
    """The time that the network is told: where the unshifted cosine has this noise (v3), or the
    time itself (Würstchen v2). Sampling has the same option."""

    def schedule(self) -> CosineSchedule:
        """Return the noise schedule of training."""
        return CosineSchedule(shift=self.shift)


@dataclass(frozen=True)
class Noised:
    """A noised batch and what the network should say of it."""

    x_t: Tensor  # (B, C, H, W)
    network_time: Tensor  # (B,)
    target: Tensor  # (B, C, H, W)
    weight: Tensor  # (B,)
    t: Tensor  # (B,)


def noise_batch(
    x0: Tensor, config: DiffusionConfig, draws: StepDraws, noise: Tensor | None = None
) -> Noised:
    """Draw times and noise for a batch of clean latents.

    Args:
        x0: Clean latents, shape ``(B, C, H, W)``.
        config: Schedule, prediction and weight.
        draws: Of this micro-batch; on the CPU, so that every device sees the same.
        noise: Noise of the shape of ``x0``; None: white.
    """
    schedule, prediction = config.schedule(), Prediction(config.prediction)

    def draw(count: int, generator: torch.Generator) -> Tensor:
        return weighting.draw_t(count, generator, config.draw, stratified=config.stratified)

    t = draws.share("t", len(x0), draw).to(x0.device)  # (B,)
    if noise is None:
        noise = draws.normal("noise", x0.shape)
    noise = noise.to(x0.device)
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule(t))  # (B, 1, 1, 1)
    log_snr = schedule.log_snr(t)
    if config.weight == "p2":
        weight = weighting.p2(log_snr)
    elif config.weight == "min_snr":
        weight = weighting.min_snr(log_snr, prediction=prediction)
    else:
        weight = torch.ones_like(log_snr)
    return Noised(
        x_t=alpha * x0 + sigma * noise,
        network_time=t if config.time_input == "raw" else schedule.network_time(t),
        target=target(prediction, x0, noise, alpha, sigma),
        weight=weight,
        t=t,
    )


def errors_by_sample(predicted: Tensor, noised: Noised) -> Tensor:
    """Return each sample's mean squared error (B,), in float32, without a gradient."""
    return (predicted.detach().float() - noised.target).square().flatten(1).mean(dim=1)


def denoising_loss(predicted: Tensor, noised: Noised) -> tuple[Tensor, Tensor]:
    """Return (weighted loss, unweighted mean squared error), both scalars, in float32."""
    squared = (predicted.float() - noised.target).square().flatten(1).mean(dim=1)  # (B,)
    return (squared * noised.weight).mean(), squared.mean().detach()


@torch.no_grad()
def errors_by_noise(predicted: Tensor, noised: Noised, levels: int = 5) -> dict[str, Tensor]:
    """Return the mean squared error by diffusion time, for curves that show where it is learned.

    Args:
        predicted: What the network said, ``(B, C, H, W)``.
        noised: What it was asked.
        levels: Equal parts of [0, 1].

    Returns:
        ``mse_t/0.0-0.2`` -> scalar, and so on; parts that no sample of the batch lies in are left
        out.
    """
    squared = (predicted.float() - noised.target).square().flatten(1).mean(dim=1)  # (B,)
    level = (noised.t * levels).long().clamp(max=levels - 1)
    return {
        f"mse_t/{index / levels:.1f}-{(index + 1) / levels:.1f}": squared[level == index].mean()
        for index in range(levels)
        if bool((level == index).any())
    }
