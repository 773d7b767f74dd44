"""The parts of a single file of SD or SDXL: each network is below a prefix of its own.

Beside the networks such files hold what is none of theirs: the training's noise schedule, caches of
position numbers, and in older ones the averaged U-Net under names without dots, which is taken in
place of the other, as published pictures are made with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from cascade.checkpoints.files import first_keys, strip_prefixes
from cascade.checkpoints.mapped import Stored, StoredTensors
from cascade.checkpoints.weight_map import State
from cascade.errors import UserError
from stages.autoencoder_kl import AutoencoderKLConfig

UNET = "model.diffusion_model."
AUTOENCODER = "first_stage_model."
AVERAGED = "model_ema."
SD1_TEXT = "cond_stage_model.transformer."
SD2_TEXT = "cond_stage_model.model."
SDXL_TEXT = "conditioner.embedders.0.transformer."
SDXL_TEXT_2 = "conditioner.embedders.1.model."
_REFINER_TEXT = "conditioner.embedders.0.model."

PartName = Literal["unet", "autoencoder", "text_encoder", "text_encoder_2"]
_PARTS: tuple[tuple[str, PartName], ...] = (
    (UNET, "unet"),
    (AUTOENCODER, "autoencoder"),
    (SD1_TEXT, "text_encoder"),
    (SD2_TEXT, "text_encoder"),
    (SDXL_TEXT, "text_encoder"),
    (SDXL_TEXT_2, "text_encoder_2"),
    (_REFINER_TEXT, "text_encoder"),
)
_NO_WEIGHTS = re.compile(
    r"betas|(alphas|log_one_minus_alphas|sqrt_.*)_cumprod.*|posterior_.*|lvlb_weights|logvar"
    r"|scale_factor|denoiser\.sigmas|model_ema\.(decay|num_updates)"
    r"|.*\.(attn_mask|logit_scale|position_ids)|first_stage_model\.loss\..*"
)
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.")

V = TypeVar("V")


@dataclass(frozen=True)
class Part:
    """One network of a single file."""

    name: PartName
    prefix: str
    """What its tensors' names begin with in the file."""
    tensors: StoredTensors
    """Named without the prefix."""
    metadata: dict[str, str]
    """What a file that was written here says of this network."""
    declared: dict[str, object]
    """What follows from the file as a whole: the scale of the autoencoder's latents."""


def is_single_file(names: Mapping[str, V]) -> bool:
    """Tell by the names of its tensors whether a file holds networks below prefixes."""
    return any(name.startswith(tuple(prefix for prefix, _ in _PARTS)) for name in names)


def parts_of(
    stored: Mapping[str, Stored], where: str, metadata: Mapping[str, str]
) -> Iterator[Part]:
    """Take a single file apart; no tensor is read.

    Args:
        stored: Its tensors, without wrappers' prefixes.
        where: Name of the file, for errors.
        metadata: What the file says of itself.

    Raises:
        UserError: If a tensor belongs to no network, or averaged weights are not whole.
    """
    prefixes = tuple(prefix for prefix, _ in _PARTS)
    weights = {name: one for name, one in stored.items() if not _NO_WEIGHTS.fullmatch(name)}
    stray = [name for name in weights if not name.startswith((*prefixes, AVERAGED))]
    if stray:
        raise UserError(
            f"{where}: {len(stray)} tensors belong to no network of SD or SDXL: {first_keys(stray)}"
        )
    sdxl = any(name.startswith(("conditioner.", f"{UNET}label_emb.")) for name in weights)
    scale = (AutoencoderKLConfig.sdxl() if sdxl else AutoencoderKLConfig.sd()).scale
    for prefix, name in _PARTS:
        part = strip_prefixes(_below(weights, prefix))
        if not part:
            continue
        if prefix == UNET:
            part = _averaged(part, _below(weights, AVERAGED), where)
        if prefix == SD2_TEXT:
            part = _penultimate(part)
        own = {
            key.removesuffix(f".{name}"): value
            for key, value in metadata.items()
            if key.endswith(f".{name}")
        }
        declared: dict[str, object] = {"scaling_factor": scale} if prefix == AUTOENCODER else {}
        yield Part(name, prefix, StoredTensors(part), own, declared)


def part_of(state: State, prefix: str) -> State:
    """Return the tensors below ``prefix``, named without it; of a file, none is read."""
    if isinstance(state, StoredTensors):
        return StoredTensors(_below(state.stored, prefix))
    return _below(state, prefix)


def with_prefix(state: State, prefix: str) -> dict[str, Tensor]:
    """Put ``prefix`` before every name: the inverse of ``part_of``."""
    return {prefix + name: tensor for name, tensor in state.items()}


def _below(named: Mapping[str, V], prefix: str) -> dict[str, V]:
    return {name[len(prefix) :]: one for name, one in named.items() if name.startswith(prefix)}


def _averaged(unet: dict[str, V], averaged: Mapping[str, V], where: str) -> dict[str, V]:
    """Return the averaged weights under the names of the others, which lack no dots."""
    if not averaged:
        return unet
    flat = {f"diffusion_model{name.replace('.', '')}": name for name in unet}
    assert len(flat) == len(unet), "two tensors have one name without its dots"
    missing = [name for name in flat if name not in averaged]
    stray = [name for name in averaged if name not in flat]
    if missing or stray:
        raise UserError(
            f"{where}: its averaged U-Net ({AVERAGED}) lacks {len(missing)} tensors and has "
            f"{len(stray)} that the other lacks: {first_keys([*missing, *stray])}"
        )
    return {name: averaged[key] for key, name in flat.items()}


def _penultimate(text: dict[str, V]) -> dict[str, V]:
    """Leave out what SD 2.x does not run of a whole OpenCLIP: the last layer and the projection.

    Its U-Nets read the states before the last layer, through the final norm. A file without the
    projection was cut already.
    """
    if "text_projection" not in text:
        return text
    layers = {int(match[1]) for match in map(_LAYER.match, text) if match}
    last = f"transformer.resblocks.{max(layers, default=-1)}."
    return {
        name: one
        for name, one in text.items()
        if name != "text_projection" and not name.startswith(last)
    }
