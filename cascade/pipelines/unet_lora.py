"""The LoRAs of a U-Net's pipeline: merged into its weights once, while they are loaded.

Merged, they cost nothing afterwards: memory, its plans, speed and number formats are those of the
model alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from cascade.adapters.lora import merge_lora
from cascade.adapters.lora_files import LoraFile
from cascade.adapters.lora_names import Part
from cascade.checkpoints.files import file_hash
from cascade.errors import UserError
from cascade.pipelines.unet_published import Advice, lora_advice
from stages.unet.config import UNetConfig


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to make pictures with."""

    path: Path
    """Its file, or the folder of one."""
    weight: float = 1.0
    """How much of it counts: 0 is none, 1 what it was trained for; it may be negative."""

    def __post_init__(self) -> None:
        """Refuse weights that make no picture.

        Raises:
            UserError: If the weight is no finite number.
        """
        if not math.isfinite(self.weight):
            raise UserError(f"{self.path}: the weight of a LoRA is {self.weight}; a number such "
                            "as 0.8 is needed")  # fmt: skip


class OpenedLora:
    """A LoRA whose file was looked through."""

    def __init__(self, choice: LoraChoice) -> None:
        """Open the file; only its header is read.

        Raises:
            UserError: If it is no plain LoRA.
        """
        self.file = LoraFile(choice.path)
        self.weight = choice.weight

    @cached_property
    def described(self) -> dict[str, object]:
        """What a picture's metadata say of it."""
        path = self.file.path
        return {"file": path.name, "hash": file_hash(path), "weight": self.weight}


def merge_loras(
    loras: Sequence[OpenedLora],
    networks: Mapping[Part, nn.Module],
    dtypes: Mapping[Part, torch.dtype],
    device: torch.device,
) -> None:
    """Merge LoRAs into the networks of a model, whose weights are as they are in its files.

    Sums are float32 on the CPU, whatever the device, and rounded once.

    Args:
        loras: The LoRAs.
        networks: All that one may update, on the CPU and in their files' number formats.
        dtypes: Number formats that they get.
        device: Where they go.

    Raises:
        UserError: If one is for another model, or makes weights too large for their format.
    """
    # All of them before any weight is changed.
    fitted = [one.file.fit(networks) for one in loras]
    for part, network in networks.items():
        updates = [(own.get(part, {}), one.weight) for own, one in zip(fitted, loras, strict=True)]
        try:
            with torch.inference_mode(False):
                merge_lora(network, updates, dtype=dtypes[part])
        except ValueError as error:
            names = ", ".join(one.file.where for one in loras)
            raise UserError(f"{names}: {error}; take a smaller weight, or another dtype") from error
        network.to(device, dtypes[part])


def advice_of(loras: Sequence[OpenedLora], shape: UNetConfig) -> Advice | None:
    """Return how the first LoRA whose file's name tells of one asks to be sampled."""
    counting = [one.file.path.name for one in loras if one.weight > 0]
    told = (lora_advice(shape, name) for name in counting)
    return next((advice for advice in told if advice is not None), None)


def by_its_name(advice: Advice) -> str:
    """Say how pictures are sampled because of a LoRA's name."""
    sampling = advice.sampling
    return (
        f"by its name the LoRA is {advice.title}: {sampling.sampler}, {sampling.steps} steps, "
        f"guidance {sampling.guidance:g}"
    )
