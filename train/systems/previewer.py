"""The previewer: Stage C latents to a small picture, without Stage B."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from stages.previewer import Previewer, PreviewerConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.initial import check_architecture
from train.losses.reconstruction import pixel_loss
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig


@dataclass(frozen=True)
class PreviewerRun:
    """The training of the previewer on cached Stage C latents."""

    run: RunConfig
    data: DataConfig
    compressor: str
    """Semantic compressor's file, or a model with one; a cache must come from it."""
    model: PreviewerConfig | None = None
    """Sizes of the previewer; null: those of ``init_from``."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    init_from: str | None = None
    """Previewer to start with: a file in any layout, a model, or a hub id."""

    def __post_init__(self) -> None:
        """Refuse a run of no network."""
        check_architecture(self)

    @property
    def sizes(self) -> PreviewerConfig:
        """The network's, once they are known."""
        assert self.model is not None, "with_architecture comes first"
        return self.model


class PreviewerSystem(LightningModule):
    """Wires the previewer, its loss and optimizer."""

    def __init__(self, config: PreviewerRun) -> None:
        """Build the network."""
        super().__init__()
        self.config = config
        self.network = Previewer(config.sizes)

    def exported_networks(self) -> dict[str, nn.Module]:
        """Return what is averaged and exported."""
        return {"previewer": self.network}

    def training_step(self, batch: CachedBatch, batch_idx: int) -> Tensor:
        """Predict the picture at the previewer's size, compare."""
        predicted = self.network(batch.require("stage_c_latents"))
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
            self.network.parameters(), self.config.optim, self.config.run.max_steps
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
