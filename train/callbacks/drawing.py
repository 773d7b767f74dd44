"""Pipelines that draw with a network while it learns; a model lends all that it does not train."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch
from PIL import Image
from torch import nn

from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings
from train.losses.unet_denoising import UNetDiffusionConfig


class Drawing(Protocol):
    """What draws a prompt with the network that learns."""

    @property
    def network_name(self) -> str:
        """Name of the network among those that the system exports."""
        ...

    image_size: int
    """Side of a picture in pixels."""

    def load(self, network: nn.Module, device: torch.device) -> None:
        """Load what the model lends; ``network`` is the one that learns.

        Raises:
            UserError: The model is not there, or does not fit the network.
        """
        ...

    def draw(self, network: nn.Module, prompt: str, seed: int) -> Image.Image:
        """Draw a prompt."""
        ...


class Sampled(Protocol):
    """A run's word on how its stage is sampled."""

    def sampled(self, sampling: StageSampling) -> StageSampling:
        """Return how, given how the model's own stage is."""
        ...


class CascadeDrawing:
    """Draws with Stage B or Stage C."""

    def __init__(
        self, model: str, stage: Literal["stage_b", "stage_c"], diffusion: Sampled
    ) -> None:
        """Take the model that lends the rest, which stage learns, and how."""
        self.model = model
        self.network_name = stage
        self.diffusion = diffusion
        self.image_size = 64
        self._pipeline: CascadePipeline | None = None

    def load(self, network: nn.Module, device: torch.device) -> None:
        """Load the other stages."""
        pipeline = CascadePipeline.from_folder(self.model, device=str(device))
        spec = pipeline.spec
        sampling = self.diffusion.sampled(getattr(spec, self.network_name))
        # The model's own stage may have been trained otherwise than the one that learns.
        if self.network_name == "stage_b":
            pipeline.spec = replace(spec, stage_b=sampling, stage_b_few=None)
        else:
            pipeline.spec = replace(spec, stage_c=sampling, stage_c_few=None)
        _check(
            self.model,
            self.network_name,
            getattr(pipeline, self.network_name),
            network,
            ("latent_channels", "text_pooled_channels"),
        )
        self.image_size = spec.image_size
        self._pipeline = pipeline

    def draw(self, network: nn.Module, prompt: str, seed: int) -> Image.Image:
        """Draw a prompt."""
        pipeline = self._pipeline
        assert pipeline is not None, "load() comes first"
        lent = getattr(pipeline, self.network_name)
        setattr(pipeline, self.network_name, network)
        try:
            return pipeline(prompt, seed=seed, progress=False).pictures[0]
        finally:
            setattr(pipeline, self.network_name, lent)


class UNetDrawing:
    """Draws with a U-Net."""

    network_name = "unet"

    def __init__(self, model: str, diffusion: UNetDiffusionConfig) -> None:
        """Take the model that lends the text encoders and the autoencoder, and how it learns."""
        self.model = model
        self.diffusion = diffusion
        self.image_size = 64
        self._pipeline: UNetPipeline | None = None

    def load(self, network: nn.Module, device: torch.device) -> None:
        """Load the text encoders and the autoencoder."""
        pipeline = UNetPipeline.from_pretrained(self.model, device=str(device))
        names = ("in_channels", "text_channels", "text_pooled_channels")
        _check(self.model, "U-Net", pipeline.unet, network, names)
        spec = pipeline.spec
        diffusion = self.diffusion
        sampling = replace(
            spec.sampling,
            prediction=diffusion.prediction,
            beta_start=diffusion.beta_start,
            beta_end=diffusion.beta_end,
        )
        pipeline.spec = replace(spec, sampling=sampling)
        self.image_size = spec.image_size
        self._pipeline = pipeline

    def draw(self, network: nn.Module, prompt: str, seed: int) -> Image.Image:
        """Draw a prompt."""
        pipeline = self._pipeline
        assert pipeline is not None, "load() comes first"
        lent = pipeline.unet
        pipeline.unet = network.to(lent.conv_in.weight.dtype)  # type: ignore[assignment]
        try:
            return pipeline(prompt, UNetSettings(seed=seed), progress=False).pictures[0]
        finally:
            pipeline.unet = lent


def _check(
    model: str, kind: str, lent: nn.Module, learning: nn.Module, names: tuple[str, ...]
) -> None:
    """Refuse a model whose other parts do not fit the network that learns."""
    for name in names:
        one = getattr(lent.config, name, None)
        other = getattr(learning.config, name, None)
        if one != other:
            raise UserError(
                f"pictures.model {model}: its {kind} has {name} {one}, the one that learns "
                f"{other}: its other parts do not fit"
            )
