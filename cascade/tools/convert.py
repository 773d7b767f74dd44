"""Writes a model in another layout: ours, the authors' single files, or folders of diffusers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cascade.checkpoints.files import (
    CLASS_KEY,
    CONFIG_KEY,
    atomic_folder,
    atomic_write_text,
    finite_in,
    save_network,
)
from cascade.checkpoints.found import FoundNetwork
from cascade.checkpoints.hub import ModelFiles
from cascade.checkpoints.load import FAMILIES, Family, build
from cascade.checkpoints.part_files import unet_alone
from cascade.checkpoints.readers import open_weights
from cascade.diffusion.schedules import CosineSchedule
from cascade.errors import UserError
from cascade.pipelines.parts import CascadeParts, Source, open_source
from cascade.pipelines.placement import Dtypes, UNetDtypes
from cascade.pipelines.spec import CONVERTED_SPEC_FILE, StageSampling, save_spec
from cascade.pipelines.unet_parts import UNetSource, is_unet, open_unet_source
from cascade.text.picture_encoder import PictureEncoder
from cascade.tools.convert_unet import write_unet_alone, write_unet_file, write_unet_folder
from cascade.tools.written import Written, save_state, write_text
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from stages.unet.unet import UNet

StageConfig = StageAConfig | StageBConfig | StageBV2Config | StageCConfig | StageCV2Config
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
TRAIN_TIMES = 1000
"""Discrete times of a diffusers scheduler for networks that do not predict epsilon."""
_LITE = (StageBConfig.lite(), StageCConfig.lite())
_CONV, _TIME, _ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def convert(model: Path, target: Target, out: Path, dtype: torch.dtype) -> Written:
    """Write a model, or a U-Net alone, to the folder ``out``, in another layout and number format.

    The folder appears when all of it is written, or not at all.

    Raises:
        UserError: If ``out`` holds anything already, can't be made, or the cascade has no such
            layout.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty; name a new folder")
    found = _files_of(model)
    if found is not None and is_unet(found):
        return _convert_unet(open_unet_source(found), target, out, dtype)
    if (alone := unet_alone(model)) is not None:
        return _convert_unet_alone(alone, target, out, dtype)
    if model.is_file():
        raise UserError(f"{model}: a file; name the folder of the whole cascade")
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
    """Write a U-Net without a pipeline; our layout of one is diffusers'."""
    unet = cast(UNet, build(found.opened, found.published, dtype=dtype))
    size = found.opened.declared.get("sample_size")
    with atomic_folder(out) as temporary:
        written = write_unet_alone(
            unet,
            temporary,
            dtype,
            original=target == "original",
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


def _carried(source: Source, name: str) -> dict[str, str]:
    """Return what a network's file says of itself beside its sizes, such as how it was trained."""
    left_out = ("format", CLASS_KEY, CONFIG_KEY)
    return {key: value for key, value in source.metadata(name).items() if key not in left_out}


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
        carried = _carried(source, name)
        save_network(out / f"{name}.safetensors", network, dtype=dtype, metadata=carried)
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
        save_state(path, network, state, dtype, _carried(source, name))
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
    c_class, b_class = _diffusers_class(config_c), _diffusers_class(config_b)

    notices = []
    if isinstance(config_c, StageCConfig) and config_c.image_channels is None:
        notices.append(
            "diffusers' prior pipeline always gives an image embedding, and this Stage C takes "
            "none: the folder loads there, but does not sample"
        )
    for folder, name in ((prior / "prior", "stage_c"), (decoder / "decoder", "stage_b")):
        _write_network(folder, getattr(parts, name), dtype, _carried(source, name))
    _write_network(decoder / "vqgan", parts.stage_a, dtype, _carried(source, "stage_a"))
    for folder, sampling in ((prior, spec.stage_c), (decoder, spec.stage_b)):
        _write_scheduler(folder / "scheduler", sampling)
    write_text(parts.text, prior / "text_encoder", prior / "tokenizer", dtype)
    encoder_b = parts.text_b or parts.text
    write_text(encoder_b, decoder / "text_encoder", decoder / "tokenizer", dtype)

    text = ["transformers", type(parts.text.model).__name__]
    tokens = ["transformers", type(parts.text.tokenizer).__name__]
    scheduler = _scheduler_class(spec.stage_c)
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
        "scheduler": ["diffusers", _scheduler_class(spec.stage_b)],
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
    carried: Mapping[str, str],
) -> None:
    content = diffusers_config(network.config)
    folder.mkdir(parents=True)
    state = family_for(network).to_layout["diffusers"](network.state_dict(), network.config)
    save_state(folder / "diffusion_pytorch_model.safetensors", network, state, dtype, carried)
    atomic_write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")


