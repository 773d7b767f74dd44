"""The denoising loss of the U-Nets: noise at published timesteps, and what is weighed and drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cascade.diffusion import weighting
from cascade.diffusion.discrete import NUM_TIMESTEPS, DiscreteSchedule, time_of
from cascade.diffusion.prediction import Prediction, target, to_x0
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY
from train.draws import StepDraws
from train.losses.denoising import Noised

_SAMPLED = ("prediction", "beta_start", "beta_end")


@dataclass(frozen=True)
class UNetDiffusionConfig:
    """How a U-Net's latents are noised, what it predicts, how its loss is weighted.

    The defaults are the published recipes' of SD, SDXL, BK-SDM and KOALA.
    """

    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    """What the network outputs (v in SD 2.1 of 768 pixels)."""
    beta_start: float = 0.00085
    """Noise that the first timestep adds."""
    beta_end: float = 0.012
    """Noise that the last timestep adds."""
    weight: Literal["constant", "min_snr"] = "constant"
    """Loss weight over log-SNR; it weighs the task and the distilled output alike."""
    min_snr_gamma: float = 5.0
    """Where "min_snr" clips the SNR (5 in the paper)."""
    timesteps: tuple[int, ...] = ()
    """Timesteps that are drawn from, 0 to 999; none: all of them. A step-distilled teacher knows
    its own grid alone: 999, 749, 499 and 249 for SDXL-Lightning and DMD2 of four steps."""
    stratified: bool = False
    """Spread the timesteps of a batch evenly: less noise in the gradient."""
    noise_offset: float = 0.0
    """Share of noise that is the same all over a channel of a picture (0 in the recipes)."""
    input_perturbation: float = 0.0
    """Share of noise that is in the network's input but not in its target (0 in the recipes)."""

    def __post_init__(self) -> None:
        """Refuse what is not on the schedule."""
        _ = self.schedule
        if any(not 0 <= timestep < NUM_TIMESTEPS for timestep in self.timesteps):
            raise ValueError(f"timesteps={self.timesteps} must lie in 0 to {NUM_TIMESTEPS - 1}")
        if not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive")
        if min(self.noise_offset, self.input_perturbation) < 0:
            raise ValueError(
                f"noise_offset={self.noise_offset} and input_perturbation="
                f"{self.input_perturbation} must not be negative"
            )

    def metadata(self) -> dict[str, str]:
        """Return what an exported file says of how it must be sampled."""
        return {UNET_DIFFUSION_KEY: json.dumps({name: getattr(self, name) for name in _SAMPLED})}

    @property
    def schedule(self) -> DiscreteSchedule:
        """The path from data to noise."""
        return DiscreteSchedule(self.beta_start, self.beta_end)


def noise_unet_batch(x0: Tensor, config: UNetDiffusionConfig, draws: StepDraws) -> Noised:
    """Draw timesteps and noise for a batch of clean latents.

    Args:
        x0: Clean latents, scaled, ``(B, 4, h, w)``.
        config: Schedule, prediction and weight.
        draws: Of this micro-batch; on the CPU, so that every device sees the same.

    Returns:
        The noised batch, whose network time is the timestep.
    """
    grid = torch.tensor(config.timesteps or range(NUM_TIMESTEPS))

    def draw(count: int, generator: torch.Generator) -> Tensor:
        u = weighting.draw_t(count, generator, stratified=config.stratified)
        return grid[(u * len(grid)).long().clamp(max=len(grid) - 1)]

    timesteps = draws.share("t", len(x0), draw).to(x0.device)  # (B,)
    noise = draws.normal("noise", x0.shape).to(x0.device)
    if config.noise_offset:
        offset = draws.normal("noise offset", (*x0.shape[:2], 1, 1)).to(x0.device)
        noise = noise + config.noise_offset * offset
    seen = noise
    if config.input_perturbation:
        other = draws.normal("input perturbation", x0.shape).to(x0.device)
        seen = noise + config.input_perturbation * other
    schedule, prediction = config.schedule, Prediction(config.prediction)
    t = time_of(timesteps)
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in schedule(t))  # (B, 1, 1, 1)
    weight = torch.ones_like(t)
    if config.weight == "min_snr":
        weight = weighting.min_snr(schedule.log_snr(t), config.min_snr_gamma, prediction)
    return Noised(
        x_t=alpha * x0 + sigma * seen,
        network_time=timesteps.float(),
        target=target(prediction, x0, noise, alpha, sigma),
        weight=weight,
        t=t,
    )


@torch.no_grad()
def published_unet_errors(
    predicted: Tensor, x0: Tensor, noised: Noised, config: UNetDiffusionConfig
) -> Tensor:
    """Return epsilon's squared error of each sample, ``(B,)``, whatever the network predicts.

    It is the published recipes' loss, so that networks of other recipes can be compared.

    Args:
        predicted: What the network said, ``(B, 4, h, w)``.
        x0: The clean latents.
        noised: What it was asked.
        config: What the network predicts.
    """
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in config.schedule(noised.t))
    kind = Prediction(config.prediction)
    x0_hat = to_x0(predicted.float(), noised.x_t, alpha, sigma, kind)
    # epsilon_hat - epsilon = alpha / sigma (x0 - x0_hat)
    error = (alpha / sigma).square() * (x0_hat - x0).square()
    return error.flatten(1).mean(dim=1)
