"""What a generated set is asked for: the keys of ``configs/teachers/`` and of the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cascade.evaluate.generate import MakerOptions
from cascade.pipelines.parts import Dialect
from cascade.pipelines.unet_lora import LoraChoice
from cascade.rng import check_seed


@dataclass(frozen=True)
class GenerateConfig:
    """What ``python -m train.distill generate`` makes; keys of its YAML file and its options."""

    teacher: str
    """A model folder, a single file, or a hub id."""
    prompts: str
    """A text file, a table, or shards; see ``train.distill.prompts``."""
    out: str
    """Folder for the shards."""
    name: str = "teacher"
    """Shards are called ``NAME-000000.tar``."""
    column: str | None = None
    """Of a table of prompts."""
    limit: int | None = None
    """Most prompts; null: all."""
    shuffle: int | None = None
    """Seed of the prompts' order, so that ``limit`` takes some of all kinds; null: as given."""
    pictures_per_prompt: int = 1
    seed: int = 0
    """Each picture's seed is made of it, of the prompt and of the picture's number."""
    size: int | str | None = None
    """Side in pixels, or ``WIDTHxHEIGHT``; null: the teacher's own."""
    steps: int | None = None
    """Of a U-Net, or of Stage C; here and below, null is the teacher's own."""
    guidance: float | None = None
    """Of a U-Net, or of Stage C; 1 is off."""
    sampler: str | None = None
    spacing: str | None = None
    """U-Nets: leading, trailing or linspace."""
    negative_prompt: str = ""
    unet: str | None = None
    """U-Nets: one to run in place of the teacher's own, such as SDXL-Lightning's."""
    loras: tuple[str, ...] = ()
    """U-Nets: files of LoRAs, all of whose weight is merged."""
    steps_b: int | None = None
    """Cascades: steps of Stage B."""
    guidance_b: float | None = None
    """Cascades: guidance scale of Stage B."""
    dialect: Dialect = "official"
    """Cascades: how published weights are sampled."""
    variant: str | None = None
    """Number format to download where the hub has several."""
    format: Literal["png", "jpg"] = "png"
    """Of the pictures' files; jpg is of quality 95."""
    keep_latents: bool = False
    """Keep what the teacher drew, in float16, beside the picture."""
    shard_size: int = 256
    """Pictures a shard; a process that is killed loses at most so many."""
    batch_size: int | None = None
    """Pictures that run together; null: 1 on a CPU, 4 on a GPU."""
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Refuse what makes no set."""
        for name in ("limit", "pictures_per_prompt", "shard_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; at least 1 is needed")
        # What a killed process left of a shard is known by the first 32 letters of its name, in
        # which the shard's number must be: a longer name would be any shard's of the set.
        if not re.fullmatch(r"[\w-]{1,16}", self.name, flags=re.ASCII):
            raise ValueError(f"name is {self.name!r}; 1 to 16 letters, digits, - and _")
        check_seed(self.seed)
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle is {self.shuffle}; a seed is 0 or more")
        _ = self.sides

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """Width and height."""
        if self.size is None or isinstance(self.size, int):
            return self.size, self.size
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", self.size.lower())
        if match is None:
            raise ValueError(f"size is {self.size!r}; a side such as 1024, or 1024x768")
        return int(match[1]), int(match[2] or match[1])

    def maker(self, device: str) -> MakerOptions:
        """Return how the teacher is asked."""
        width, height = self.sides
        return MakerOptions(
            model=self.teacher,
            width=width,
            height=height,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            negative_prompt=self.negative_prompt,
            spacing=self.spacing,
            unet=None if self.unet is None else Path(self.unet),
            loras=tuple(LoraChoice(Path(one)) for one in self.loras),
            steps_b=self.steps_b,
            guidance_b=self.guidance_b,
            dialect=self.dialect,
            variant=self.variant,
            device=device,
            dtype=self.dtype,
        )
