"""How much device memory the parts of a U-Net's pipeline take; see ``memory``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from cascade.checkpoints.files import on_meta
from cascade.pipelines.memory import Footprint, encoding_bytes, kept_between_steps, weight_bytes
from cascade.pipelines.memory_peak import peak_bytes
from cascade.pipelines.memory_plan import MemoryPlan
from cascade.pipelines.offload import Memory, batches_up_to
from cascade.pipelines.placement import UNetDtypes
from cascade.pipelines.sampling import Start
from cascade.pipelines.tiles import BLENDED_TILE_CELLS, blended_margin
from cascade.pipelines.unet_parts import UNetParts
from cascade.pipelines.unet_plan import UNetPlan
from cascade.pipelines.unet_sampling import UNetPrompted, sample_unet
from cascade.pipelines.unet_spec import UNetSampling
from cascade.rng import PictureNoise
from cascade.text.encoder import TextEncoder
from stages.autoencoder_kl import AutoencoderKL
from stages.int8 import unpacked_bytes
from stages.unet.attention import TransformerBlock
from stages.unet.config import NUM_SIZES
from stages.unet.resnet import ResnetBlock
from stages.unet.unet import UNet, UNetCondition


@dataclass(frozen=True)
class UNetWorkload:
    """What a U-Net works on for one picture."""

    sampling: UNetSampling
    """Guidance doubles its batch."""
    latent_shape: tuple[int, int, int]
    """Channels, height and width of the latents."""
    text_length: int
    """Tokens of a prompt's states, over all its windows."""
    from_picture: bool = False
    """Whether a picture is encoded first, whose latents the sampling starts from."""


class UNetMemory(Memory):
    """The memory of a U-Net's pipeline."""

    def __init__(self, parts: UNetParts, device: torch.device, dtypes: UNetDtypes) -> None:
        """Take the loaded parts."""
        self._parts = parts
        self._dtypes = dtypes
        encoders = {"text": parts.text}
        if parts.text_2 is not None:
            encoders["text_2"] = parts.text_2
        networks: dict[str, nn.Module] = {"unet": parts.unet, "autoencoder": parts.autoencoder}
        super().__init__(networks, encoders, device)

    def arrange(
        self,
        plan: UNetPlan,
        latent_shape: tuple[int, int, int],
        batch_size: int | None,
        most: int,
    ) -> MemoryPlan:
        """Pick and apply the memory plan for a run; without a budget the mode's is kept.

        Args:
            plan: The pictures.
            latent_shape: Channels, height and width of the latents.
            batch_size: Pictures that must run together; None: up to ``most``.
            most: The most that run together by themselves.

        Raises:
            UserError: If nothing fits.
        """
        length = self.text_length(plan) if self.has_budget else 0
        from_picture = plan.picture is not None
        workload = UNetWorkload(plan.sampling, latent_shape, length, from_picture)

        def sizes(parts: Mapping[str, nn.Module]) -> Mapping[str, Footprint]:
            return unet_footprints(self._parts, self._dtypes, workload)

        return self.keep_to_budget(
            workload,
            sizes,
            batches_up_to(most, plan, batch_size),
            what=f"{plan.width}x{plan.height}",
            cell=self._parts.autoencoder.downscale,
        )


def unet_footprints(
    parts: UNetParts, dtypes: UNetDtypes, workload: UNetWorkload
) -> dict[str, Footprint]:
    """Compute what each part takes, in bytes; takes seconds, and no memory to speak of.

    Args:
        parts: The loaded parts; their weights are only counted.
        dtypes: Number formats.
        workload: The picture.
    """
    encoders = [("text", parts.text)]
    if parts.text_2 is not None:
        encoders.append(("text_2", parts.text_2))
    sizes = {
        name: Footprint(*weight_bytes(one.model), encoding_bytes(one, workload.text_length))
        for name, one in encoders
    }
    with on_meta():
        unet = UNet(parts.unet.config).to(dtypes.unet).eval()
        autoencoder = AutoencoderKL(parts.autoencoder.config).to(dtypes.autoencoder).eval()
    sizes["unet"] = Footprint(
        *weight_bytes(parts.unet),
        _drawing(unet, [one for _, one in encoders], workload) + unpacked_bytes(parts.unet),
    )
    _, height, width = workload.latent_shape
    sizes["autoencoder"] = Footprint(
        *weight_bytes(parts.autoencoder),
        _decoding(autoencoder, workload.latent_shape, None),
        {
            tile: _decoding(autoencoder, workload.latent_shape, tile)
            for tile in BLENDED_TILE_CELLS
            if tile < max(height, width)
        },
        tiles_differ=True,
    )
    if workload.from_picture:
        sizes["autoencoder_encoder"] = Footprint(
            *weight_bytes(parts.autoencoder),
            _encoding(autoencoder, workload.latent_shape, None),
            {
                tile: _encoding(autoencoder, workload.latent_shape, tile)
                for tile in BLENDED_TILE_CELLS
                if tile < max(height, width)
            },
            tiles_differ=True,
            of="autoencoder",
        )
    return sizes


