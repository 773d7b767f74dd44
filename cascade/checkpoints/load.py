"""From any file of a network to that network: ours, the authors' own layout, or diffusers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cascade.checkpoints import autoencoders, controlnet, stable_cascade, wuerstchen
from cascade.checkpoints.autoencoder_kl import (
    autoencoder_kl_from_diffusers,
    autoencoder_kl_from_original,
    autoencoder_kl_to_diffusers,
    autoencoder_kl_to_original,
)
from cascade.checkpoints.detect import Generation, Kind, Published, detect
from cascade.checkpoints.files import CLASS_KEY, CONFIG_KEY, assign_strictly, build_on_meta
from cascade.checkpoints.readers import CONFIG_FILE, Opened, open_weights
from cascade.checkpoints.said import check_declared
from cascade.checkpoints.text_tower import (
    text_from_original,
    text_from_transformers,
    text_layout,
)
from cascade.checkpoints.unet import unet_from_original, unet_to_diffusers, unet_to_original
from cascade.checkpoints.weight_map import State
from cascade.config import from_dict
from cascade.errors import UserError
from cascade.text.towers import TEXT_PREFIX, TextTowerConfig, build_text_tower, fill_tower
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.controlnet import ControlNet, ControlNetConfig
from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_a import StageA, StageAConfig
from stages.stage_a_fast import StageAFast, StageAFastConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet

TEXT_CLASS = "CLIPTextModel"
"""What files that were written here call a text tower, which is transformers' network."""

