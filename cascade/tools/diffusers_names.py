"""What diffusers calls a cascade's networks and schedulers: their classes and ``config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_write_text
from cascade.diffusion.schedules import CosineSchedule
from cascade.errors import UserError
from cascade.pipelines.spec import StageSampling
from stages.stage_a import StageAConfig
from stages.stage_b import StageBConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config

StageConfig = StageAConfig | StageBConfig | StageBV2Config | StageCConfig | StageCV2Config
TRAIN_TIMES = 1000
"""Discrete times of a diffusers scheduler for networks that do not predict epsilon."""
_CONV, _TIME, _ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


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
    return {"_class_name": diffusers_class(config), **sizes}


def diffusers_class(config: StageConfig) -> str:
    """Return the name of a network's class in diffusers."""
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


def scheduler_class(sampling: StageSampling) -> str:
    """Return the name of the scheduler with which diffusers samples a stage.

    Raises:
        UserError: It has none for its prediction and schedule.
    """
    if sampling.schedule != "cosine" or sampling.prediction == "flow" or sampling.zero_terminal_snr:
        raise UserError(
            f"diffusers' pipelines can't sample this model: prediction {sampling.prediction}, "
            f"schedule {sampling.schedule}, zero_terminal_snr {sampling.zero_terminal_snr}; write "
            "our own layout, or the original one, which cascade.json beside it describes"
        )
    return "DDPMWuerstchenScheduler" if sampling.prediction == "epsilon" else "DDIMScheduler"


def write_scheduler(folder: Path, sampling: StageSampling) -> None:
    """Write the published scheduler, or DDIM on our cosine where the network predicts v or x0."""
    folder.mkdir(parents=True)
    name = scheduler_class(sampling)
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
