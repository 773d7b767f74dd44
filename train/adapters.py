"""A LoRA that a run trains: what is averaged and exported in place of the network."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cascade.adapters.lora import Adapter, LoraConfig, LoraLayer, LowRank, attach_lora
from cascade.adapters.lora_write import write_lora
from stages.unet.unet import UNet
from train.draws import derived_seed


class TrainedLora(nn.Module):
    """The updates of a U-Net's layers, as a module of their own that shares their parameters."""

    def __init__(self, network: UNet, adapter: Adapter) -> None:
        """Take the network, which is not held, and what is attached to it."""
        super().__init__()
        self.config = network.config
        self.name = adapter.name
        # A name of a module holds no dots.
        self.layers = nn.ModuleDict(
            {path.replace(".", "/"): layer for path, layer in adapter.layers.items()}
        )

    @classmethod
    def attached(cls, network: UNet, config: LoraConfig, seed: int) -> TrainedLora:
        """Attach a new adapter, whose start is a function of the seed, and freeze all else.

        Raises:
            ValueError: A target is no layer's.
        """
        generator = torch.Generator().manual_seed(derived_seed("lora", seed, 0))
        return cls(network, attach_lora(network, config, generator=generator))

    def updates(self) -> dict[str, LowRank]:
        """Return the updates by the paths of their layers."""
        return {
            name.replace("/", "."): cast(LoraLayer, layer).update()
            for name, layer in self.layers.items()
        }

    def keys_in(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a state of this module by the names that its tensors have in the network."""
        found = {}
        for key, value in state.items():
            path, _, part = key.removeprefix("layers.").rpartition(".")
            found[f"{path.replace('/', '.')}.lora.{self.name}.{part}"] = value
        return found

    def write(self, out: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
        """Write ``lora.safetensors`` by PEFT's names."""
        write_lora(
            out / "lora.safetensors",
            {"unet": self.updates()},
            "peft",
            unet=self.config,
            dtype=dtype,
            metadata=metadata,
        )
