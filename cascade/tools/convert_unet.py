"""Writes a U-Net's pipeline as a folder of diffusers, which is our own layout, or a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cascade.checkpoints.autoencoder_kl import autoencoder_kl_to_original
from cascade.checkpoints.files import (
    CLASS_KEY,
    CONFIG_KEY,
    atomic_path,
    atomic_write_text,
    finite_in,
)
from cascade.checkpoints.load import TEXT_CLASS
from cascade.checkpoints.single_file import (
    AUTOENCODER,
    SD1_TEXT,
    SD2_TEXT,
    SDXL_TEXT,
    SDXL_TEXT_2,
    UNET,
    PartName,
    with_prefix,
)
from cascade.checkpoints.text_tower import text_from_transformers, text_to_original
from cascade.checkpoints.unet import unet_to_original
from cascade.checkpoints.written_tensors import save_tensors
from cascade.config import to_dict
from cascade.diffusion.discrete import NUM_TIMESTEPS
from cascade.errors import UserError
from cascade.pipelines.unet_files import INDEX_FILE, SPEC_KEY
from cascade.pipelines.unet_parts import UNetParts
from cascade.pipelines.unet_spec import (
    UNET_SPEC_FILE,
    UNetSampler,
    UNetSampling,
    UNetSpec,
    save_unet_spec,
)
from cascade.text.encoder import TextEncoder
from cascade.text.towers import TextTowerConfig
from cascade.tools.written import Written, save_state, write_text
from stages.autoencoder_kl import AutoencoderKLConfig
from stages.unet.config import NUM_SIZES, UNetConfig
from stages.unet.unet import UNet

_SCHEDULERS: Mapping[UNetSampler, str] = {
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def write_unet_folder(
    spec: UNetSpec,
    parts: UNetParts,
    out: Path,
    dtype: torch.dtype,
    notes: Mapping[str, Mapping[str, str]] | None = None,
    *,
    theirs: bool = True,
) -> Written:
    """Write folders of diffusers, and ``pipeline.json``, which says what they have no place for.

    Args:
        spec: How it is sampled.
        parts: The networks.
        out: A folder that is there.
        dtype: Number format of all weights.
        notes: Further metadata of the networks "unet" and "vae": what they cost, how they predict.
        theirs: Whether diffusers must be able to open it. If not, a student that it can't build is
            written without the two files that would say it could, and with a notice.

    Raises:
        UserError: For a student that diffusers can't build, or numbers too large for the format.
    """
    unet, autoencoder, notes = parts.unet, parts.autoencoder, notes or {}
    unet_config: Mapping[str, Any] | None = None
    notices: tuple[str, ...] = ()
    reason = why_not_diffusers(unet.config)
    if reason is None or theirs:
        unet_config = unet_config_of(unet.config, spec.sample_size)
    else:
        notices = (f"{reason}: the folder is for Cascade alone, without {INDEX_FILE}",)
    (out / "unet").mkdir()
    (out / "vae").mkdir()
    _write_network(out / "unet", unet, unet_config, dtype, notes.get("unet", {}))
    vae = autoencoder_config_of(autoencoder.config, spec)
    _write_network(out / "vae", autoencoder, vae, dtype, notes.get("vae", {}))
    index: dict[str, Any] = {
        "scheduler": ["diffusers", _SCHEDULERS[spec.sampling.sampler]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    folders = ["unet", "vae", "scheduler"]
    for name, tokens, encoder in _encoders(parts):
        write_text(encoder, out / name, out / tokens, dtype)
        index[name] = ["transformers", type(encoder.model).__name__]
        index[tokens] = ["transformers", type(encoder.tokenizer).__name__]
        folders += [name, tokens]
    if unet.config.text_pooled_channels is None:
        index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    else:
        index["_class_name"] = "StableDiffusionXLPipeline"
        index["force_zeros_for_empty_prompt"] = spec.empty_negative == "zeros"
        for absent in ("text_encoder", "tokenizer"):
            index.setdefault(absent, [None, None])  # of SDXL's kind with one text encoder
    (out / "scheduler").mkdir()
    scheduler = json.dumps(scheduler_of(spec.sampling), indent=2) + "\n"
    atomic_write_text(out / "scheduler" / "scheduler_config.json", scheduler)
    names = (*folders, UNET_SPEC_FILE)
    if unet_config is not None:
        atomic_write_text(out / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")
        names = (*names, INDEX_FILE)
    save_unet_spec(spec, out)
    return Written(tuple(out / name for name in names), notices)


def write_unet_file(
    spec: UNetSpec,
    parts: UNetParts,
    out: Path,
    dtype: torch.dtype,
    notes: Mapping[str, Mapping[str, str]] | None = None,
) -> Written:
    """Write a single file, with the tokenizers beside it, for which it has no place.

    The arguments and errors are those of ``write_unet_folder``.
    """
    unet, autoencoder = parts.unet, parts.autoencoder
    networks: list[tuple[PartName, str, nn.Module, dict[str, Tensor]]] = [
        ("unet", UNET, unet, unet_to_original(unet.state_dict(), unet.config)),
        (
            "autoencoder",
            AUTOENCODER,
            autoencoder,
            autoencoder_kl_to_original(autoencoder.state_dict(), autoencoder.config),
        ),
    ]
    metadata = {"format": "pt", SPEC_KEY: json.dumps(to_dict(replace(spec, notices=())))}
    for noted, name in (("unet", "unet"), ("vae", "autoencoder")):
        metadata |= {f"{key}.{name}": text for key, text in (notes or {}).get(noted, {}).items()}
    tensors: dict[str, Tensor] = {}
    for name, prefix, network, state in networks:
        metadata[f"{CLASS_KEY}.{name}"] = type(network).__name__
        metadata[f"{CONFIG_KEY}.{name}"] = json.dumps(to_dict(network.config))
        tensors |= with_prefix(state, prefix)
    folders = []
    for part, tokens, encoder in _encoders(parts):
        config = TextTowerConfig.of_transformers(encoder.model)
        is_sdxl = unet.config.text_pooled_channels is not None
        prefix, state = _text_of(encoder, config, part, is_sdxl=is_sdxl)
        metadata[f"{CLASS_KEY}.{part}"] = TEXT_CLASS
        metadata[f"{CONFIG_KEY}.{part}"] = json.dumps(to_dict(config))
        tensors |= with_prefix(state, prefix)
        encoder.tokenizer.save_pretrained(out / tokens)
        folders.append(out / tokens)
    path = out / f"{spec.name}.safetensors"
    cast = {
        key: finite_in(one, dtype, f"{path.name}, {key}").contiguous().clone()
        for key, one in tensors.items()
    }
    with atomic_path(path) as temporary:
        save_tensors(cast, temporary, metadata)
    return Written((path, *folders), ())


def write_unet_alone(
    unet: UNet,
    out: Path,
    dtype: torch.dtype,
    *,
    original: bool,
    theirs: bool,
    sample_size: int | None,
    notes: Mapping[str, str],
) -> Written:
    """Write a U-Net without the rest of its pipeline.

    Args:
        unet: The network.
        out: A folder that is there.
        dtype: Number format of all weights.
        original: The authors' names without a prefix, in ``unet.safetensors``; else a folder of
            diffusers.
        theirs: Whether diffusers must be able to open that folder; see ``write_unet_folder``.
        sample_size: Latent cells per side of its pictures; None: SDXL's 128, or SD's 64.
        notes: Further metadata: what it cost, how it predicts.

    Raises:
        UserError: For a student that diffusers can't build, or numbers too large for the format.
    """
    if original:
        path = out / "unet.safetensors"
        state = unet_to_original(unet.state_dict(), unet.config)
        save_state(path, unet, state, dtype, notes)
        return Written((path,), ())
    file = out / "diffusion_pytorch_model.safetensors"
    reason = why_not_diffusers(unet.config)
    if reason is not None and not theirs:
        _write_network(out, unet, None, dtype, notes)
        return Written((file,), (f"{reason}: the file is for Cascade alone, without config.json",))
    notices = []
    if sample_size is None:
        sample_size = 64 if unet.config.text_pooled_channels is None else 128
        notices.append(
            f"its file does not tell the size of its pictures: config.json has {sample_size} "
            "latent cells per side, diffusers' default for it"
        )
    _write_network(out, unet, unet_config_of(unet.config, sample_size), dtype, notes)
    return Written((file, out / "config.json"), tuple(notices))


def _encoders(parts: UNetParts) -> list[tuple[PartName, str, TextEncoder]]:
    """Return each text encoder's place, its tokenizer's, and itself."""
    if parts.text_2 is not None:
        return [
            ("text_encoder", "tokenizer", parts.text),
            ("text_encoder_2", "tokenizer_2", parts.text_2),
        ]
    if parts.unet.config.text_pooled_channels is not None:
        return [("text_encoder_2", "tokenizer_2", parts.text)]
    return [("text_encoder", "tokenizer", parts.text)]


def _text_of(
    encoder: TextEncoder, config: TextTowerConfig, part: PartName, *, is_sdxl: bool
) -> tuple[str, dict[str, Tensor]]:
    """Return a text tower's place in a single file, and its weights under that place's names."""
    state = text_from_transformers(encoder.model.state_dict())
    if part == "text_encoder_2":
        return SDXL_TEXT_2, text_to_original(state, config)
    if is_sdxl:
        return SDXL_TEXT, state
    if config.activation == "gelu":
        return SD2_TEXT, text_to_original(state, config)
    return SD1_TEXT, state


def _write_network(
    folder: Path,
    network: Any,
    content: Mapping[str, Any] | None,
    dtype: torch.dtype,
    notes: Mapping[str, str],
) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    save_state(path, network, network.state_dict(), dtype, notes)
    if content is not None:
        atomic_write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")


def why_not_diffusers(config: UNetConfig) -> str | None:
    """Return why diffusers can't build a U-Net: it has no words for its depths; None: it can."""
    mixed = [d for d in (*config.down_depths, *config.up_depths) if 0 in d and any(d)]
    if not mixed and (not config.mid_depth or config.mid_depth == _depth(config.down_depths[-1])):
        return None
    return (
        f"diffusers can't build this U-Net: down_depths {config.down_depths}, mid_depth "
        f"{config.mid_depth}, up_depths {config.up_depths}"
    )


