"""Writes a model in another layout: ours, the authors' single files, or folders of diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from cascade.checkpoints.files import (
    atomic_folder,
    atomic_write_text,
    finite_in,
    save_network,
)
from cascade.checkpoints.found import FoundNetwork, told_by
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import FAMILIES, Family, build, identify
from cascade.checkpoints.part_files import title, unet_alone
from cascade.checkpoints.readers import open_weights
from cascade.errors import UserError
from cascade.pipelines.latent import is_latent
from cascade.pipelines.parts import CascadeParts, Source, open_source
from cascade.pipelines.placement import Dtypes, UNetDtypes
from cascade.pipelines.spec import CONVERTED_SPEC_FILE, save_spec
from cascade.pipelines.unet_parts import UNetSource, is_unet, open_unet_source
from cascade.text.picture_encoder import PictureEncoder
from cascade.tools.convert_unet import write_unet_alone, write_unet_file, write_unet_folder
from cascade.tools.diffusers_names import (
    diffusers_class,
    diffusers_config,
    scheduler_class,
    write_scheduler,
)
from cascade.tools.written import Written, save_state, write_text
from stages.stage_a import StageA
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2
from stages.unet.unet import UNet

Target = Literal["ours", "original", "diffusers"]
TARGETS: tuple[Target, ...] = ("ours", "original", "diffusers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ORIGINAL_NAMES = {
    "stage_a": "stage_a",
    "stage_b": "stage_b",
    "stage_c": "stage_c",
    "compressor": "effnet_encoder",
    "previewer": "previewer",
}
"""Names of the authors' files; ``_lite`` and ``_bf16`` are added as they do."""
_LITE = (StageBConfig.lite(), StageCConfig.lite())


def convert(model: Path, target: Target, out: Path, dtype: torch.dtype) -> Written:
    """Write a model, or a U-Net alone, to the folder ``out``, in another layout and number format.

    The folder appears when all of it is written, or not at all.

    Raises:
        UserError: If ``out`` holds anything already, lies in the model, can't be made, or the
            cascade has no such layout.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new folder")
    if model.is_dir() and out.resolve().is_relative_to(model.resolve()):
        raise UserError(f"{out}: inside {model}, which is read; name a folder elsewhere")
    if model.is_dir() and is_latent(model):
        raise UserError(
            f"{model}: a Stage C on an autoencoder's latents, for which there is no other layout; "
            "it is not converted"
        )
    found = _files_of(model)
    if found is not None and is_unet(found):
        return _convert_unet(open_unet_source(found), target, out, dtype)
    if (alone := unet_alone(model)) is not None:
        return _convert_unet_alone(alone, target, out, dtype)
    if model.is_file():
        held = " and a ".join(title(identify(one).kind) for one in open_weights(model))
        raise UserError(
            f"{model}: holds a {held}, and of single files U-Nets and their whole models are "
            "converted; name the folder of the whole model"
        )
    source = open_source(model)
    parts = source.load(torch.device("cpu"), Dtypes.same(dtype))
    writers = {"ours": _write_ours, "original": _write_original, "diffusers": _write_diffusers}
    with atomic_folder(out) as temporary:
        written = writers[target](source, parts, temporary, dtype)
    return written.moved(temporary, out)


def _files_of(model: Path) -> ModelFiles | None:
    """Return a folder, or what may be a single file of SD or SDXL."""
    if model.is_dir():
        return ModelFiles((model,))
    if not model.is_file() or not any(one.part == "unet" for one in open_weights(model)):
        return None
    return ModelFiles((model.parent,), files=frozenset({model}))


def _convert_unet(source: UNetSource, target: Target, out: Path, dtype: torch.dtype) -> Written:
    """Write a U-Net's pipeline; our layout of one is diffusers', for students that it can build."""
    parts = source.load(torch.device("cpu"), UNetDtypes(dtype, dtype, torch.float32))
    spec, told = source.spec, source.told()
    with atomic_folder(out) as temporary:
        if target == "original":
            written = write_unet_file(spec, parts, temporary, dtype, told)
        else:
            theirs = target == "diffusers"
            written = write_unet_folder(spec, parts, temporary, dtype, told, theirs=theirs)
    return written.moved(temporary, out, source.spec.notices)


def _convert_unet_alone(
    found: FoundNetwork, target: Target, out: Path, dtype: torch.dtype
) -> Written:
    """Write a U-Net without a pipeline; our layout of one is diffusers', if it can build it."""
    unet = cast(UNet, build(found.opened, found.published, dtype=dtype))
    size = found.opened.declared.get("sample_size")
    with atomic_folder(out) as temporary:
        written = write_unet_alone(
            unet,
            temporary,
            dtype,
            original=target == "original",
            theirs=target == "diffusers",
            sample_size=size if isinstance(size, int) else None,
            notes=found.told,
        )
    return written.moved(temporary, out)


def _networks(parts: CascadeParts) -> Iterator[tuple[str, nn.Module]]:
    yield "stage_c", parts.stage_c
    yield "stage_b", parts.stage_b
    yield "stage_a", parts.stage_a
    for name in ("compressor", "previewer"):
        if name in parts.extras:
            yield name, parts.extras[name](torch.device("cpu"))


def _image_encoder(parts: CascadeParts, dtype: torch.dtype) -> PictureEncoder:
    encoder: PictureEncoder = parts.extras["image_encoder"](torch.device("cpu"))
    encoder.to(dtype)
    for key, value in encoder.state_dict().items():
        finite_in(value, dtype, f"image_encoder, {key}")
    return encoder


