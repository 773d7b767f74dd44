"""Classifier-free guidance: to a sampler it is a denoiser like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.prediction import Prediction, from_x0, to_x0

Denoise = Callable[[Tensor, Tensor], Tensor]
"""All that a sampler sees: ``(x_t, t) -> x0_hat``."""

Scale = float | Callable[[float], float]
"""A guidance scale, or one that depends on t."""


def unguided(denoiser: Denoiser, cond: Any) -> Denoise:
    """Bind a condition; one pass a step."""
    return lambda x_t, t: denoiser(x_t, t, cond)


def keeping(denoise: Denoise, x0: Tensor, kept: Tensor) -> Denoise:
    """Hold a part of the samples: there the estimate of x0 is the known one.

    Each sampler's step is a function of ``x_t`` and the estimate, so the kept part walks the
    forward process backwards, exactly, and ends at ``x0``; at every step the rest sees it with the
    right noise.

    Args:
        denoise: The estimate of the part that is not kept.
        x0: Known samples, ``(B, C, H, W)``; the start must be these, noised.
        kept: 1 where they are kept and 0 elsewhere; must broadcast to ``x0``.
    """
    return lambda x_t, t: torch.lerp(denoise(x_t, t), x0, kept)


def consistent(
    denoise: Denoise, network_time: Callable[[Tensor], Tensor], data_deviation: float = 0.5
) -> Denoise:
    """Make of an estimate of x0 a consistency function: the identity where there is no noise.

    Args:
        denoise: The estimate.
        network_time: Timestep of a time, 0 to 999.
        data_deviation: Standard deviation of the latents, as the training assumed.

    Reference: Luo et al., 2023, arXiv:2310.04378, eq. 9; timesteps are scaled by 10 as published.
    """

    def call(x_t: Tensor, t: Tensor) -> Tensor:
        scaled = 10.0 * float(network_time(t))
        skip = data_deviation**2 / (scaled**2 + data_deviation**2)
        out = scaled / (scaled**2 + data_deviation**2) ** 0.5
        return out * denoise(x_t, t) + skip * x_t

    return call


@dataclass(frozen=True)
class Guided:
    """Runs the conditional and the unconditional estimate as one batch and extrapolates.

    A step at which the scale is 1, or whose time lies outside ``interval``, costs one pass.

    References: Ho & Salimans, 2022, arXiv:2207.12598, eq. 6; rescale: Lin et al., 2023,
    arXiv:2305.08891, eq. 15-16, per picture; interval: Kynkäänniemi et al., 2024,
    arXiv:2404.07724.
    """

    denoiser: Denoiser
    cond: Any
    """The condition of B pictures."""
    cond_pair: Any
    """That condition and the unconditional one joined along the batch: 2B pictures."""
    scale: Scale
    """1 is the conditional estimate."""
    rescale: float = 0.0
    """Share of the estimate whose standard deviation is brought back to the conditional one's
    (0.7 in Stable Cascade)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times at which guidance is applied, both ends included."""

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the guided estimate of x0 for ``x_t`` of shape ``(B, C, H, W)``; t is a scalar."""
        time = float(t)
        scale = self.scale(time) if callable(self.scale) else self.scale
        if scale == 1.0 or not self.interval[0] <= time <= self.interval[1]:
            return self.denoiser(x_t, t, self.cond)
        x0_cond, x0_uncond = self.denoiser(torch.cat([x_t, x_t]), t, self.cond_pair).chunk(2)
        guided = torch.lerp(x0_uncond, x0_cond, scale)
        if self.rescale == 0.0:
            return guided
        return self._rescaled(guided, x0_cond, x_t, t)

    def _rescaled(self, guided: Tensor, x0_cond: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Rescale in epsilon, as published, but with each picture's own deviation."""
        if float(t) >= 1.0 and self.denoiser.schedule.ends_at_noise:
            # Pure noise says nothing of x0 through epsilon.
            ratio = self._deviation(x0_cond) / self._deviation(guided)
            return torch.lerp(guided, guided * ratio, self.rescale)
        alpha, sigma = self.denoiser.scales(t, x_t.device)
        eps = from_x0(guided, x_t, alpha, sigma, Prediction.EPSILON)
        eps_cond = from_x0(x0_cond, x_t, alpha, sigma, Prediction.EPSILON)
        ratio = self._deviation(eps_cond) / self._deviation(eps)
        eps = self.rescale * eps * ratio + (1.0 - self.rescale) * eps
        return to_x0(eps, x_t, alpha, sigma, Prediction.EPSILON)

    @staticmethod
    def _deviation(x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1, 1, 1)."""
        return x.std(dim=tuple(range(1, x.dim())), keepdim=True)
