"""``pipeline.json``: how a U-Net is sampled, and what it is told beside its prompt.

Folders of U-Nets are diffusers' folders; this file beside ``model_index.json`` says what they have
no place for. Of published folders, which lack it, see ``unet_published``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_write_text
from cascade.checkpoints.readers import read_json
from cascade.checkpoints.said import said_in
from cascade.config import from_dict, to_dict
from cascade.diffusion.discrete import (
    NUM_TIMESTEPS,
    DiscreteSchedule,
    Spacing,
    lcm_timesteps,
    spaced_timesteps,
    time_of,
)
from cascade.diffusion.prediction import Prediction
from cascade.diffusion.samplers import Sampler, sample_ddim, sample_dpmpp_2m, sample_lcm
from cascade.pipelines.sampling import Walk
from cascade.pipelines.spec import MAX_GUIDANCE, check_interval, check_name, check_sizes
from cascade.text.encoder import TextConfig

UNET_SPEC_FILE = "pipeline.json"
UNET_DIFFUSION_KEY = "cascade_unet_diffusion"
"""Metadata of a file that was trained here: what its U-Net predicts, and on which schedule."""
UNET_TEACHER_KEY = "cascade_student_teacher"
"""Metadata of a student that was made here: its teacher's name and the hash of its weights."""
UNetSampler = Literal["euler", "euler_ancestral", "ddim", "dpmpp_2m", "lcm"]
UNET_SAMPLERS: tuple[UNetSampler, ...] = ("euler", "euler_ancestral", "ddim", "dpmpp_2m", "lcm")
SPACINGS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")


def learned_prediction(metadata: Mapping[str, str], where: str) -> str | None:
    """Return what a file's U-Net says that it predicts; None: it does not say.

    Raises:
        UserError: If the metadata of the file ``where`` are damaged.
    """
    said = said_in(metadata, UNET_DIFFUSION_KEY, where).get("prediction")
    return None if said is None else str(said)


@dataclass(frozen=True)
class UNetSampling:
    """How a U-Net is sampled unless the user says otherwise; the defaults are SDXL's."""

    sampler: UNetSampler = "euler"
    """Sampler; "lcm" is for networks that were distilled to it."""
    steps: int = 50
    """Network evaluations, of which guidance makes twice as many."""
    guidance: float = 5.0
    """Classifier-free guidance scale; 1 switches guidance off."""
    rescale: float = 0.0
    """Share of the guided prediction that is brought back to the conditional one's spread."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Diffusion times between which guidance is applied, both included; a step outside costs one
    pass. Reference: Kynkäänniemi et al., 2024, arXiv:2404.07724."""
    spacing: Spacing = "leading"
    """Where the timesteps lie; "lcm" has its own."""
    steps_offset: int = 1
    """Added to the timesteps of "leading"."""
    prediction: Literal["epsilon", "v", "x0"] = "epsilon"
    """What the network was trained to predict."""
    beta_start: float = 0.00085
    """Noise that the first timestep adds."""
    beta_end: float = 0.012
    """Noise that the last timestep adds."""
    ends_clean: bool = False
    """Whether "ddim" ends at the clean picture; False: at the first timestep, as SD's."""

    def __post_init__(self) -> None:
        """Refuse values that sample nothing."""
        if not 1 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance is {self.guidance}; 1 is off, {MAX_GUIDANCE} the strongest")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is {self.rescale}; it lies in [0, 1]")
        check_interval(self.guidance_interval)
        if not 0 <= self.steps_offset < NUM_TIMESTEPS:
            raise ValueError(f"steps_offset is {self.steps_offset}; 0 to {NUM_TIMESTEPS - 1}")
        _ = self.schedule, self.timesteps()

    @property
    def schedule(self) -> DiscreteSchedule:
        """The path that the samples walk back."""
        return DiscreteSchedule(self.beta_start, self.beta_end)

    def timesteps(self) -> Tensor:
        """Return the timesteps at which the network is asked, ``(steps,)``, falling."""
        if self.sampler == "lcm":
            return lcm_timesteps(self.steps)
        return spaced_timesteps(
            self.steps,
            self.spacing,
            offset=self.steps_offset,
            whole=not self.sampler.startswith("euler"),
            ends=self.sampler == "dpmpp_2m",
        )

    def steps_of(self, strength: float) -> int:
        """Return how many of the steps a picture walks, the last ones: none for a weak strength.

        Reference: Meng et al., 2022, SDEdit, arXiv:2108.01073; rounded down as diffusers does.
        """
        return min(int(self.steps * strength), self.steps)

    def walk(self, strength: float = 1.0) -> Walk:
        """Return how a sampler walks from noise to latents.

        Args:
            strength: Share of the steps that are walked, the last ones: see ``steps_of``, which
                must not be 0.
        """
        timesteps = self.timesteps()[self.steps - self.steps_of(strength) :]
        stays_noisy = self.sampler == "ddim" and not self.ends_clean
        end = timesteps.new_tensor([0.0 if stays_noisy else -1.0])
        samplers: Mapping[UNetSampler, Sampler] = {
            "euler": sample_ddim,
            "euler_ancestral": partial(sample_ddim, eta=1.0),
            "ddim": partial(sample_ddim, last="mean"),
            "dpmpp_2m": sample_dpmpp_2m,
            "lcm": sample_lcm,
        }
        return Walk(
            schedule=self.schedule,
            prediction=Prediction(self.prediction),
            time_input="cosine",
            sampler=samplers[self.sampler],
            times=time_of(torch.cat([timesteps, end])),
            guidance=self.guidance,
            rescale=self.rescale,
            interval=self.guidance_interval,
            is_consistency=self.sampler == "lcm",
        )

    def first_noise(self, noise: Tensor) -> Tensor:
        """Scale standard normal noise to what the sampler starts from.

        There is no picture in it whose share would be ``alpha``; Euler's samplers as published
        leave that share out, all others fill it with noise.
        """
        if not self.sampler.startswith("euler") or self.spacing == "leading":
            return noise
        _, sigma = self.schedule(self.walk().times[0])
        return noise * float(sigma)


