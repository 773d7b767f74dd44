"""One part of a cascade by any name: a file, a folder, or a model here or on the hub.

What training starts from, and the frozen networks that it reads, are found here as the pipeline
finds its own: by content, in every layout that ``load.py`` knows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

from cascade.checkpoints.detect import Kind
from cascade.checkpoints.files import file_hash
from cascade.checkpoints.found import (
    FoundNetwork,
    TextFolder,
    choose_network,
    image_folder_in,
    networks_in,
    one_unet,
    text_folder,
    text_folders_in,
)
from cascade.checkpoints.hub import ModelFiles, is_hub_name, resolve
from cascade.checkpoints.hub_choice import Part
from cascade.checkpoints.load import identify
from cascade.checkpoints.readers import is_index, open_weights, read_json, weights_in
from cascade.errors import HoldsNone, UserError
from cascade.text.picture_encoder import own_picture_encoder

_TITLES = {
    "stage_a": "Stage A",
    "stage_a_fast": "fast decoder of Stage A",
    "stage_b": "Stage B",
    "stage_c": "Stage C",
    "unet": "U-Net",
    "autoencoder_kl": "KL autoencoder",
}

_HOMES: dict[Kind, str] = {"unet": "unet", "autoencoder_kl": "vae"}
"""Where folders of diffusers have the networks of a U-Net's pipeline, as sampling takes them."""


def title(kind: Kind) -> str:
    """Return a kind of network as messages call it."""
    return _TITLES.get(kind, kind)


def find_network(name: str | Path, kind: Kind) -> FoundNetwork:
    """Find the weights of one kind of network; only headers are read.

    Args:
        name: A file in any layout; a folder of diffusers; a run's folder or a model's, with
            ``:lite`` behind it for the smaller of two; or a hub id with ``:lite`` and
            ``@revision``, of which the files of this network alone are downloaded.
        kind: Which network.

    Raises:
        UserError: Nothing is there, or it is another network, or one of several U-Nets.
    """
    path = Path(name)
    if path.is_file():
        return _in_file(path, kind)
    own = path / f"{kind}.safetensors"  # a run's folder, a model's folder of ours
    if own.is_file():
        return _in_file(own, kind)
    home = path / _HOMES[kind] if kind in _HOMES else None
    if home is not None and home.is_dir():  # whatever lies beside it, such as its teacher
        return _in_file(weights_in(home), kind)
    files = _resolved(name, cast(Part, kind))
    if files.lite and kind in _HOMES:
        raise UserError(f"{name}: a {title(kind)} comes in one size; leave :lite out")
    found = list(networks_in(files))
    if kind == "unet":
        chosen = one_unet(found, files.folders[0])
    else:
        chosen = choose_network(found, kind, files.lite)
    if chosen is None:
        held = ", ".join(sorted({title(one.published.kind) for one in found}))
        raise HoldsNone(
            f"{name}: holds no {title(kind)}, only: {held}"
            if held
            else f"{name}: holds no weights of a {title(kind)}; check the path"
        )
    return chosen


def unet_alone(model: Path) -> FoundNetwork | None:
    """Return the U-Net of a file or a folder that holds nothing else, such as a training's.

    Raises:
        UserError: If a file that has to be looked into is broken.
    """
    if model.is_dir():
        kinds = {one.published.kind for one in networks_in(ModelFiles((model,)))}
    elif model.is_file():
        opened = open_weights(model)
        kinds = {identify(one).kind for one in opened}
    else:
        return None
    return find_network(model, "unet") if kinds == {"unet"} else None


def find_text(name: str | Path, width: int | None = None) -> TextFolder:
    """Find a text encoder with its tokenizer.

    Args:
        name: The encoder's folder, with the tokenizer in it or beside it; or a model, here or on
            the hub.
        width: Channels of the states, or of the pooled state, that are wanted: a model may have
            two encoders.

    Raises:
        UserError: There is none, or none of this width.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        found = text_folder(path)
        if found is None:
            raise UserError(f"{name}: not a CLIP text encoder with its tokenizer; check the folder")
        return found
    encoders = list(text_folders_in(_resolved(name, "text")))
    if not encoders:
        raise UserError(f"{name}: no text encoder with its tokenizer in it; check the folder")
    fitting = [one for one in encoders if width is None or width in (one.width, one.pooled)]
    if not fitting:
        widths = ", ".join(f"{one.folder.name} ({one.width})" for one in encoders)
        raise UserError(f"{name}: no text encoder {width} wide in it (found: {widths})")
    # States of that width before a pooled state that happens to have it.
    return min(fitting, key=lambda one: width is not None and one.width != width)


def find_image_encoder(name: str | Path) -> Path:
    """Find the folder of CLIP's picture tower.

    Args:
        name: Its folder, or a model, here or on the hub.

    Raises:
        UserError: There is none.
    """
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    files = _resolved(name, "image_encoder")
    found = own_picture_encoder(files.folders[0]) or image_folder_in(files)
    if found is None:
        raise UserError(f"{name}: no CLIP picture tower in it; check the folder")
    return found


def weights_hash(path: Path) -> str:
    """Return 12 hex digits over a file of weights; of a folder or an index, over all its parts."""
    if path.is_dir():
        path = weights_in(path)
    if not is_index(path):
        return file_hash(path)
    shards = sorted(set(read_json(path).get("weight_map", {}).values()))
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard} {file_hash(path.parent / str(shard))}\n".encode())
    return digest.hexdigest()[:12]


def _in_file(path: Path, kind: Kind) -> FoundNetwork:
    found = []
    for opened in open_weights(path):
        published = identify(opened)
        if published.kind == kind:
            return FoundNetwork(opened, published, path)
        found.append(title(published.kind))
    raise HoldsNone(
        f"{path}: holds a {' and a '.join(found)}, but a {title(kind)} is needed; check the path"
    )


def _resolved(name: str | Path, part: Part) -> ModelFiles:
    if not Path(name).is_dir() and not is_hub_name(name):
        lite = str(name).removesuffix(":lite")
        if not Path(lite).is_dir():
            raise UserError(
                f"{name}: no such file or folder; check the path, or name a hub id as "
                "organisation/name"
            )
    return resolve(name, part=part)