C = TypeVar("C")
ToOurs = Callable[[State, Any, nn.Module | None], dict[str, Tensor]]
"""From published weights and our configuration; of a network on any device, shapes are checked."""
FromOurs = Callable[[State, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """One of our networks with the ways in and out of its published layouts."""

    kind: Kind
    generation: Generation | None
    network: type[nn.Module]
    config: type[Any]
    from_layout: dict[str, ToOurs]
    to_layout: dict[str, FromOurs]


FAMILIES = (
    Family(
        "stage_a",
        None,
        StageA,
        StageAConfig,
        {
            "original": autoencoders.stage_a_from_original,
            "diffusers": autoencoders.stage_a_from_diffusers,
        },
        {
            "original": autoencoders.stage_a_to_original,
            "diffusers": autoencoders.stage_a_to_diffusers,
        },
    ),
    Family("stage_a_fast", None, StageAFast, StageAFastConfig, {}, {}),
    Family(
        "stage_b",
        "v3",
        StageB,
        StageBConfig,
        {
            "original": stable_cascade.stage_b_from_original,
            "diffusers": stable_cascade.stage_b_from_diffusers,
        },
        {
            "original": stable_cascade.stage_b_to_original,
            "diffusers": stable_cascade.stage_b_to_diffusers,
        },
    ),
    Family(
        "stage_c",
        "v3",
        StageC,
        StageCConfig,
        {
            "original": stable_cascade.stage_c_from_original,
            "diffusers": stable_cascade.stage_c_from_diffusers,
        },
        {
            "original": stable_cascade.stage_c_to_original,
            "diffusers": stable_cascade.stage_c_to_diffusers,
        },
    ),
    Family(
        "stage_b",
        "v2",
        StageBV2,
        StageBV2Config,
        {
            "original": wuerstchen.stage_b_from_original,
            "diffusers": wuerstchen.stage_b_from_diffusers,
        },
        {
            "original": wuerstchen.stage_b_to_original,
            "diffusers": wuerstchen.stage_b_to_diffusers,
        },
    ),
    Family(
        "stage_c",
        "v2",
        StageCV2,
        StageCV2Config,
        {
            "original": wuerstchen.stage_c_from_original,
            "diffusers": wuerstchen.stage_c_from_diffusers,
        },
        {
            "original": wuerstchen.stage_c_to_original,
            "diffusers": wuerstchen.stage_c_to_diffusers,
        },
    ),
    Family(
        "compressor",
        None,
        SemanticCompressor,
        CompressorConfig,
        {"original": autoencoders.compressor_from_original},
        {"original": autoencoders.compressor_to_original},
    ),
    Family(
        "previewer",
        "v3",
        Previewer,
        PreviewerConfig,
        {"original": autoencoders.previewer_from_original},
        {"original": autoencoders.previewer_to_original},
    ),
    Family(
        "controlnet",
        "v3",
        ControlNet,
        ControlNetConfig,
        {"original": controlnet.controlnet_from_original},
        {"original": controlnet.controlnet_to_original},
    ),
    Family(
        "unet",
        None,
        UNet,
        UNetConfig,
        {"original": unet_from_original},
        {"original": unet_to_original, "diffusers": unet_to_diffusers},
    ),
    Family(
        "autoencoder_kl",
        None,
        AutoencoderKL,
        AutoencoderKLConfig,
        {"original": autoencoder_kl_from_original, "diffusers": autoencoder_kl_from_diffusers},
        {"original": autoencoder_kl_to_original, "diffusers": autoencoder_kl_to_diffusers},
    ),
)


def identify(opened: Opened) -> Published:
    """Tell which network the tensors are, in whose layout, of what sizes.

    A file that was written here, in any layout, says its configuration in its metadata; of others
    the sizes are read from the shapes.

    Raises:
        UserError: If they are none of the networks that are known here.
    """
    name = opened.metadata.get(CLASS_KEY)
    if name == TEXT_CLASS and (layout := text_layout(opened.shapes)) is not None:
        return Published("text_encoder", None, layout, _written_config(opened, TextTowerConfig))
    known = next((family for family in FAMILIES if family.network.__name__ == name), None)
    if name is not None and known is None:
        raise UserError(f"{opened.where}: holds a {name}, which is no part of a cascade")
    if known is None:
        return detect(opened.shapes, opened.where, opened.declared)
    config = _written_config(opened, known.config)
    beside = str(Path(opened.where).parent / CONFIG_FILE)
    check_declared(config, opened.declared, opened.where, beside)
    return Published(known.kind, known.generation, _layout(known, config, opened), config)


def _written_config(opened: Opened, config: type[C]) -> C:
    """Return the configuration in the metadata of a file that was written here."""
    try:
        values = json.loads(opened.metadata[CONFIG_KEY])
    except (KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{opened.where}: its metadata holds no configuration") from error
    return from_dict(config, values, f"{opened.where} (configuration)")


def _layout(family: Family, config: Any, opened: Opened) -> Any:
    """Find the layout whose names are the file's: ours first."""
    own = build_on_meta(family.network, config, opened.where).state_dict()
    there = opened.tensors.keys()
    if 2 * len(own.keys() & there) > len(there):
        return "ours"
    names = {layout: rename(own, config).keys() for layout, rename in family.to_layout.items()}
    # Of damaged files the nearest: their loading then names what is missing and left over.
    nearest = max(names, key=lambda layout: (names[layout] == there, len(names[layout] & there)))
    return nearest if names[nearest] & there else "ours"


def family_of(published: Published) -> Family:
    """Return the family of identified weights."""
    for family in FAMILIES:
        if family.kind == published.kind and family.generation in (None, published.generation):
            return family
    raise AssertionError(f"no family for {published}")


@torch.inference_mode(False)
def build(
    opened: Opened,
    published: Published,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the network of weights that ``identify`` told and put them into it.

    The network is built on the meta device; on a CPU and in the file's number format its tensors
    are those of the file, memory-mapped. What is moved, converted or joined is so tensor by tensor:
    the peak of memory is the weights and one tensor more.

    Raises:
        UserError: Naming the first missing, unexpected and misshapen keys.
    """
    state: State = opened.tensors.moved(device, dtype)
    if published.kind == "text_encoder":
        return _build_text(opened, published, state, device)
    family = family_of(published)
    network = build_on_meta(family.network, published.config, opened.where)
    if published.layout != "ours":
        try:
            state = family.from_layout[published.layout](state, published.config, network)
        except UserError as error:
            raise UserError(f"{opened.where}: {error}") from error
    assign_strictly(network, state, opened.where)
    return network.eval()


def _build_text(
    opened: Opened, published: Published, state: State, device: str | torch.device
) -> nn.Module:
    """Build transformers' text model and put the weights into it."""
    try:
        if published.layout == "original":
            renamed = text_from_original(state, published.config)
        else:
            renamed = text_from_transformers(state)
    except UserError as error:
        raise UserError(f"{opened.where}: {error}") from error
    network = build_text_tower(published.config)
    fill_tower(network, renamed, opened.where, device, TEXT_PREFIX)
    return network.eval().requires_grad_(False)


def load_any(
    path: str | Path,
    *,
    expect: Sequence[Kind] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> list[tuple[Published, nn.Module]]:
    """Load every network of a file or folder, whatever its layout and name.

    Args:
        path: See ``open_weights``.
        expect: Kinds that may come; others are an error.
        device: Where the tensors go.
        dtype: Number format; None keeps the file's.
        scale: What the latents of an AutoencoderKL are multiplied by, where nothing beside its
            file says so.

    Raises:
        UserError: If the file is none of them, or does not fit.
    """
    loaded = []
    for opened in open_weights(path):
        if scale is not None and not opened.declared:
            opened.declared["scaling_factor"] = scale
        published = identify(opened)
        if expect is not None and published.kind not in expect:
            raise UserError(
                f"{opened.where}: holds a {published.kind}, but {' or '.join(expect)} is needed"
            )
        loaded.append((published, build(opened, published, device=device, dtype=dtype)))
    return loaded
