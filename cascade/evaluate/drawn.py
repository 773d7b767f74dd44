"""Pictures that a model draws for a protocol: one seed for each prompt's key, a file for each.

:func:`plan_of` is all that asks a pipeline; what measures takes its pictures from a folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.checkpoints.files import read_metadata
from cascade.checkpoints.hub import resolve
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.evaluate.prompts import Prompt, hash_of, seed_of
from cascade.evaluate.protocol import (
    DIGITS,
    CascadeSampling,
    Protocol,
    UNetSampling,
    canonical,
)
from cascade.images import save_png
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.latent import LatentPipeline, is_latent
from cascade.pipelines.plan import Settings, make_plan
from cascade.pipelines.results import Picture
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import is_unet
from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan

_log = logging.getLogger(__name__)

Pipeline = CascadePipeline | UNetPipeline | LatentPipeline
_TELL_EVERY_S = 20.0
_WEIGHTS_KEY = "weights"


@dataclass(frozen=True)
class Drawn:
    """Pictures of a protocol's prompts, as files named by the prompts' keys."""

    folder: Path
    model: str
    """The model's name and the hash of its weights."""


def load_pipeline(
    model: str, protocol: Protocol, *, unet: Path | None, device: str, dtype: str
) -> Pipeline:
    """Load a cascade or a U-Net, if its weights are of the protocol's kind.

    Raises:
        UserError: If it cannot be loaded, or says that its weights are of the other kind.
    """
    folders = [folder for folder in resolve(model).folders if folder.is_dir()]
    check_weights_kind([unet] if unet is not None else folders, protocol)
    return load_any(model, unet=unet, device=device, dtype=dtype)


def load_any(model: str, *, unet: Path | None, device: str, dtype: str) -> Pipeline:
    """Load a cascade, a U-Net, or a Stage C on an autoencoder's latents, told by its content.

    Raises:
        UserError: If it cannot be loaded.
    """
    if is_latent(Path(model)):
        if unet is not None:
            raise UserError("--unet: the model has none")
        return LatentPipeline(model, device=device, dtype=dtype)
    if is_unet(resolve(model)):
        return UNetPipeline.from_pretrained(model, unet=unet, device=device, dtype=dtype)
    if unet is not None:
        raise UserError("--unet: the model is a cascade, which has none")
    return CascadePipeline.from_pretrained(model, device=device, dtype=dtype)


def check_weights_kind(places: Sequence[Path], protocol: Protocol) -> None:
    """Refuse weights that say they are averaged where the protocol asks raw ones, and vice versa.

    Published weights do not say, and pass.

    Raises:
        UserError: Naming the file.
    """
    for place in places:
        paths = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
        for path in paths:
            if path.suffix != ".safetensors":
                continue
            kind = read_metadata(path).get(_WEIGHTS_KEY)
            if kind is not None and kind != protocol.weights:
                raise UserError(
                    f"{path}: {kind} weights, but the protocol {protocol.name} measures "
                    f"{protocol.weights} ones"
                )


def draw_pictures(
    pipeline: Pipeline,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    out: Path,
    batch_size: int | None = None,
) -> Drawn:
    """Draw a picture of each prompt, and keep it as PNG; what is there already is not made again.

    Args:
        pipeline: The model.
        prompts: By key.
        protocol: Sizes, sampling, seed.
        out: Folder for the pictures of all models and protocols.
        batch_size: Pictures made together; None: the pipeline's own choice.

    Raises:
        UserError: If the model cannot make what the protocol asks.
    """
    if protocol.picture_format not in ("png", "any"):
        raise UserError(
            f"{protocol.name} measures pictures saved as {protocol.picture_format}; a model's are "
            "saved as png"
        )
    dtypes = str(pipeline.dtypes)
    settings = {
        "cascade": to_dict(protocol.cascade),
        "unet": to_dict(protocol.unet),
        "negative": protocol.negative_prompt,
        "seed": protocol.seed,
        "size": protocol.generated_size,
        "dtypes": dtypes,
    }
    made_by = hash_of(canonical(settings))[:DIGITS]
    folder = out / f"{pipeline.weights_hash}-{made_by}"
    missing = [prompt for prompt in prompts if not _path(folder, prompt).is_file()]
    if missing:
        texts = [prompt.text for prompt in missing]
        seeds = [seed_of(prompt.key, protocol.seed) for prompt in missing]
        pictures = plan_of(pipeline, texts, seeds, protocol)(batch_size)
        told_s = time.monotonic()
        for done, (prompt, picture) in enumerate(zip(missing, pictures, strict=True), 1):
            path = _path(folder, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(picture.image, path, picture.metadata)
            if time.monotonic() - told_s > _TELL_EVERY_S or done == len(missing):
                told_s = time.monotonic()
                _log.info("%d of %d pictures made", done, len(missing))
    return Drawn(folder, f"{pipeline.spec.name} {pipeline.weights_hash} {dtypes}")


def _path(folder: Path, prompt: Prompt) -> Path:
    return folder / f"{prompt.key}.png"


def plan_of(
    pipeline: Pipeline, texts: Sequence[str], seeds: Sequence[int], protocol: Protocol | None
) -> Callable[[int | None], Iterator[Picture]]:
    """Settle what a pipeline is to make, before any of it is made.

    Args:
        pipeline: The model.
        texts: A prompt for each picture.
        seeds: A seed for each picture.
        protocol: Its sizes and sampling; None: the model's own.

    Returns:
        What makes the pictures, each given as soon as it is finished, when it is called with how
        many are made together (None: the pipeline's choice).

    Raises:
        UserError: If the model cannot make what the protocol asks.
    """
    side = None if protocol is None else protocol.generated_size
    negative = "" if protocol is None else protocol.negative_prompt
    if isinstance(pipeline, UNetPipeline):
        unet = UNetSampling() if protocol is None else protocol.unet
        unet_plan = make_unet_plan(
            pipeline.spec,
            texts,
            UNetSettings(
                negative_prompt=negative, seeds=seeds, width=side, height=side, **vars(unet)
            ),
        )
        _check_size(protocol, unet_plan.width, unet_plan.height)
        return lambda batch_size: pipeline.run(unet_plan, batch_size=batch_size, progress=False)
    cascade = CascadeSampling() if protocol is None else protocol.cascade
    plan = make_plan(
        pipeline.spec,
        texts,
        Settings(negative_prompt=negative, seeds=seeds, width=side, height=side, **vars(cascade)),
    )
    _check_size(protocol, plan.width, plan.height)
    return lambda batch_size: pipeline.run(plan, batch_size=batch_size, progress=False)


def _check_size(protocol: Protocol | None, width: int, height: int) -> None:
    if protocol is None:
        return
    side = protocol.generated_size
    if (width, height) != (side, side):
        raise UserError(
            f"the model makes {width}x{height} pixels, but the protocol {protocol.name} measures "
            f"pictures made at {side}x{side}"
        )
