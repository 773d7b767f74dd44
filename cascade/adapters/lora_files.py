"""Files of LoRAs: read whoever wrote them, strictly, and written by PEFT's or by kohya's names.

Every tensor of a file must find its layer, of the right shape: a LoRA of another model would else
do a part of its work, or none, and nobody would be told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from cascade.adapters.lora import Layer, LowRank, layers_of, lora_shapes
from cascade.adapters.lora_metadata import METADATA_KEY, alphas_of
from cascade.adapters.lora_names import (
    PARTS,
    TITLES,
    Name,
    Part,
    Role,
    flat,
    other_kind,
    parse,
    published_path,
)
from cascade.checkpoints.files import first_keys, sides
from cascade.checkpoints.found import told_by
from cascade.checkpoints.readers import Opened, open_weights, weights_in
from cascade.checkpoints.unet import unet_original_layers
from cascade.errors import UserError
from stages.unet.unet import UNet

_WHOSE = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
"""Published U-Nets by the width of their text."""
_READS_TEXT = re.compile(r"attn2[._]to_[kv]$")
_TRANSFORMERS = ("transformer.", "lora_transformer_", "lora_unet_double_blocks")


@dataclass
class _Entry:
    """One layer's tensors in a file."""

    name: Name
    keys: dict[Role, str] = field(default_factory=dict)

    @property
    def told(self) -> str:
        """The name that tells it to the user: that of a tensor of its."""
        return self.keys.get("down") or next(iter(self.keys.values()))


class LoraFile:
    """A file of a LoRA, of which only names and shapes are read until it is fitted."""

    def __init__(self, path: str | Path) -> None:
        """Look through a file, or the folder of one, in any published naming.

        Args:
            path: A ``.safetensors`` file, PyTorch's file of tensors, or a folder with one, such as
                PEFT's with its ``adapter_config.json``.

        Raises:
            UserError: If it is not there, is broken, or is no plain LoRA: what it is is told.
        """
        path = Path(path)
        self.path = weights_in(path) if path.is_dir() else path
        self.where = str(path)
        opened = open_weights(self.path)
        if len(opened) > 1:
            raise UserError(
                f"{path}: a whole model, no LoRA; name it with --model, or its U-Net with --unet"
            )
        self._opened = opened[0]
        self._entries = _entries(self._opened, self.where)
        raw = any(one.name.is_raw for one in self._entries)
        folder = self.path.parent if raw else None
        self._alphas = alphas_of(self._opened.metadata, folder, self.where)

    @property
    def told(self) -> dict[str, str]:
        """How it was trained, by whatever names: all that it says beside its naming's own words."""
        return {
            key: value
            for key, value in told_by(self._opened.metadata).items()
            if key != METADATA_KEY and not key.startswith("ss_")  # PEFT's, kohya's
        }

    @property
    def parts(self) -> tuple[Part, ...]:
        """The networks that it updates."""
        there = {one.name.part for one in self._entries}
        return tuple(part for part in PARTS if part in there)

    def fit(self, networks: Mapping[Part, nn.Module]) -> dict[Part, dict[str, LowRank]]:
        """Return the updates of networks, by the paths of their layers.

        Args:
            networks: All networks of the model that a LoRA may update, on any device, meta too.

        Raises:
            UserError: If a layer is not there or of another shape, telling which model the file
                seems to be for.
        """
        places = {part: _places(part, network) for part, network in networks.items()}
        own = {part: layers_of(network) for part, network in networks.items()}
        found: dict[Part, dict[str, _Entry]] = {part: {} for part in self.parts}
        missing, misshapen = [], []
        for entry in self._entries:
            part = entry.name.part
            path = places.get(part, {}).get(entry.name.layer)
            if path is None:
                missing.append(entry.told)
            elif path in found[part]:
                raise UserError(
                    f"{self.where}: {entry.told} and {found[part][path].told} update one layer; "
                    "keep one of them"
                )
            else:
                found[part][path] = entry
                misshapen += self._shape_complaint(entry, own[part][path])
        if missing or misshapen:
            raise UserError(f"{self.where}: {self._told(missing, misshapen, networks)}")
        return {
            part: {
                path: self._update(entry, own[part][path], published_path(part, path))
                for path, entry in entries.items()
            }
            for part, entries in found.items()
        }

    def _update(self, entry: _Entry, layer: Layer, path: str) -> LowRank:
        tensors = self._opened.tensors
        down, up = tensors[entry.keys["down"]], tensors[entry.keys["up"]]
        rank = len(down)
        down_shape, up_shape = lora_shapes(layer, rank)
        if "alpha" in entry.keys:
            alpha = float(tensors[entry.keys["alpha"]])
            if not math.isfinite(alpha):
                raise UserError(f"{self.where}: {entry.keys['alpha']} is {alpha}, no number")
        else:
            alpha = self._alphas.of(entry.name.part, path, rank, self.where)
        return LowRank(down.reshape(down_shape), up.reshape(up_shape), alpha)

    def _shape_complaint(self, entry: _Entry, layer: Layer) -> list[str]:
        """Say what does not fit; a linear layer's update may be written as a convolution's."""
        stored = self._opened.tensors.stored
        down, up = (stored[entry.keys[role]].shape for role in ("down", "up"))
        wanted = lora_shapes(layer, down[0])
        if down[0] and [_bare(one) for one in wanted] == [_bare(down), _bare(up)]:
            return []
        fitting = " and ".join(sides(torch.Size(one)) for one in wanted)
        return [f"{entry.told} ({sides(down)} and {sides(up)}, where {fitting} fit)"]

    def _told(
        self, missing: Sequence[str], misshapen: Sequence[str], networks: Mapping[Part, nn.Module]
    ) -> str:
        """Say in one line why it is another model's."""
        count = len(self._entries)
        complaints = []
        if missing:
            many = "none" if len(missing) == count else f"only {count - len(missing)}"
            complaints.append(
                f"{many} of its {count} layers {'is' if many == 'none' else 'are'} here, "
                f"{missing[0]} the first that is not"
            )
        if misshapen:
            complaints.append(f"{len(misshapen)} have another shape, the first {misshapen[0]}")
        return f"a LoRA for another model{self._whose(networks)}: {'; '.join(complaints)}"

    def _whose(self, networks: Mapping[Part, nn.Module]) -> str:
        """Return what tells which model it is for."""
        if any(entry.told.startswith(_TRANSFORMERS) for entry in self._entries):
            return ", one without a U-Net, such as SD 3 or Flux"
        widths = {
            self._opened.tensors.stored[entry.keys["down"]].shape[1]
            for entry in self._entries
            if _READS_TEXT.search(entry.name.layer)
        }
        unet = networks.get("unet")
        own = unet.config.text_channels if isinstance(unet, UNet) else None
        if len(widths) == 1 and own is not None and widths != {own}:
            [width] = widths
            return (
                f", made for a U-Net whose text is {_with_owner(width)}; this one's is "
                f"{_with_owner(own)}"
            )
        lacking = [TITLES[part] for part in self.parts if part not in networks]
        if lacking:
            return f" that has a {lacking[0]}, which this one lacks"
        return ""


