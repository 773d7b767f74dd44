"""Pictures that a model draws for a protocol: one seed for each prompt's key, a file for each.

:func:`maker_of` is all that knows a model; what measures takes its pictures from a folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cascade.checkpoints.files import read_metadata
from cascade.checkpoints.hub import resolve
from cascade.errors import UserError
from cascade.evaluate.generate import (
    Item,
    MakerOptions,
    Part,
    PictureMaker,
    make_files,
    missing_of,
)
from cascade.evaluate.prompts import Prompt, hash_of, prompts_hash, seed_of
from cascade.evaluate.protocol import DIGITS, Protocol, canonical
from cascade.pipelines.unet_parts import is_unet

_WEIGHTS_KEY = "weights"
_LOOK_EVERY_S = 5.0
PATIENCE_S = 600.0
"""How long other processes may take for their next picture."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of a protocol's prompts, as files named by the prompts' keys."""

    folder: Path
    model: str
    """The model's name and the hash of its weights."""
    items: tuple[Item, ...]
    """All pictures, whoever makes them."""

    def wait(self, patience_s: float | None = None) -> None:
        """Wait for what other processes make, as long as pictures keep coming.

        Args:
            patience_s: How long for the next one; None: ten minutes.

        Raises:
            UserError: None came, and some are missing.
        """
        patience_s = PATIENCE_S if patience_s is None else patience_s
        missing, since_s = missing_of(self.items, self.folder), time.monotonic()
        while missing:
            if time.monotonic() - since_s >= patience_s:
                raise UserError(
                    f"{self.folder}: {len(missing)} of {len(self.items)} pictures are missing, the "
                    f"first is {missing[0].key!r}; a process was stopped or its picture refused, "
                    "as its own lines say; the same command makes what is missing, and measures"
                )
            time.sleep(min(_LOOK_EVERY_S, patience_s))
            left = missing_of(missing, self.folder)
            if len(left) < len(missing):
                missing, since_s = left, time.monotonic()


def maker_of(
    model: str,
    protocol: Protocol | None,
    *,
    unet: Path | None,
    device: str,
    dtype: str,
    int8: bool = False,
) -> PictureMaker:
    """Find a cascade or a U-Net, told by its content, asked as a protocol asks it.

    Args:
        model: Folder, file or name on the hub.
        protocol: Sizes and sampling; None: the model's own.
        unet: In place of the model's own.
        device: Where it runs.
        dtype: Number format.
        int8: Keep linear weights in int8.

    Raises:
        UserError: It is not there, its weights are of the other kind, or it can't make what the
            protocol asks.
    """
    files = resolve(model)
    options = MakerOptions(model, unet=unet, device=device, dtype=dtype, int8=int8)
    if protocol is not None:
        folders = [folder for folder in files.folders if folder.is_dir()]
        check_weights_kind([unet] if unet is not None else folders, protocol)
        options = replace(
            options,
            width=protocol.generated_size,
            height=protocol.generated_size,
            negative_prompt=protocol.negative_prompt,
        )
        if is_unet(files):
            options = replace(options, **vars(protocol.unet))
        else:
            asked = protocol.cascade
            options = replace(
                options,
                steps=asked.steps_c,
                steps_b=asked.steps_b,
                guidance=asked.guidance_c,
                guidance_b=asked.guidance_b,
                sampler=asked.sampler,
            )
    return PictureMaker(options)


def check_weights_kind(places: Sequence[Path], protocol: Protocol) -> None:
    """Refuse weights that say they are averaged where the protocol asks raw ones, and vice versa.

    Published weights do not say, and pass.

    Raises:
        UserError: Naming the file.
    """
    for place in places:
        # Those of a U-Net lie in folders of its networks.
        paths = [place] if place.is_file() else sorted(place.glob("**/*.safetensors"))
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
    maker: PictureMaker,
    prompts: Sequence[Prompt],
    protocol: Protocol,
    out: Path,
    part: Part,
    batch_size: int | None = None,
) -> Drawn:
    """Draw this process's pictures as PNG; what is there already is not made again.

    Args:
        maker: The model, of :func:`maker_of` and the same protocol.
        prompts: By key.
        protocol: Sizes, sampling, seed.
        out: Folder for the pictures of all models and protocols.
        part: Which share is this process's.
        batch_size: Pictures made together; None: the pipeline's own choice.

    Raises:
        UserError: If the model cannot make what the protocol asks, or nobody else could make what
            it refused.
    """
    if protocol.picture_format not in ("png", "any"):
        raise UserError(
            f"{protocol.name} measures pictures saved as {protocol.picture_format}; a model's are "
            "saved as png"
        )
    settings = {
        # As it will be: what the protocol leaves to the model, its files may say otherwise later.
        "made": maker.settings(),
        "seed": protocol.seed,
        # Keys alone do not tell two lists of prompts apart.
        "prompts": prompts_hash(prompts),
    }
    made_by = hash_of(canonical(settings))[:DIGITS]
    folder = out / f"{maker.weights_hash}-{made_by}"
    items = tuple(Item(one.key, one.text, seed_of(one.key, protocol.seed)) for one in prompts)
    refused = make_files(maker, items, folder, part, batch_size=batch_size)
    # With others at work it is told once they are done: a launcher stops them all at an error.
    if refused and part.count == 1:
        item, first = refused[0]
        raise UserError(
            f"{len(refused)} of {len(items)} pictures are none, the first, {item.key!r}, for "
            f"{first.reason}; --dtype float32 has the widest range"
        )
    return Drawn(folder, f"{maker.spec.name} {maker.weights_hash} {maker.dtype}", items)
