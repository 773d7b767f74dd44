"""Runs frozen networks over a data set once and keeps what they say.

Files of a cache folder, each with the fingerprints of its pictures and weights:
``text.safetensors``, ``stage_a.safetensors``, ``stage_c.safetensors``.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.checkpoints.files import atomic_path
from cascade.checkpoints.part_files import find_image_encoder, find_network, weights_hash
from cascade.errors import UserError
from cascade.pipelines.placement import pick_device
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.picture_encoder import PictureEncoder, centre_square
from train.data.cached import Pictures, load_pictures
from train.encode import find_stage_a, load_frozen, load_text, stage_a_hash, text_hash

_log = logging.getLogger(__name__)


def precompute(
    shards: str,
    folder: Path,
    *,
    text: str | None = None,
    text_config: TextConfig | None = None,
    text_width: int | None = None,
    stage_a: str | None = None,
    stage_a_scale: float | None = None,
    compressor: str | None = None,
    image: str | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> None:
    """Write the cache parts whose networks are named.

    Raises:
        UserError: No network is named, one is missing, does not take these pictures or gives a
            value that is not finite.
    """
    if text is None and stage_a is None and compressor is None and image is None:
        raise UserError("precompute: name a network: --text, --image, --stage-a or --compressor")
    if batch_size < 1:
        raise UserError(f"--batch-size {batch_size}: at least 1")
    target = pick_device(device)
    pictures = load_pictures(shards)
    folder.mkdir(parents=True, exist_ok=True)
    base = {"pictures": pictures.fingerprint()}
    if text is not None:
        captions = sorted({"", *(c for captions in pictures.captions for c in captions)})
        encoder = load_text(text, text_config, text_width, target)
        hidden, pooled = _encode_text(encoder, captions, batch_size * 4)
        weights = text_hash(text, text_config, text_width)
        metadata = {**base, "weights": weights, "captions": json.dumps(captions)}
        _write(folder / "text.safetensors", metadata, text_hidden=hidden, text_pooled=pooled)
    if image is not None:
        tower = find_image_encoder(image)
        picture_encoder = PictureEncoder.from_folder(tower, target)

        def embed(pixels: Tensor) -> Tensor:
            return picture_encoder(centre_square(pixels))

        embeds = _encode_pictures(embed, pictures, batch_size, target)
        metadata = {**base, "weights": weights_hash(tower)}
        _write(folder / "image.safetensors", metadata, image_embeds=embeds)
    if stage_a is not None:
        network_a = load_frozen(find_stage_a(stage_a, stage_a_scale), target)
        latents = _encode_pictures(network_a.encode, pictures, batch_size, target)
        metadata = {**base, "weights": stage_a_hash(stage_a, stage_a_scale)}
        _write(folder / "stage_a.safetensors", metadata, stage_a_latents=latents)
    if compressor is not None:
        found = find_network(compressor, "compressor")
        network_c = load_frozen(found, target)
        latents = _encode_pictures(network_c.encode, pictures, batch_size, target)
        metadata = {**base, "weights": weights_hash(found.path)}
        _write(folder / "stage_c.safetensors", metadata, stage_c_latents=latents)


@torch.inference_mode()
def _encode_text(
    encoder: TextEncoder, captions: list[str], batch_size: int
) -> tuple[Tensor, Tensor]:
    hidden, pooled = [], []
    for first in range(0, len(captions), batch_size):
        features = encoder.encode(captions[first : first + batch_size])
        hidden.append(features.hidden.half().cpu())
        pooled.append(features.pooled.half().cpu())
    return torch.cat(hidden), torch.cat(pooled)


@torch.inference_mode()
def _encode_pictures(
    encode: Callable[[Tensor], Tensor], pictures: Pictures, batch_size: int, device: torch.device
) -> Tensor:
    latents = []
    for first in range(0, len(pictures), batch_size):
        pixels = pictures.pixels[first : first + batch_size].to(device).float().div_(255.0)
        try:
            latents.append(encode(pixels).half().cpu())
        except ValueError as error:
            raise UserError(f"the network does not take these pictures: {error}") from error
    return torch.cat(latents)


def _write(path: Path, metadata: dict[str, str], **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} would hold values that are not finite; not written")
    started_s = time.monotonic()
    with atomic_path(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _log.info("wrote %s: %s in %.1f s", path, shapes, time.monotonic() - started_s)
