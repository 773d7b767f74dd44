"""One rule for all models: what a network's file says of its training is how it is sampled.

A file that was written here says what its network predicts, and on which noise. Settings beside it
that say otherwise are refused, and neither overrules the other in silence: one of the two files is
not the one that was meant. Only a network that runs in place of a model's own brings its own ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.checkpoints.readers import read_json
from cascade.checkpoints.said import said_in
from cascade.config import to_dict
from cascade.errors import UserError
from cascade.pipelines.few_steps import distilled_said

if TYPE_CHECKING:
    from cascade.pipelines.spec import StageSampling
    from cascade.pipelines.unet_spec import UNetSampling

_PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""Diffusers' names."""
DIFFUSION_KEY = "cascade_diffusion"
"""Metadata of a stage that was trained here: what it predicts, and on which schedule."""


def check_as_trained(
    sampling: StageSampling | UNetSampling,
    trained: Mapping[str, Any],
    weights: str,
    settings: str,
) -> None:
    """Refuse to sample a network in another way than it was trained for.

    Args:
        sampling: How the settings say that it is sampled.
        trained: The same names with what its file says; other fields are free.
        weights: Its file, for errors.
        settings: Where the settings stand, such as ``"model.json: stage_c."``, for errors.

    Raises:
        UserError: Naming both files and what they say.
    """
    values = to_dict(sampling)
    for name, value in trained.items():
        if name not in values:
            raise UserError(f"{weights}: trained with {name} {value}, which is not known here")
        if values[name] != value:
            raise UserError(
                f"{weights}: trained with {name} {value}, but {settings}{name} is "
                f"{values[name]}; set it to {value}, or take the weights that it was written for"
            )


def check_scheduler(path: Path, trained: Mapping[str, Any], weights: str) -> None:
    """Refuse a ``scheduler_config.json`` that contradicts what a U-Net was trained for.

    What it does not say, as where a library's default stands for it, is no contradiction.

    Args:
        path: The scheduler's file.
        trained: What the U-Net's file says, by our names.
        weights: Its file, for errors.

    Raises:
        UserError: Naming both files and what they say, by the scheduler's names.
    """
    said = read_json(path)
    own = {key: trained[key] for key in ("beta_start", "beta_end") if key in trained}
    if "prediction" in trained:
        own["prediction_type"] = _PREDICTION_TYPES.get(trained["prediction"])
    for key, value in own.items():
        if said.get(key) not in (None, value):
            raise UserError(
                f"{weights}: trained with {key} {value}, but {path}: {key} is {said[key]}; set it "
                f"to {value}, or take the weights that it was written for"
            )


def trained_stage(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return what a stage's file says of how it must be sampled, steps that were distilled too.

    Raises:
        UserError: If its metadata are damaged.
    """
    trained = said_in(metadata, DIFFUSION_KEY, where)
    distilled = distilled_said(metadata, where)
    if distilled.get("guidance_range") is not None:
        trained["guidance_range"] = list(distilled["guidance_range"])
    if distilled.get("max_steps") is not None:
        trained |= {name: distilled[name] for name in ("sampler", "max_steps")}
    return trained