def family_for(network: nn.Module) -> Family:
    """Return the family of one of our networks."""
    for family in FAMILIES:
        if type(network) is family.network:
            return family
    raise AssertionError(f"no family for {type(network).__name__}")


# Ours


def _write_ours(source: Source, parts: CascadeParts, out: Path, dtype: torch.dtype) -> Written:
    files = []
    for name, network in _networks(parts):
        told = told_by(source.metadata(name))
        save_network(out / f"{name}.safetensors", network, dtype=dtype, metadata=told)
        files.append(out / f"{name}.safetensors")
    for name, encoder in (("text", parts.text), ("text_b", parts.text_b)):
        if encoder is not None:
            write_text(encoder, out / name, out / name, dtype)
            files.append(out / name)
    if "image_encoder" in parts.extras:
        _image_encoder(parts, dtype).save(out / "image_encoder")
        files.append(out / "image_encoder")
    save_spec(source.spec, out)
    return Written((*files, out / "model.json"), ())


# The authors' single files


def _write_original(source: Source, parts: CascadeParts, out: Path, dtype: torch.dtype) -> Written:
    files = []
    for name, network in _networks(parts):
        family = family_for(network)
        config: Any = network.config
        state = family.to_layout["original"](network.state_dict(), config)
        marks = "_lite" if config in _LITE else ""
        marks += "_bf16" if dtype == torch.bfloat16 and name in ("stage_b", "stage_c") else ""
        path = out / f"{ORIGINAL_NAMES[name]}{marks}.safetensors"
        save_state(path, network, state, dtype, told_by(source.metadata(name)))
        files.append(path)
    encoder = type(parts.text.model).__name__
    save_spec(source.spec, out, CONVERTED_SPEC_FILE)
    notice = (
        f"the authors' layout has no text encoder ({encoder}) and no sampling settings: whoever "
        f"opens these files brings them; {CONVERTED_SPEC_FILE} holds the settings for Cascade"
    )
    return Written((*files, out / CONVERTED_SPEC_FILE), (notice,))


# Folders of diffusers


def _write_diffusers(source: Source, parts: CascadeParts, out: Path, dtype: torch.dtype) -> Written:
    spec = source.spec
    v2 = spec.generation == "v2"
    cells = spec.pixels_per_stage_c_cell / parts.stage_a.downscale
    prior, decoder = out / "prior", out / "decoder"
    first = "WuerstchenPriorPipeline" if v2 else "StableCascadePriorPipeline"
    second = "WuerstchenDecoderPipeline" if v2 else "StableCascadeDecoderPipeline"
    library = "wuerstchen" if v2 else "diffusers"
    config_c, config_b = parts.stage_c.config, parts.stage_b.config
    c_class, b_class = diffusers_class(config_c), diffusers_class(config_b)

    notices = []
    if isinstance(config_c, StageCConfig) and config_c.image_channels is None:
        notices.append(
            "diffusers' prior pipeline always gives an image embedding, and this Stage C takes "
            "none: the folder loads there, but does not sample"
        )
    for folder, name in ((prior / "prior", "stage_c"), (decoder / "decoder", "stage_b")):
        _write_network(folder, getattr(parts, name), dtype, told_by(source.metadata(name)))
    _write_network(decoder / "vqgan", parts.stage_a, dtype, told_by(source.metadata("stage_a")))
    for folder, sampling in ((prior, spec.stage_c), (decoder, spec.stage_b)):
        write_scheduler(folder / "scheduler", sampling)
    write_text(parts.text, prior / "text_encoder", prior / "tokenizer", dtype)
    encoder_b = parts.text_b or parts.text
    write_text(encoder_b, decoder / "text_encoder", decoder / "tokenizer", dtype)

    text = ["transformers", type(parts.text.model).__name__]
    tokens = ["transformers", type(parts.text.tokenizer).__name__]
    scheduler = scheduler_class(spec.stage_c)
    index: dict[str, Any] = {
        "_class_name": first,
        "prior": [library, c_class],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": text,
        "tokenizer": tokens,
        "resolution_multiple": spec.pixels_per_stage_c_cell,
    }
    if "image_encoder" in parts.extras:
        _image_encoder(parts, dtype).save(prior / "image_encoder", prior / "feature_extractor")
        index |= {
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        }
    elif not v2:
        index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    atomic_write_text(prior / "model_index.json", json.dumps(index, indent=2) + "\n")
    index = {
        "_class_name": second,
        "decoder": [library, b_class],
        "scheduler": ["diffusers", scheduler_class(spec.stage_b)],
        "text_encoder": ["transformers", type(encoder_b.model).__name__],
        "tokenizer": ["transformers", type(encoder_b.tokenizer).__name__],
        "vqgan": ["wuerstchen", "PaellaVQModel"],
        # Rounded up a little: diffusers cuts the product off, and 6 * 5.3333 would be 31.
        "latent_dim_scale": math.ceil(cells * 100) / 100,
    }
    atomic_write_text(decoder / "model_index.json", json.dumps(index, indent=2) + "\n")
    notices.append("diffusers has no place for the compressor and the previewer")
    save_spec(spec, out, CONVERTED_SPEC_FILE)
    return Written((prior, decoder, out / CONVERTED_SPEC_FILE), tuple(notices))


def _write_network(
    folder: Path,
    network: StageA | StageB | StageBV2 | StageC | StageCV2,
    dtype: torch.dtype,
    told: Mapping[str, str],
) -> None:
    content = diffusers_config(network.config)
    folder.mkdir(parents=True)
    state = family_for(network).to_layout["diffusers"](network.state_dict(), network.config)
    save_state(folder / "diffusion_pytorch_model.safetensors", network, state, dtype, told)
    atomic_write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