@dataclass(frozen=True)
class UNetSpec:
    """Everything about a U-Net's pipeline that its networks' files do not say."""

    name: str
    """Name of the model, stored in the pictures that it makes."""
    image_size: int = 1024
    """Width and height that it was trained at, in pixels; the default of both."""
    size_multiple: int = 8
    """Widths and heights are multiples of this many pixels."""
    min_size: int = 64
    """Smallest width and height, in pixels."""
    max_size: int = 4096
    """Largest width and height, in pixels."""
    sampling: UNetSampling = field(default_factory=UNetSampling)
    """Sampling."""
    empty_negative: Literal["zeros", "encoded"] = "zeros"
    """What an empty negative prompt is: zeros (SDXL), or the states of no words (SD)."""
    autoencoder_in_float16: bool = True
    """Whether the autoencoder computes in float16; SDXL's overflows, unless it was mended."""
    text: TextConfig = field(
        default_factory=lambda: TextConfig(hidden="penultimate", masks_padding=False)
    )
    """Which text states the U-Net was trained on."""
    text_2: TextConfig | None = None
    """The same of SDXL's second text model, whose pooled state it is told as well."""
    told_sizes: bool | None = None
    """Whether the U-Net is told of sizes, as SDXL; null: if it has two text models."""
    licence: str = ""
    """Licence of the weights."""
    notices: tuple[str, ...] = ()
    """What users should know of how its settings were found."""

    def __post_init__(self) -> None:
        """Refuse a name that is no file's, and sizes that contradict each other."""
        check_name(self.name)
        check_sizes(self.min_size, self.image_size, self.max_size, self.size_multiple)

    @property
    def sample_size(self) -> int:
        """Latent cells per side of a picture, as diffusers' ``config.json`` has it."""
        return self.image_size // self.size_multiple

    @property
    def is_told_sizes(self) -> bool:
        """Whether the U-Net is told of sizes and of a pooled text."""
        return self.text_2 is not None if self.told_sizes is None else self.told_sizes


def load_unet_spec(folder: Path) -> UNetSpec:
    """Read ``pipeline.json``.

    Raises:
        UserError: If it is not valid.
    """
    path = folder / UNET_SPEC_FILE
    return from_dict(UNetSpec, read_json(path), str(path))


def save_unet_spec(spec: UNetSpec, folder: Path) -> None:
    """Write ``pipeline.json`` at once or not at all."""
    content = json.dumps(to_dict(replace(spec, notices=())), indent=2)
    atomic_write_text(folder / UNET_SPEC_FILE, content + "\n")
