"""What the members of a sample mean: the only place that knows their names.

A sample is a picture (``png``, ``jpg``, ``jpeg`` or ``webp``), a caption (``txt``) and optional
metadata (``json``, whose ``captions`` lists further wordings), as img2dataset writes them. Shards
of a cache hold numpy arrays in place of the picture. Members of other names, pickles among them,
are counted and never opened.
"""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np

PICTURE_KEYS = ("png", "jpg", "jpeg", "webp")
CAPTION_KEY = "txt"
METADATA_KEY = "json"
LATENT_KEYS = {
    "stage_a_latents": "stage_a.npy",
    "stage_c_latents": "stage_c.npy",
    "autoencoder_mean": "autoencoder_mean.npy",
    "autoencoder_std": "autoencoder_std.npy",
    "text_hidden": "text_hidden.npy",
    "text_pooled": "text_pooled.npy",
    "image_embeds": "image.npy",
    "teacher_features": "teacher_features.npy",
}
"""Part of a batch -> extension of its array. Text arrays have a row for each caption."""
DRAWN_KEY = "latents"
"""In the json of a generated picture: part of a cache -> hash of the network whose latents its
teacher drew; their arrays lie beside the picture."""
SHAPE_KEY = "shape"
"""In a cache's json: height and width of the pixels that the latents were made from."""


def is_read(extension: str) -> bool:
    """Return whether members of this extension are ever opened."""
    known = (*PICTURE_KEYS, CAPTION_KEY, METADATA_KEY, *LATENT_KEYS.values())
    return extension in known


def picture_key(extensions: object) -> str | None:
    """Return the extension of the picture among a sample's."""
    return next((key for key in PICTURE_KEYS if key in extensions), None)  # type: ignore[operator]


def read_metadata(data: bytes | None) -> dict[str, Any]:
    """Return a sample's json.

    Raises:
        ValueError: It is not one object.
    """
    if data is None:
        return {}
    try:
        metadata = json.loads(data)
    except RecursionError as error:
        raise ValueError("json nested too deeply") from error
    if not isinstance(metadata, dict):
        raise ValueError("its json is not an object")
    return metadata


def read_captions(text: bytes | None, metadata: dict[str, Any]) -> tuple[str, ...]:
    """Return a sample's wordings: the json's list, or else the text file.

    Raises:
        ValueError: A text that is not UTF-8, or a list that is none of texts.
    """
    listed = metadata.get("captions")
    return clean_captions(listed or [(text or b"").decode("utf-8")])


def clean_captions(captions: object) -> tuple[str, ...]:
    """Return the captions without surrounding blanks and without empty ones.

    Raises:
        ValueError: They are not a list of texts.
    """
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"captions is {captions!r}; a list of texts is needed")
    return tuple(text.strip() for text in captions if text.strip())


def scores_of(metadata: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a sample's json, by which it can be filtered."""
    return {
        name: float(value)
        for name, value in metadata.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def shape_of(metadata: dict[str, Any]) -> tuple[int, int]:
    """Return height and width of the pixels that a cache's sample was made from.

    Raises:
        ValueError: Its json does not say.
    """
    shape = metadata.get(SHAPE_KEY)
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) for n in shape)):
        raise ValueError("latents without a shape in their json")
    return shape[0], shape[1]


def read_array(data: bytes) -> np.ndarray:
    """Return an array; pickled objects are refused.

    Raises:
        ValueError: It is broken, or holds objects.
    """
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (EOFError, OSError) as error:
        raise ValueError(f"a broken array ({error})") from error


def array_bytes(array: np.ndarray) -> bytes:
    """Return an array as the bytes of an ``npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
