"""Stage A: reconstruct pictures through a 4x smaller latent."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from stages.stage_a import StageA, StageAConfig
from train.draws import StepDraws
from train.losses.reconstruction import pixel_loss
from train.systems.adversarial import (
    AdversarialSystem,
    AutoencoderLoss,
    AutoencoderRun,
    Reconstruction,
)


@dataclass(frozen=True)
class StageALoss(AutoencoderLoss):
    """Weights of Stage A's terms (the paper's: 1, 0.1 and 0, then 0.01).

    ``pixels`` weighs the mean squared error.
    """

    codebook: float = 1.0
    """Distance of the codes from the latents."""
    commitment: float = 0.25
    """Distance of the latents from their codes."""


@dataclass(frozen=True)
class StageARun(AutoencoderRun):
    """The training of Stage A; the paper's crops are of 128."""

    model: StageAConfig | None = None
    """Sizes of Stage A; null: those of ``init_from``."""
    loss: StageALoss = field(default_factory=StageALoss)
    quantize: float = 0.9
    """Share of the steps that decode the quantized latents (the paper drops it with 0.1)."""

    @property
    def sizes(self) -> StageAConfig:
        """The network's, once they are known."""
        assert self.model is not None, "with_architecture comes first"
        return self.model


class StageASystem(AdversarialSystem):
    """Stage A, sometimes through its codebook and sometimes past it."""

    config: StageARun
    network: StageA

    def __init__(self, config: StageARun) -> None:
        """Build the networks."""
        super().__init__(config, StageA(config.sizes))

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"stage_a": self.network}

    def reconstruct(self, pixels: Tensor, draws: StepDraws) -> Reconstruction:
        """Encode and decode, quantized in a share of the steps."""
        loss = self.config.loss
        output = self.network(pixels, quantize=draws.scalar("quantize") < self.config.quantize)
        return Reconstruction(
            output.pixels,
            {
                "pixels": loss.pixels * pixel_loss(output.pixels, pixels),
                "codebook": loss.codebook * output.codebook_loss,
                "commitment": loss.commitment * output.commitment_loss,
            },
        )
