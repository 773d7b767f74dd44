"""PEFT's settings of a LoRA, which hold the alphas that its tensors' names have no place for.

PEFT writes ``adapter_config.json`` beside the file; diffusers puts the same into the metadata of
the file, each network's settings behind its name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.adapters.lora import Updates
from cascade.adapters.lora_names import PARTS, Part
from cascade.checkpoints.readers import read_json
from cascade.errors import UserError
from cascade.text.towers import TEXT_PREFIX

METADATA_KEY = "lora_adapter_metadata"
"""Where a file of diffusers holds its settings."""
SETTINGS_FILE = "adapter_config.json"
"""Where PEFT holds them."""


@dataclass(frozen=True)
class Alphas:
    """The alphas of layers, as the settings of a LoRA tell them."""

    settings: Mapping[str, Any] | None
    """PEFT's, with the part before each key, or without one for all; None: there are none."""
    is_raw: bool
    """Whether the file is PEFT's own, of which nothing is known without them."""

    def of(self, part: Part, path: str, rank: int, where: str) -> float:
        """Return the alpha of a layer whose tensors tell none: its rank, if nothing is told.

        Args:
            part: The network.
            path: Path of the layer.
            rank: Its rank.
            where: The file, for errors.

        Raises:
            UserError: If the settings are not there where they must be, or are not readable.
        """
        if self.settings is None:
            if self.is_raw:
                raise UserError(
                    f"{where}: PEFT's own file, whose alpha stands in {SETTINGS_FILE}, which is "
                    "not beside it; put it there"
                )
            return float(rank)  # as diffusers reads such a file
        alpha = self._get(part, "lora_alpha", rank)
        patterns = self._get(part, "alpha_pattern", None) or {}
        try:
            alpha = next((patterns[one] for one in patterns if _matches(one, path, where)), alpha)
            alpha = float(alpha)
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{where}: its settings hold no readable alpha ({error})") from error
        if not math.isfinite(alpha):
            raise UserError(f"{where}: its settings hold an alpha of {alpha}")
        # Rank-stabilised: divided by the root of the rank in place of the rank.
        return alpha * math.sqrt(rank) if self._get(part, "use_rslora", False) else alpha

    def _get(self, part: Part, key: str, default: object) -> Any:
        assert self.settings is not None
        return self.settings.get(f"{part}.{key}", self.settings.get(key, default))


def alphas_of(metadata: Mapping[str, str], folder: Path | None, where: str) -> Alphas:
    """Read the settings of a file.

    Args:
        metadata: What the file says of itself.
        folder: Of a file of PEFT's own, where ``adapter_config.json`` is looked for.
        where: The file, for errors.

    Raises:
        UserError: If they are there and not readable.
    """
    if METADATA_KEY in metadata:
        try:
            settings = json.loads(metadata[METADATA_KEY])
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: its {METADATA_KEY} is no valid JSON ({error})") from error
        if not isinstance(settings, dict):
            raise UserError(f"{where}: its {METADATA_KEY} is no JSON object")
        return Alphas(settings, folder is not None)
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        return Alphas(None, folder is not None)
    return Alphas(read_json(folder / SETTINGS_FILE), True)


def _matches(pattern: str, path: str, where: str) -> bool:
    """Tell whether a path has the end that a key of ``alpha_pattern`` names, as PEFT reads it."""
    name = pattern.removeprefix("^")
    if not re.fullmatch(r"[\w.]+", name):
        raise UserError(f"{where}: alpha_pattern {pattern!r}; plain names are known here")
    return path == name or (name == pattern and path.endswith(f".{name}"))


def settings_of(updates: Mapping[Part, Updates]) -> str:
    """Return what diffusers writes into the metadata of a file, from which it rebuilds alphas."""
    settings: dict[str, object] = {}
    for part in (one for one in PARTS if updates.get(one)):
        # Ends of paths, which fit a text encoder of every version of transformers.
        own = {path.removeprefix(TEXT_PREFIX): one for path, one in updates[part].items()}
        ranks = {path: update.rank for path, update in own.items()}
        alphas = {path: _plain(update.alpha) for path, update in own.items()}
        rank, alpha = _usual(ranks), _usual(alphas)
        settings |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {k: one for k, one in ranks.items() if one != rank},
            f"{part}.alpha_pattern": {k: one for k, one in alphas.items() if one != alpha},
            f"{part}.target_modules": sorted(own),
        }
    return json.dumps(settings, sort_keys=True)


def _usual(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _plain(value: float) -> float:
    """Return a whole number as one, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value
