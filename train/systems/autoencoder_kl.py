"""AutoencoderKL: reconstruct pictures through the latents of a U-Net.

Reference: Rombach et al., 2022, arXiv:2112.10752, section 3.1 and appendix G.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cascade.checkpoints.files import save_network
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from train.draws import StepDraws
from train.losses.reconstruction import kl_to_normal, pixel_loss
from train.reduction import num_ranks, summed
from train.systems.adversarial import (
    AdversarialSystem,
    AutoencoderLoss,
    AutoencoderRun,
    Reconstruction,
)


@dataclass(frozen=True)
class AutoencoderKLLoss(AutoencoderLoss):
    """Weights of the autoencoder's terms."""

    distance: Literal["l1", "mse"] = "l1"
    """Of the pixels: mean absolute or mean squared error (LDM: the first)."""
    kl: float = 1e-6
    """KL divergence of the posterior from a standard normal: summed over a picture's latent values
    and divided by its number of pixel values, as the pixels' distance is (LDM: 1e-6 of one sum
    beside the other)."""


@dataclass(frozen=True)
class AutoencoderKLRun(AutoencoderRun):
    """The training of an AutoencoderKL."""

    model: AutoencoderKLConfig | None = None
    """Sizes of the autoencoder; null: those of ``init_from``."""
    loss: AutoencoderKLLoss = field(default_factory=AutoencoderKLLoss)
    measure_scale: bool | None = None
    """Whether the exported ``scale`` is one over the deviation that the latents had in training;
    false keeps ``model.scale``. null: measured, but with ``init_from`` kept, because there may be
    U-Nets that know its latents."""

    @property
    def sizes(self) -> AutoencoderKLConfig:
        """The network's, once they are known."""
        assert self.model is not None, "with_architecture comes first"
        return self.model

    @property
    def measures_scale(self) -> bool:
        """Whether the exported scale is measured."""
        return self.init_from is None if self.measure_scale is None else self.measure_scale


class AutoencoderKLSystem(AdversarialSystem):
    """The autoencoder, trained on samples of its posterior, and how far its latents spread."""

    config: AutoencoderKLRun
    network: AutoencoderKL

    def __init__(self, config: AutoencoderKLRun) -> None:
        """Build the networks."""
        super().__init__(config, AutoencoderKL(config.sizes))
        # The window of the averaged weights, whose latents' deviation it is.
        self.spread = RunningDeviation(config.run.ema_decay)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"autoencoder_kl": self.network}

    def reconstruct(self, pixels: Tensor, draws: StepDraws) -> Reconstruction:
        """Decode a sample of the posterior."""
        loss, sizes = self.config.loss, self.network.config
        posterior = self.network.posterior(pixels)
        latents = posterior.sample(lambda mean: draws.normal("posterior", mean.shape).to(mean))
        decoded = self.network.decode((latents - sizes.shift) * sizes.scale)
        self._note_spread(latents.detach())
        divergence = kl_to_normal(posterior.mean, posterior.log_variance).mean()
        return Reconstruction(
            decoded,
            {
                "pixels": loss.pixels * pixel_loss(decoded, pixels, loss.distance),
                "kl": loss.kl * divergence / pixels[0].numel(),
            },
        )

    @property
    def scale(self) -> float:
        """What the exported autoencoder multiplies its latents by."""
        measured = self.config.measures_scale and int(self.spread.updates) > 0
        return 1.0 / self.spread.deviation if measured else self.config.sizes.scale

    def export_network(
        self, out: Path, name: str, network: nn.Module, dtype: torch.dtype, metadata: dict[str, str]
    ) -> None:
        """Write the autoencoder with the scale of its latents."""
        exported = cast(AutoencoderKL, network)
        exported.config = replace(exported.config, scale=self.scale)
        save_network(out / f"{name}.safetensors", exported, dtype=dtype, metadata=metadata)

    def _note_spread(self, latents: Tensor) -> None:
        """Follow the latents of all ranks."""
        mean = summed(latents.mean()) / num_ranks()
        variance = summed((latents - mean).square().mean()) / num_ranks()
        self.spread.update(mean, variance)
        self.log("latent_deviation", self.spread.variance.sqrt())


class RunningDeviation(nn.Module):
    """Standard deviation of the latest batches, each step weighing less than the one after it.

    Its buffers are part of the run's checkpoint: a run that goes on measures on.
    """

    updates: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, decay: float) -> None:
        """Take the final decay; it is warmed up as that of the averaged weights."""
        super().__init__()
        self.decay = decay
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))

    @property
    def deviation(self) -> float:
        """Square root of the weighted variance around the weighted mean."""
        return float(self.variance.sqrt())

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Add a batch's; one that is not finite, whose step is left out as well, counts nothing.

        Reference: West, 1979, doi:10.1145/359146.359153: no difference of large squares is taken.
        """
        updates = self.updates.float()
        decay = ((1 + updates) / (10 + updates)).clamp(max=self.decay)
        share = torch.where(updates == 0, 1.0, 1.0 - decay)
        away = mean - self.mean
        spread = (1 - share) * (self.variance + share * away.square()) + share * variance
        finite = mean.isfinite() & variance.isfinite()
        self.mean.copy_(torch.where(finite, self.mean + share * away, self.mean))
        self.variance.copy_(torch.where(finite, spread, self.variance))
        self.updates.add_(finite.long())
