"""Whole U-Net pipelines with tiny random weights, as diffusers makes and saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stages.unet.config import UNetConfig
from tests.stages.unet.toys import diffusers_arguments

WINDOW = 20
SDXL = UNetConfig(
    channels=(32, 64),
    num_heads=(2, 4),
    down_depths=((0,), (1,)),
    mid_depth=1,
    up_depths=((1, 2), (0, 0)),
    text_channels=16 + 24,
    text_pooled_channels=20,
    size_channels=8,
    norm_groups=8,
)
SD = UNetConfig(
    channels=(32, 64),
    num_heads=(2, 2),
    down_depths=((1,), (0,)),
    mid_depth=None,
    up_depths=((0, 0), (1, 1)),
    text_channels=24,
    text_pooled_channels=None,
    size_channels=None,
    linear_projection=False,
    norm_groups=8,
)
SCHEDULE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)


def tokenizer(folder: Path, pad: str | None = None) -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    extra = {} if pad is None else {"pad_token": pad}
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return CLIPTokenizer(*files, model_max_length=WINDOW, **extra)


def text_model(tokens: Any, width: int, activation: str, *, projects: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=1,
        max_position_embeddings=WINDOW,
        projection_dim=20,
        hidden_act=activation,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


def spread(network: nn.Module) -> Any:
    """Give zero-initialised weights values, so that all of the network has a say."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return network.eval()


def save_pipeline(folder: Path, kind: str, prediction: str = "epsilon") -> Any:
    """Save an "sdxl" or "sd" pipeline of diffusers and return it."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )

    torch.manual_seed(0)
    config = SDXL if kind == "sdxl" else SD
    unet = UNet2DConditionModel(sample_size=8, **diffusers_arguments(config))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    )
    scheduler = EulerDiscreteScheduler(**SCHEDULE, prediction_type=prediction)
    tokens = tokenizer(folder.parent / f"{folder.name}-tokens")
    if kind == "sdxl":
        tokens_2 = tokenizer(folder.parent / f"{folder.name}-tokens_2", "!")
        pipeline: Any = StableDiffusionXLPipeline(
            vae=spread(vae),
            text_encoder=text_model(tokens, 16, "quick_gelu", projects=False),
            text_encoder_2=text_model(tokens_2, 24, "gelu", projects=True),
            tokenizer=tokens,
            tokenizer_2=tokens_2,
            unet=spread(unet),
            scheduler=scheduler,
            add_watermarker=False,
        )
    else:
        pipeline = StableDiffusionPipeline(
            vae=spread(vae),
            text_encoder=text_model(tokens, 24, "quick_gelu", projects=False),
            tokenizer=tokens,
            unet=spread(unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler(sampler: str, spacing: str, prediction: str) -> Any:
    """Return diffusers' scheduler that is one of our samplers."""
    import diffusers

    name = {
        "euler": "EulerDiscreteScheduler",
        "euler_ancestral": "EulerAncestralDiscreteScheduler",
        "ddim": "DDIMScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "lcm": "LCMScheduler",
    }[sampler]
    arguments: dict[str, Any] = {
        **SCHEDULE,
        "prediction_type": {"v": "v_prediction"}.get(prediction, prediction),
    }
    if sampler != "lcm":
        arguments["timestep_spacing"] = spacing
    if sampler in ("ddim", "lcm"):
        arguments |= {"clip_sample": False, "set_alpha_to_one": False}
    return getattr(diffusers, name)(**arguments)
