"""The denoising loss of Stage B and Stage C."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cascade.checkpoints.said import said_in
from cascade.diffusion import weighting
from cascade.diffusion.prediction import Prediction, target, to_x0
from cascade.diffusion.schedules import (
    CosineSchedule,
    NoiseSchedule,
    check_schedule,
    make_schedule,
)
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.trained import DIFFUSION_KEY
from train.draws import StepDraws

LEVELS = 5
"""Equal parts of the time in which errors are told apart."""

SAMPLED = ("prediction", "schedule", "zero_terminal_snr", "time_input")
"""What sampling must do as training did."""


@dataclass(frozen=True)
class DiffusionConfig:
    """How a stage is noised, what it predicts, how its loss is weighted."""

    prediction: Literal["epsilon", "v", "x0", "flow"] = "epsilon"
    """What the network outputs (epsilon in all published stages)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Path from data to noise; "linear" is flow matching's."""
    zero_terminal_snr: bool = False
    """Let the cosine end at pure noise instead of the published ``alpha^2 = 1e-4``. Sampling
    begins there, and a network that never saw it keeps the picture's mean brightness near 0."""
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

    def __post_init__(self) -> None:
        """Refuse a schedule on which the prediction says nothing."""
        check_schedule(self.schedule, self.prediction, self.zero_terminal_snr)

    def sampled(self, sampling: StageSampling) -> StageSampling:
        """Return how a network that was trained so must be sampled; the rest as given."""
        return replace(
            sampling,
            prediction=self.prediction,
            schedule=self.schedule,
            zero_terminal_snr=self.zero_terminal_snr,
            time_input=self.time_input,
        )

    def metadata(self) -> dict[str, str]:
        """Return what an exported file says of how it must be sampled."""
        values = {name: getattr(self, name) for name in SAMPLED}
        return {DIFFUSION_KEY: json.dumps(values)}

    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule of training."""
        return make_schedule(self.schedule, self.shift, zero_terminal_snr=self.zero_terminal_snr)

    def network_time(self, t: Tensor) -> Tensor:
        """Return what the network is told of times ``t``."""
        return t if self.time_input == "raw" else self.noise_schedule().network_time(t)


def learned_diffusion(metadata: Mapping[str, str], where: str) -> dict[str, object]:
    """Return what a stage's file says of how it was trained, by the names of ``SAMPLED``.

    Published files say nothing, and are epsilon on the cosine.

    Args:
        metadata: The file's.
        where: The file, for errors.
    """
    published = {name: getattr(DiffusionConfig(), name) for name in SAMPLED}
    return published | said_in(metadata, DIFFUSION_KEY, where)


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
    schedule, prediction = config.noise_schedule(), Prediction(config.prediction)

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
        network_time=config.network_time(t),
        target=target(prediction, x0, noise, alpha, sigma),
        weight=weight,
        t=t,
    )


def errors_by_sample(predicted: Tensor, noised: Noised, visible: Tensor | None = None) -> Tensor:
    """Return each sample's mean squared error (B,), in float32, where the network saw its input."""
    squared = (predicted.float() - noised.target).square()
    if visible is None:
        return squared.flatten(1).mean(dim=1)
    shown = visible.to(squared).expand_as(squared)
    return (squared * shown).flatten(1).sum(dim=1) / shown.flatten(1).sum(dim=1)


def denoising_loss(
    predicted: Tensor, noised: Noised, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (weighted loss, unweighted mean squared error), both scalars, in float32.

    Args:
        predicted: What the network said, ``(B, C, H, W)``.
        noised: What it was asked.
        visible: ``(B, 1, H, W)``: where it is 0, the network did not see its input, and what it
            says does not count.
    """
    error = errors_by_sample(predicted, noised, visible)  # (B,)
    return (error * noised.weight).mean(), error.mean().detach()


@torch.no_grad()
def errors_by_noise(predicted: Tensor, noised: Noised, levels: int = LEVELS) -> dict[str, Tensor]:
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


@torch.no_grad()
def published_errors(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    config: DiffusionConfig,
    draws: StepDraws,
) -> tuple[Tensor, Tensor]:
    """Return the published loss of each sample, whatever the network predicts.

    That is epsilon's squared error weighted by P2 on the unshifted cosine, at evenly spread times.
    In terms of the estimate of x0 it is ``alpha^2 |x0_hat - x0|^2``, so any network can be asked:
    it is given the same picture, noise and log-SNR on its own schedule.

    Args:
        network: Maps ``x_t (B, C, H, W)`` and its network time ``(B,)`` to a raw prediction.
        x0: Clean latents, ``(B, C, H, W)``.
        config: What the network was trained on.
        draws: Of this batch.

    Returns:
        The losses and the cosine's times, both ``(B,)``.
    """
    cosine, own = CosineSchedule(), config.noise_schedule()

    def spread(count: int, generator: torch.Generator) -> Tensor:
        return weighting.draw_t(count, generator, stratified=True)

    t = draws.share("validation t", len(x0), spread).to(x0.device)  # (B,)
    noise = draws.normal("validation noise", x0.shape).to(x0.device)
    own_t = own.time_from_log_snr(cosine.log_snr(t))
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in own(own_t))  # (B, 1, 1, 1)
    x_t = alpha * x0 + sigma * noise
    predicted = network(x_t, config.network_time(own_t)).float()
    x0_hat = to_x0(predicted, x_t, alpha, sigma, Prediction(config.prediction))
    error = (x0_hat - x0).square().flatten(1).mean(dim=1)  # (B,)
    return cosine(t)[0].square() * error, t
