"""What a file of weights says of its network beside its sizes, checked as it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.unet.config import UNetConfig


def said_in(metadata: Mapping[str, str], key: str, where: str) -> dict[str, Any]:
    """Return what a file's metadata say under a key; nothing if the key is not there.

    Args:
        metadata: The file's, or those of a part of it.
        key: Whose value is a JSON object.
        where: The file, for errors.

    Raises:
        UserError: The value is anything else.
    """
    text = metadata.get(key)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where}: its metadata's {key} is not valid JSON ({error}); export the file again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: its metadata's {key} is no JSON object; export the file again")
    return value


def check_declared(
    config: object, declared: Mapping[str, Any], weights: str, json_file: str
) -> None:
    """Refuse a ``config.json`` that contradicts what the weights' own file says of them.

    Only what it names is looked at. Of both, neither could be believed without the picture being
    another one for whoever believes the other.

    Args:
        config: Sizes that the weights' own file says.
        declared: What diffusers' ``config.json`` beside it says; empty: there is none.
        weights: The weights' file, for errors.
        json_file: The ``config.json``, for errors.

    Raises:
        UserError: Naming both files and what they say.
    """
    for key, own in _diffusers_names(config, str(declared.get("_class_name"))).items():
        said = declared.get(key)
        if key == "attention_head_dim" and declared.get("num_attention_heads") is not None:
            continue  # the size of a head, then
        if said is not None and not _same(said, own):
            raise UserError(
                f"{json_file}: {key} is {said}, but {weights} says that its weights have {own}; "
                f"set {key} to {own}, or take the weights that this file belongs to"
            )


def _diffusers_names(config: object, class_name: str) -> dict[str, Any]:
    """Return sizes by diffusers' names, for its class of that name; of other classes nothing."""
    if isinstance(config, AutoencoderKLConfig) and class_name == "AutoencoderKL":
        return {
            "latent_channels": config.latent_channels,
            "block_out_channels": list(config.channels),
            "norm_num_groups": config.norm_groups,
            "scaling_factor": config.scale,
            "shift_factor": config.shift,
        }
    if isinstance(config, UNetConfig) and class_name == "UNet2DConditionModel":
        return {
            "in_channels": config.in_channels,
            "out_channels": config.out_channels,
            "block_out_channels": list(config.channels),
            # The number of heads, unless they are told by their own name.
            "attention_head_dim": list(config.num_heads),
            "num_attention_heads": list(config.num_heads),
            "cross_attention_dim": config.text_channels,
            "norm_num_groups": config.norm_groups,
        }
    return {}


def _same(said: Any, own: Any) -> bool:
    if isinstance(own, list):  # one number stands for all levels
        said = said if isinstance(said, list) else [said] * len(own)
        return bool(said == own)
    if isinstance(said, list):  # the same for all levels
        return all(_same(one, own) for one in said)
    if isinstance(own, float) and isinstance(said, (int, float)):
        return math.isclose(said, own, rel_tol=1e-6)
    return bool(said == own)
