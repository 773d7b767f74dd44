"""What the training of both autoencoders shares: pixels, features and a discriminator's verdict."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from stages.discriminator import Discriminator, DiscriminatorConfig
from train.data.cached import CachedBatch
from train.data.config import DataConfig
from train.draws import StepDraws, step_draws
from train.initial import check_architecture
from train.losses.reconstruction import (
    feature_distance,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from train.networks import configure_networks
from train.optim import make_optimizer
from train.reduction import log_means
from train.settings import OptimConfig, RunConfig
from train.steps import steps_done
from train.systems.clip_features import FrozenClipFeatures


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the terms that both autoencoders have."""

    pixels: float = 1.0
    """Distance of the pixels, which are in [0, 1]."""
    perceptual: float = 0.1
    """Distance of the features of a CLIP vision tower trained here."""
    perceptual_layers: tuple[int, ...] = (1, 3)
    """Hidden states of the vision tower that are compared (0 is the patch embedding)."""
    adversarial: float = 0.01
    """The decoder's share of the discriminator's verdict."""
    adversarial_from_step: int = 10_000
    """Step at which the discriminator starts to learn and to count."""


@dataclass(frozen=True)
class AutoencoderRun:
    """What the training of either autoencoder says."""

    run: RunConfig
    data: DataConfig
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crop: int = 128
    """Side of the random crops that are trained on."""
    clip: str | None = None
    """CLIP folder for the perceptual term; needed unless its weight is 0."""
    init_from: str | None = None
    """Autoencoder to start with: a file or folder in any layout, a model, or a hub id."""

    def __post_init__(self) -> None:
        """The perceptual term needs a network."""
        check_architecture(self)
        if self.loss.perceptual > 0 and self.clip is None:
            raise ValueError(f"loss.perceptual is {self.loss.perceptual} but clip names no folder")


@dataclass(frozen=True)
class Reconstruction:
    """What an autoencoder makes of a batch."""

    pixels: Tensor
    """(B, 3, H, W), about [0, 1]."""
    terms: dict[str, Tensor]
    """The autoencoder's own terms of the loss by name, weighted: scalars."""


class AdversarialSystem(LightningModule, ABC):
    """Wires an autoencoder, the discriminator, the feature network and two optimizers."""

    num_optimizers = 2

    def __init__(self, config: AutoencoderRun, network: nn.Module) -> None:
        """Take the autoencoder and build what judges it."""
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.network = network
        self.discriminator = Discriminator(config.discriminator)
        self.features: FrozenClipFeatures | None = None
        if config.clip is not None and config.loss.perceptual > 0:
            self.features = FrozenClipFeatures(config.clip, config.loss.perceptual_layers)

    @abstractmethod
    def reconstruct(self, pixels: Tensor, draws: StepDraws) -> Reconstruction:
        """Encode and decode ``pixels``, (B, 3, H, W) in [0, 1]."""

    def training_step(self, batch: CachedBatch, batch_idx: int) -> None:
        """Step the autoencoder, then the discriminator once its time has come."""
        config, loss = self.config, self.config.loss
        draws = step_draws(self, config.run.seed, batch_idx)
        pixels = random_crops(batch.require("pixels"), config.crop, draws)
        adversarial = self.step_kind == "adversarial"
        output = self.reconstruct(pixels, draws)

        terms = dict(output.terms)
        if self.features is not None:
            distance = feature_distance(self.features(output.pixels), self.features(pixels))
            terms["perceptual"] = loss.perceptual * distance
        if adversarial:
            fake = self.discriminator(output.pixels)
            terms["adversarial"] = loss.adversarial * hinge_generator_loss(fake)
        total = torch.stack(list(terms.values())).sum()

        first, second = self.optimizers()  # type: ignore[attr-defined]
        first.zero_grad()
        self.manual_backward(total)
        self.clip(first)
        first.step()
        verdict = torch.zeros((), device=self.device)
        if adversarial:
            second.zero_grad()
            verdict = hinge_discriminator_loss(
                self.discriminator(pixels), self.discriminator(output.pixels.detach())
            )
            self.manual_backward(verdict)
            self.clip(second)
        second.step()
        for schedule in self.lr_schedulers():  # type: ignore[union-attr]
            schedule.step()
        log_means(self, {"loss": total, "discriminator": verdict, **terms})

    @property
    def step_kind(self) -> str:
        """What the present step computes: "plain", or "adversarial" with the discriminator."""
        loss = self.config.loss
        begun = steps_done(self, self.trainer) >= loss.adversarial_from_step
        return "adversarial" if begun and loss.adversarial > 0 else "plain"

    def clip(self, optimizer: Any) -> None:
        """Clip the gradients that ``optimizer`` is about to apply."""
        if self.config.optim.grad_clip > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.config.optim.grad_clip)

    def configure_model(self) -> None:
        """Recompute, compile or cut the blocks, as ``run`` says."""
        configure_networks(self, self.config.run)

    def configure_optimizers(self) -> Any:
        """Return two optimizers, each with its schedule."""
        steps = self.config.run.max_steps
        ours = make_optimizer(self.network.parameters(), self.config.optim, steps)
        theirs = make_optimizer(self.discriminator.parameters(), self.config.optim, steps)
        return [ours[0], theirs[0]], [ours[1], theirs[1]]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen feature network out of the checkpoint."""
        state = checkpoint["state_dict"]
        for key in [key for key in state if key.startswith("features.")]:
            del state[key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the feature network back, so that loading stays strict."""
        own = copy.copy(self.state_dict())
        checkpoint["state_dict"].update(
            {key: value for key, value in own.items() if key.startswith("features.")}
        )


def random_crops(pixels: Tensor, size: int, draws: StepDraws) -> Tensor:
    """Cut a random square out of each picture.

    Args:
        pixels: Shape ``(B, 3, H, W)``.
        size: Side of the squares; at most ``min(H, W)``.
        draws: Of this micro-batch.

    Returns:
        Shape ``(B, 3, size, size)``.
    """
    height, width = pixels.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"crop is {size} but the pictures are {width}x{height}; make it smaller")
    if size == height == width:
        return pixels
    places = [
        (draws.uniform(name, len(pixels)) * (side - size + 1)).long().tolist()
        for name, side in (("crop top", height), ("crop left", width))
    ]
    crops = [
        picture[:, top : top + size, left : left + size]
        for picture, top, left in zip(pixels, *places, strict=True)
    ]
    return torch.stack(crops)
