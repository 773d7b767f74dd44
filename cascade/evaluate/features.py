"""Feature networks: pictures of 8 bits to vectors, with the network's name and its weights' hash.

Two kinds: the Inception-v3 of the FID, from a local file, and the picture tower of any CLIP, from a
local folder or the hub. A figure is labelled by what made it: only Inception's published weights
make a "FID" or a "KID"; everything else carries its network's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cascade.checkpoints.files import file_hash
from cascade.checkpoints.hub import is_hub_name
from cascade.errors import UserError
from cascade.evaluate.clip_scorer import ClipScorer
from cascade.evaluate.inception import CHANNELS, FID_WEIGHTS, INPUT_SIZE, Inception
from cascade.evaluate.resize import Filter, resize
from cascade.text.picture_encoder import centre_square

NetworkKind = Literal["inception", "clip"]
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class FeatureNetwork:
    """A network as yardstick."""

    name: str
    """What figures call it."""
    weights: str
    """12 hex digits over its files."""
    channels: int
    embed: Callable[[Tensor], Tensor]
    """``(B, 3, S, S)`` uint8 to ``(B, channels)`` float32 on the CPU."""

    @property
    def makes_fid(self) -> bool:
        """Whether its Frechet distance is the FID that papers report."""
        return self.channels == CHANNELS and self.weights.startswith(FID_WEIGHTS)

    def label(self, fid: str, other: str) -> str:
        """Return a figure's label: the published one where it is earned, else one with a name."""
        return fid if self.makes_fid else f"{other} ({self.name})"


def load_inception(path: Path, filter: Filter, device: torch.device) -> FeatureNetwork:
    """Load the Inception-v3 of the FID.

    Args:
        path: Its weights.
        filter: Filter of the resize to 299 pixels.
        device: Where it runs.

    Raises:
        UserError: If the file cannot be read or holds another network.
    """
    network = Inception.from_file(path).to(device)
    weights = file_hash(path)
    name = "Inception" if weights.startswith(FID_WEIGHTS) else f"Inception {path.name}"

    @torch.inference_mode()
    def embed(pixels: Tensor) -> Tensor:
        resized = resize(centre_square(pixels).float(), INPUT_SIZE, filter)
        return network(resized.to(device)).float().cpu()

    return FeatureNetwork(name, weights, CHANNELS, embed)


def clip_features(scorer: ClipScorer, name: str, weights: str) -> FeatureNetwork:
    """Use a CLIP's picture tower as feature network; its embeddings are of unit length."""

    def embed(pixels: Tensor) -> Tensor:
        return scorer.embed_pictures(centre_square(pixels).float() / 255.0, len(pixels))

    return FeatureNetwork(name, weights, scorer.picture_encoder.channels, embed)


@dataclass(frozen=True)
class Clip:
    """A CLIP with both towers, its name and its weights' hash."""

    name: str
    weights: str
    scorer: ClipScorer


def load_clip(place: str | Path, name: str, device: torch.device) -> Clip:
    """Load a CLIP from a folder, or from the hub as ``organisation/name``.

    Raises:
        UserError: If it is neither, cannot be fetched, or lacks a part.
    """
    folder = local_folder(place)
    return Clip(name, folder_hash(folder), ClipScorer.from_folder(folder, device))


def local_folder(place: str | Path) -> Path:
    """Return a folder as it is, and a name on the hub as the folder that it was fetched to.

    Raises:
        UserError: If it is neither, or the hub does not give it.
    """
    path = Path(place)
    if path.is_dir():
        return path
    if path.exists() or not is_hub_name(str(place)):
        raise UserError(f"{place}: a CLIP is a folder, or organisation/name on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from cascade.checkpoints.hub_errors import explain

    name, _, revision = str(place).partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{place}: not in the cache, and the hub cannot be reached; give a local folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise explain(error, name, revision or "main") from error


def folder_hash(folder: Path) -> str:
    """Return 12 hex digits over the weights and settings of a folder."""
    paths = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".txt")]
    if not any(path.suffix == ".safetensors" for path in paths):
        raise UserError(f"{folder}: no .safetensors file in it; a CLIP's folder is needed")
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {file_hash(path)}\n".encode())
    return digest.hexdigest()[:12]