def _encoding(twin: AutoencoderKL, latent_shape: tuple[int, int, int], tile: int | None) -> int:
    """Bytes of one picture's encoding, its pixels among them; with tiles those of a tile."""
    sides = _window(latent_shape, tile)
    window = (1, 3, *(twin.downscale * side for side in sides))
    of_window = peak_bytes(lambda: twin.posterior(torch.empty(window, device="meta")))
    # Of tiles: the sums of both moments, and what they are divided by.
    put_together = 0 if tile is None else 4 * 3 * math.prod(latent_shape)
    return of_window + put_together


def _window(latent_shape: tuple[int, int, int], tile: int | None) -> tuple[int, int]:
    """Return the latent cells that the autoencoder sees at once."""
    _, height, width = latent_shape
    if tile is None:
        return height, width
    side = tile + 2 * blended_margin(tile)
    return min(side, height), min(side, width)


def _decoding(twin: AutoencoderKL, latent_shape: tuple[int, int, int], tile: int | None) -> int:
    """Bytes of one picture's decoding; what tiles are put together in is on the CPU."""
    window = (1, latent_shape[0], *_window(latent_shape, tile))
    of_window = peak_bytes(lambda: twin.decode(torch.empty(window, device="meta")))
    return of_window if tile is None else of_window + 4 * math.prod(latent_shape)


def _drawing(twin: UNet, encoders: list[TextEncoder], workload: UNetWorkload) -> int:
    """Bytes of the sampling; a step looks at no values, of which there are none."""
    sampling = replace(
        workload.sampling,
        sampler="ddim",
        spacing="trailing",
        steps=1,
        guidance_interval=(0.0, 1.0),
    )

    def told() -> UNetCondition:
        width = sum(one.hidden_channels for one in encoders)
        hidden = torch.empty(1, workload.text_length, width, device="meta")
        pooled_channels = twin.config.text_pooled_channels
        if pooled_channels is None:
            return UNetCondition(hidden)
        pooled = torch.empty(1, pooled_channels, device="meta")
        return UNetCondition(hidden, pooled, torch.empty(1, NUM_SIZES, device="meta"))

    def start() -> Start | None:
        if not workload.from_picture:
            return None
        return Start(torch.empty(1, *workload.latent_shape, device="meta"))

    in_a_step = peak_bytes(
        lambda: sample_unet(
            twin,
            sampling,
            UNetPrompted(told(), told()),
            PictureNoise([0]),
            workload.latent_shape,
            start=start(),
        )
    )
    tables = _tables(twin, workload)
    return cast(int, in_a_step + tables + kept_between_steps(workload.latent_shape))


def _tables(twin: UNet, workload: UNetWorkload) -> int:
    """Bytes prepared for all steps beyond those of one guided step."""
    sampling = workload.sampling
    guided = sampling.guidance != 1
    alone = guided and sampling.guidance_interval != (0.0, 1.0)  # the prompt's alone as well
    rows = 1 if twin.add_embedding is None else 1 + guided + alone
    numbers = 0
    for module in twin.modules():
        if isinstance(module, ResnetBlock):
            numbers += module.conv1.out_channels * ((sampling.steps - 1) * rows + alone)
        elif isinstance(module, TransformerBlock) and alone:
            numbers += 2 * module.attn2.to_k.out_features * workload.text_length
    return numbers * next(twin.parameters()).element_size()