def _with_owner(width: int) -> str:
    return f"{width} wide" + (f" ({_WHOSE[width]})" if width in _WHOSE else "")


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without the ones that make a matrix a convolution's."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def _entries(opened: Opened, where: str) -> list[_Entry]:
    """Sort a file's tensors by layer; refuse what is no plain LoRA."""
    other = other_kind(opened.tensors)
    if other is not None:
        key, what = other
        raise UserError(f"{where}: {what}, by {key}; plain LoRAs of linear layers and convolutions "
                        "are known here")  # fmt: skip
    entries: dict[tuple[Part, str], _Entry] = {}
    strange = []
    for key, one in opened.tensors.stored.items():
        name = parse(key)
        if name is None:
            strange.append(key)
            continue
        entry = entries.setdefault((name.part, name.layer), _Entry(name))
        if name.role in entry.keys:
            raise UserError(f"{where}: {entry.keys[name.role]} and {key} are the same tensor's")
        entry.keys[name.role] = key
        if not one.dtype.is_floating_point and name.role != "alpha":
            raise UserError(f"{where}: {key} holds {one.dtype}, no fractions; export it again")
        if len(one.shape) not in (2, 4) if name.role != "alpha" else one.shape.numel() != 1:
            raise UserError(f"{where}: {key} is {sides(one.shape)}, which no LoRA's is")
    if strange:
        many = "none" if not entries else f"{len(opened.tensors) - len(strange)}"
        raise UserError(
            f"{where}: {many} of its {len(opened.tensors)} tensors "
            f"{'is' if not entries else 'are'} a LoRA's; the others: {first_keys(strange)}"
            f"{'; name a model with --model, a U-Net with --unet' if not entries else ''}"
        )
    for entry in entries.values():
        for role in ("down", "up"):
            if role not in entry.keys:
                raise UserError(f"{where}: {entry.told} lacks its {role}; download it again")
    return list(entries.values())


def _places(part: Part, network: nn.Module) -> dict[str, str]:
    """Return the path of a network's layers by every name that a file may have for it."""
    places: dict[str, str] = {}
    for path in layers_of(network):
        published = published_path(part, path)
        for name in (published, flat(published)):
            assert places.setdefault(name, path) == path, f"{name} has two meanings"
    if isinstance(network, UNet):
        for path, theirs in unet_original_layers(network.config).items():
            if path in places:
                name = flat(theirs)
                assert places.setdefault(name, path) == path, f"{name} has two meanings"
    return places
