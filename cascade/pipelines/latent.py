"""Stage C on an autoencoder's latents: prompt -> latents -> pixels, without Stages B and A.

It is what a cascade is compared with at equal bytes: the same network, drawn by the same sampler,
on the latents of an f8 autoencoder. ``patch_size`` 2 of Stage C is the pixel unshuffle that makes
16 channels of 8 x 8 of 4 of 16 x 16: the same numbers, seen as larger cells.

The folder holds ``latent.json``, ``stage_c`` and ``autoencoder_kl`` as ``.safetensors``, ``text/``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cascade.checkpoints.files import (
    atomic_write_text,
    file_hash,
    load_network,
    read_metadata,
)
from cascade.checkpoints.readers import read_json
from cascade.config import from_dict, to_dict
from cascade.errors import UserError
from cascade.images import pixels_to_images
from cascade.pipelines.files_hash import hash_of_files, text_files
from cascade.pipelines.finite import check_finite, check_not_black
from cascade.pipelines.loaded import GPU_BATCH_SIZE
from cascade.pipelines.placement import UNetDtypes, pick_device, pick_dtype
from cascade.pipelines.plan import Plan
from cascade.pipelines.prompts import PromptStates, batches_of
from cascade.pipelines.results import Picture, text_of
from cascade.pipelines.sampling import sample_stage_c
from cascade.pipelines.spec import (
    SPEC_FILE,
    CascadeSpec,
    StageSampling,
    check_name,
    check_sizes,
)
from cascade.pipelines.trained import check_as_trained, trained_stage
from cascade.pipelines.unet_spec import UNET_SPEC_FILE
from cascade.pipelines.watch import Clock, Watch
from cascade.rng import PictureNoise
from cascade.text.encoder import TextConfig, TextEncoder
from stages.autoencoder_kl import AutoencoderKL
from stages.stage_c import StageC

LATENT_SPEC_FILE = "latent.json"
NETWORKS: dict[str, type[nn.Module]] = {"stage_c": StageC, "autoencoder_kl": AutoencoderKL}
"""The files of a folder, and what they hold."""


@dataclass(frozen=True)
class LatentSpec:
    """Everything about such a model that its networks' files do not say."""

    name: str
    image_size: int
    """Width and height that it was trained at, in pixels."""
    size_multiple: int = 32
    """Widths and heights are multiples of this many pixels."""
    min_size: int = 64
    max_size: int = 4096
    stage_c: StageSampling = field(default_factory=StageSampling)
    """Sampling of Stage C."""
    text: TextConfig = field(default_factory=TextConfig)
    """Which text states it was trained on."""
    licence: str = ""

    def __post_init__(self) -> None:
        """Refuse a name that is no file's, and sizes that contradict each other."""
        check_name(self.name)
        check_sizes(self.min_size, self.image_size, self.max_size, self.size_multiple)

    def cascade(self, downscale: int) -> CascadeSpec:
        """Return it as a plan of pictures reads it; nothing of Stage B is used."""
        return CascadeSpec(
            name=self.name,
            image_size=self.image_size,
            pixels_per_stage_c_cell=float(downscale),
            size_multiple=self.size_multiple,
            min_size=self.min_size,
            max_size=self.max_size,
            stage_c=self.stage_c,
            text=self.text,
            licence=self.licence,
        )


def is_latent(folder: Path) -> bool:
    """Tell whether a folder holds such a model."""
    return (folder / LATENT_SPEC_FILE).is_file()


def load_latent_spec(folder: Path) -> LatentSpec:
    """Read ``latent.json``.

    Raises:
        UserError: If it is not valid, or not the only settings of a model in the folder.
    """
    path = folder / LATENT_SPEC_FILE
    for other in (SPEC_FILE, UNET_SPEC_FILE):
        if (folder / other).is_file():
            raise UserError(
                f"{path}: {other} lies beside it, and a folder is one model; remove the one that "
                "is not meant"
            )
    return from_dict(LatentSpec, read_json(path), str(path))


def save_latent_spec(spec: LatentSpec, folder: Path) -> None:
    """Write ``latent.json`` into a folder, at once or not at all."""
    atomic_write_text(folder / LATENT_SPEC_FILE, json.dumps(to_dict(spec), indent=2) + "\n")