def unet_config_of(config: UNetConfig, sample_size: int) -> dict[str, Any]:
    """Return what diffusers' ``config.json`` says of a U-Net.

    Args:
        config: Its sizes.
        sample_size: Latent cells per side of the pictures that it is for.

    Raises:
        UserError: For a student whose depths diffusers has no words for.
    """
    reason = why_not_diffusers(config)
    if reason is not None:
        raise UserError(f"{reason}; write ours, or the original layout")
    down, up = ([_depth(d) for d in way] for way in (config.down_depths, config.up_depths))
    layers = [len(depths) for depths in config.down_depths]
    middle = "UNetMidBlock2D" if config.mid_depth == 0 else "UNetMidBlock2DCrossAttn"
    content: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        # The number of heads: the name is a slip that published files keep.
        "attention_head_dim": list(config.num_heads),
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "down_block_types": [f"{_attends(d)}DownBlock2D" for d in config.down_depths],
        "mid_block_type": None if config.mid_depth is None else middle,
        "up_block_types": [f"{_attends(d)}UpBlock2D" for d in config.up_depths],
        "transformer_layers_per_block": down,
        "cross_attention_dim": config.text_channels,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
    }
    if up != down[::-1] or any(isinstance(depth, list) for depth in down):
        content["reverse_transformer_layers_per_block"] = up
    if config.text_pooled_channels is not None and config.size_channels is not None:
        content |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": config.size_channels,
            "projection_class_embeddings_input_dim": (
                config.text_pooled_channels + NUM_SIZES * config.size_channels
            ),
        }
    return content


def _depth(depths: tuple[int, ...]) -> int | list[int]:
    # A level without attention has some depth there, which nobody reads.
    return max(1, depths[0]) if len(set(depths)) == 1 else list(depths)


def _attends(depths: tuple[int, ...]) -> str:
    return "CrossAttn" if any(depths) else ""


def autoencoder_config_of(config: AutoencoderKLConfig, spec: UNetSpec) -> dict[str, Any]:
    """Return what diffusers' ``config.json`` says of an autoencoder."""
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": spec.image_size,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.channels),
        "layers_per_block": config.blocks_per_level,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "force_upcast": not spec.autoencoder_in_float16,
    }


def scheduler_of(sampling: UNetSampling) -> dict[str, Any]:
    """Return the ``scheduler_config.json`` of a sampling."""
    return {
        "_class_name": _SCHEDULERS[sampling.sampler],
        "beta_start": sampling.beta_start,
        "beta_end": sampling.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": NUM_TIMESTEPS,
        "prediction_type": _PREDICTIONS[sampling.prediction],
        "timestep_spacing": sampling.spacing,
        "steps_offset": sampling.steps_offset,
        "set_alpha_to_one": sampling.ends_clean,
        "clip_sample": False,
    }