def diffusers_config(config: StageConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a network's folder in diffusers.

    Raises:
        UserError: If diffusers has no Stage A of these sizes.
    """
    if isinstance(config, StageAConfig):
        sizes = _vqgan_config(config)
    elif isinstance(config, (StageBConfig, StageBV2Config)):
        sizes = _unet_config_b(config)
    else:
        sizes = _unet_config_c(config)
    return {"_class_name": _diffusers_class(config), **sizes}


def _diffusers_class(config: StageConfig) -> str:
    return {
        StageAConfig: "PaellaVQModel",
        StageBConfig: "StableCascadeUNet",
        StageCConfig: "StableCascadeUNet",
        StageBV2Config: "WuerstchenDiffNeXt",
        StageCV2Config: "WuerstchenPrior",
    }[type(config)]


def _unet_config_c(config: StageCConfig | StageCV2Config) -> dict[str, Any]:
    if isinstance(config, StageCV2Config):
        return {
            "c_in": config.latent_channels,
            "c": config.hidden_channels,
            "c_cond": config.text_channels,
            "c_r": config.time_channels,
            "depth": config.num_blocks,
            "nhead": config.num_heads,
            "dropout": config.dropout,
        }
    levels = len(config.hidden_channels)
    return {
        **_unet_common(config),
        "block_types_per_layer": [[_CONV, _TIME, _ATTENTION]] * levels,
        "clip_image_in_channels": config.image_channels,
        "clip_text_in_channels": config.text_channels,
        "dropout": [config.dropout] * levels,
        "num_attention_heads": list(config.num_heads),
        "switch_level": [False] * (levels - 1),
        "up_blocks_repeat_mappers": [1] * levels,
    }


def _unet_config_b(config: StageBConfig | StageBV2Config) -> dict[str, Any]:
    heads = [count or -1 for count in config.num_heads]
    if isinstance(config, StageBV2Config):
        return {
            "c_in": config.latent_channels,
            "c_out": config.latent_channels,
            "c_r": config.time_channels,
            "patch_size": config.patch_size,
            "c_cond": config.cond_channels,
            "c_hidden": list(config.hidden_channels),
            "nhead": heads,
            "blocks": list(config.num_blocks),
            "level_config": ["CTA" if count > 0 else "CT" for count in heads],
            "inject_effnet": list(config.reads_compressed),
            "effnet_embd": config.compressed_channels,
            "clip_embd": config.text_channels,
            "kernel_size": config.kernel_size,
            "dropout": list(config.dropout),
        }
    return {
        **_unet_common(config),
        "block_types_per_layer": [
            [_CONV, _TIME, _ATTENTION] if count else [_CONV, _TIME] for count in config.num_heads
        ],
        "dropout": list(config.dropout),
        "effnet_in_channels": config.compressed_channels,
        "num_attention_heads": heads,
        "pixel_mapper_in_channels": 3 if config.pixel_condition else None,
        "up_blocks_repeat_mappers": list(config.up_repeats),
    }


def _unet_common(config: StageBConfig | StageCConfig) -> dict[str, Any]:
    return {
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "timestep_ratio_embedding_dim": config.time_channels,
        "patch_size": config.patch_size,
        "conditioning_dim": config.cond_channels,
        "block_out_channels": list(config.hidden_channels),
        "down_num_layers_per_block": list(config.down_blocks),
        "up_num_layers_per_block": list(config.up_blocks),
        "down_blocks_repeat_mappers": [1] * len(config.hidden_channels),
        "clip_text_pooled_in_channels": config.text_pooled_channels,
        "clip_seq": config.pooled_tokens,
        "kernel_size": config.kernel_size,
        "self_attn": True,
        "timestep_conditioning_type": list(config.time_conds),
    }


def _vqgan_config(config: StageAConfig) -> dict[str, Any]:
    wide, levels = config.channels[-1], len(config.channels)
    halves = tuple(wide // 2 ** (levels - 1 - level) for level in range(levels))
    regular = (
        config.channels == halves
        and set(config.encoder_blocks) == {1}
        and set(config.decoder_blocks[1:]) <= {1}
        and config.expansion == 4
    )
    if not regular:
        raise UserError(
            f"diffusers' PaellaVQModel can't hold this Stage A: channels {config.channels}, "
            f"encoder_blocks {config.encoder_blocks}, decoder_blocks {config.decoder_blocks}"
        )
    return {
        "bottleneck_blocks": config.decoder_blocks[0],
        "embed_dim": wide,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "levels": levels,
        "num_vq_embeddings": config.codebook_size,
        "scale_factor": config.scale,
        "up_down_scale_factor": config.patch_size,
    }


def _scheduler_class(sampling: StageSampling) -> str:
    if sampling.schedule != "cosine" or sampling.prediction == "flow" or sampling.zero_terminal_snr:
        raise UserError(
            f"diffusers' pipelines can't sample this model: prediction {sampling.prediction}, "
            f"schedule {sampling.schedule}, zero_terminal_snr {sampling.zero_terminal_snr}; write "
            "our own layout, or the original one, which cascade.json beside it describes"
        )
    return "DDPMWuerstchenScheduler" if sampling.prediction == "epsilon" else "DDIMScheduler"


def _write_scheduler(folder: Path, sampling: StageSampling) -> None:
    """Write the published scheduler, or DDIM on our cosine where the network predicts v or x0."""
    folder.mkdir(parents=True)
    name = _scheduler_class(sampling)
    content: dict[str, Any] = {"_class_name": name, "s": 0.008, "scaler": 1.0}
    if name == "DDIMScheduler":
        predictions = {"v": "v_prediction", "x0": "sample"}
        content = {
            "_class_name": name,
            "num_train_timesteps": TRAIN_TIMES,
            "trained_betas": discrete_betas(sampling.shift).tolist(),
            "prediction_type": predictions[sampling.prediction],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        }
    atomic_write_text(folder / "scheduler_config.json", json.dumps(content) + "\n")


def discrete_betas(shift: float = 1.0) -> Tensor:
    """Return the betas whose running product is our cosine at ``(k + 1) / TRAIN_TIMES``."""
    times = torch.arange(1, TRAIN_TIMES + 1, dtype=torch.float64) / TRAIN_TIMES
    signal = CosineSchedule(shift=shift).log_snr(times).double().sigmoid()  # alpha^2
    before = torch.cat([torch.ones(1, dtype=torch.float64), signal[:-1]])
    return 1.0 - signal / before