class LatentPipeline:
    """A loaded model; pictures of a batch are made as a cascade makes them."""

    def __init__(self, folder: str | Path, *, device: str = "auto", dtype: str = "auto") -> None:
        """Load a folder; nothing is downloaded.

        Args:
            folder: The model's, which ``is_latent``.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            dtype: Number format of Stage C; the autoencoder and the text encoder are float32.

        Raises:
            UserError: If something is missing or does not fit.
        """
        self.folder = Path(folder)
        path = self.folder / LATENT_SPEC_FILE
        own = load_latent_spec(self.folder)
        self.device = pick_device(device)
        self.dtypes = UNetDtypes(pick_dtype(dtype, self.device), torch.float32, torch.float32)
        self.stage_c: StageC = load_network(
            self.folder / "stage_c.safetensors",
            expect=StageC,
            device=self.device,
            dtype=self.dtypes.unet,
        )
        self.autoencoder: AutoencoderKL = load_network(
            self.folder / "autoencoder_kl.safetensors",
            expect=AutoencoderKL,
            device=self.device,
            dtype=torch.float32,
        )
        self.text = TextEncoder.from_folder(self.folder / "text", own.text, device=self.device)
        self._check_fit()
        weights = self.folder / "stage_c.safetensors"
        trained = trained_stage(read_metadata(weights), str(weights))
        check_as_trained(own.stage_c, trained, str(weights), f"{path}: stage_c.")
        self.spec = own.cascade(self.autoencoder.downscale)
        cell = self.autoencoder.downscale * self.stage_c.config.patch_size
        if self.spec.size_multiple % cell:
            raise UserError(
                f"{path}: size_multiple is {self.spec.size_multiple}, but the autoencoder and "
                f"Stage C together need multiples of {cell} pixels"
            )

    def _check_fit(self) -> None:
        config = self.stage_c.config
        meetings = [
            ("the text encoder's states", self.text.hidden_channels, config.text_channels),
            ("its pooled state", self.text.pooled_channels, config.text_pooled_channels),
            (
                "the autoencoder's latents",
                self.autoencoder.config.latent_channels,
                config.latent_channels,
            ),
        ]
        for what, made, wanted in meetings:
            if made != wanted:
                raise UserError(
                    f"{self.folder}: {what}: {made} channels, but Stage C was made for {wanted}; "
                    "the files belong to different models"
                )

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that make a picture of a prompt."""
        return {"text": self.text.model, "stage_c": self.stage_c, "autoencoder": self.autoencoder}

    @cached_property
    def weights_hash(self) -> str:
        """12 hex digits that tell its weights and settings from others."""
        own = [LATENT_SPEC_FILE, *(f"{name}.safetensors" for name in NETWORKS)]
        text = self.folder / "text"
        paths = [*(self.folder / name for name in own), *text_files(text, text)]
        return hash_of_files(self.folder, paths, file_hash)

    def run(
        self, plan: Plan, *, batch_size: int | None = None, progress: bool | None = None
    ) -> Iterator[Picture]:
        """Make a plan's pictures one after the other and give each as soon as it is finished.

        Raises:
            UserError: If ``batch_size`` is below 1, or the plan is of a picture.
            NonFiniteError: If a network gives values that are not finite.
        """
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size {batch_size} must be at least 1")
        if plan.picture is not None or plan.control is not None:
            raise UserError(f"{self.folder}: this model makes pictures of prompts alone")
        if batch_size is None:
            batch_size = 1 if self.device.type == "cpu" else GPU_BATCH_SIZE
        prompts = [request.prompt for request in plan.requests]
        states = PromptStates(self.text, ahead=[*prompts, plan.negative_prompt])
        for batch in batches_of(plan, [states], batch_size):
            watch = Watch(batch, len(plan.requests), progress, None, 1)
            yield from self._make_batch(plan, states, watch)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn latents into pixels ``(B, 3, H, W)``, float32 in [0, 1], on the device.

        Raises:
            NonFiniteError: If a value is not finite.
        """
        pixels = torch.cat([self.autoencoder.decode(one) for one in latents.split(1)])
        check_finite(pixels, "the autoencoder", torch.float32)
        return pixels.clamp(0, 1)

    @torch.inference_mode()
    def _make_batch(self, plan: Plan, states: PromptStates, watch: Watch) -> list[Picture]:
        requests = [plan.requests[index] for index in watch.batch]
        clock = Clock(self.device)
        with clock("text"):
            prompted = states.pair([one.prompt for one in requests], plan.negative_prompt)
        with clock("stage_c"), watch.stage("Stage C", plan.stage_c.steps) as count:
            latents = sample_stage_c(
                self.stage_c,
                plan.stage_c,
                prompted,
                PictureNoise([one.seed for one in requests], "stage_c"),
                self.spec.stage_c_size((plan.height, plan.width)),
                on_step=count,
            )
        with clock("autoencoder"):
            pixels = self.decode(latents).cpu()
        check_not_black(pixels, torch.float32, "the autoencoder")
        seconds = {name: value / len(requests) for name, value in clock.seconds.items()}
        return [
            Picture(
                image=image,
                pixels=pixels[row],
                prompt=request.prompt,
                seed=request.seed,
                seconds=seconds,
                metadata=text_of(
                    plan,
                    watch.batch[row],
                    {"stage_c": asdict(plan.stage_c)},
                    model=self.spec.name,
                    weights=self.weights_hash,
                    dtype=str(self.dtypes.unet).removeprefix("torch."),
                ),
            )
            for row, (request, image) in enumerate(
                zip(requests, pixels_to_images(pixels), strict=True)
            )
        ]
