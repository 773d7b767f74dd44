"""The semantic compressor by itself: an autoencoder whose decoder is the previewer.

Stage B then learns on the finished compressor's cached latents. The published recipe trains both
together; but a diffusion loss tells a compressor slowly what it forgot, and a plain decoder tells
it in every step. This is the cheap way to the same file, and the previewer comes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import step_draws
from train.initial import check_architecture
from train.losses.reconstruction import pixel_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class CompressorRun:
    """The training of the compressor with the previewer as its decoder; it needs no cache."""

    run: RunConfig
    data: DataConfig
    model: CompressorConfig | None = None
    """Sizes of the compressor; null: those of ``init_from``."""
    previewer: PreviewerConfig = field(default_factory=PreviewerConfig)
    latent_noise: float = 0.1
    """Standard deviation of the noise that the decoder sees on the latents, whose own is about 1
    before ``model.scale``: near latents must mean near pictures, or Stage C's small errors show."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str | None = None
    """Compressor to start with: a file in any layout, a model, or a hub id; the previewer starts
    anew."""

    def __post_init__(self) -> None:
        """Refuse networks that do not fit each other."""
        check_architecture(self)
        if self.latent_noise < 0:
            raise ValueError(f"latent_noise is {self.latent_noise}; it must not be negative")
        model = self.model
        if model is not None and self.previewer.latent_channels != model.latent_channels:
            raise ValueError(
                f"previewer.latent_channels is {self.previewer.latent_channels} but the "
                f"compressor's latents have {model.latent_channels}"
            )

    @property
    def sizes(self) -> CompressorConfig:
        """The compressor's, once they are known."""
        assert self.model is not None, "with_architecture comes first"
        return self.model


class CompressorSystem(LightningModule):
    """Wires the compressor, the previewer, their loss and optimizer."""

    def __init__(self, config: CompressorRun) -> None:
        """Build the networks."""
        super().__init__()
        self.config = config
        self.compressor = SemanticCompressor(config.sizes)
        self.previewer = Previewer(config.previewer)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"compressor": self.compressor, "previewer": self.previewer}

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Compress, disturb, decode; compare with the picture at the previewer's size."""
        draws = step_draws(self, self.config.run.seed, batch_idx)
        latents = self.compressor.encode(batch.require("pixels")).float()  # (B, 16, h, w)
        noise = draws.normal("latent noise", latents.shape).to(latents)
        std = self.config.latent_noise / self.config.sizes.scale
        predicted = self.previewer(latents + std * noise)  # (B, 3, u h, u w)
        small = F.interpolate(
            batch.require("pixels"), size=predicted.shape[-2:], mode="bilinear", antialias=True
        )
        loss = pixel_loss(predicted, small)
        log_means(self, {"loss": loss})
        return loss

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def configure_optimizers(self) -> Any:
        """Return the optimizer with its per-step schedule."""
        optimizer, schedule = make_optimizer(
            self.parameters(), self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
