"""Whole U-Net models with tiny random weights, written by our own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from cascade.pipelines.unet_parts import UNetParts
from cascade.pipelines.unet_spec import UNetSampling, UNetSpec
from cascade.text.encoder import TextConfig, TextEncoder
from cascade.text.tokenizer import train_tokenizer
from cascade.text.towers import TextTowerConfig
from cascade.tools.convert_unet import write_unet_file, write_unet_folder
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.unet.unet import UNet
from tests.reference.unet_toys import SD, SDXL, spread

CAPTIONS = ["a 3D render of a red apple", "a flat icon of a blue fish", "a photo of a green hat"]
WINDOW = 16
PENULTIMATE = TextConfig(hidden="penultimate", masks_padding=False)
POST_NORM = TextConfig(hidden="post_norm", masks_padding=False)


def text_encoder(config: TextTowerConfig, states: TextConfig, tokens: Any) -> TextEncoder:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projects = config.projection_channels is not None
    model = (CLIPTextModelWithProjection if projects else CLIPTextModel)(
        CLIPTextConfig(
            hidden_size=config.channels,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.mlp_channels,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.window,
            projection_dim=config.projection_channels or 8,
            hidden_act=config.activation,
            bos_token_id=tokens.bos_token_id,
            eos_token_id=tokens.eos_token_id,
            pad_token_id=tokens.pad_token_id,
        )
    )
    return TextEncoder(tokens, model, states)


def tiny_model(kind: Literal["sdxl", "sd"]) -> tuple[UNetSpec, UNetParts]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = train_tokenizer(CAPTIONS, 320, WINDOW)
        sizes = dict(num_layers=2, num_heads=1, mlp_channels=32, vocab_size=len(tokens))
        sizes |= dict(window=WINDOW, end_token=tokens.eos_token_id)
        sdxl = kind == "sdxl"
        first = TextTowerConfig(channels=16 if sdxl else 24, **sizes)  # type: ignore[arg-type]
        second = TextTowerConfig(channels=24, projection_channels=20, activation="gelu", **sizes)  # type: ignore[arg-type]
        vae = AutoencoderKLConfig(
            channels=(16, 32), blocks_per_level=1, norm_groups=8, scale=0.13025 if sdxl else 0.18215
        )
        states = PENULTIMATE if sdxl else POST_NORM
        parts = UNetParts(
            unet=spread(UNet(SDXL if sdxl else SD)),
            autoencoder=spread(AutoencoderKL(vae)),
            text=text_encoder(first, states, tokens),
            text_2=text_encoder(second, states, tokens) if sdxl else None,
        )
    sampling = UNetSampling("euler", steps=3, guidance=3.5, spacing="trailing")
    spec = UNetSpec(
        name=f"tiny-{kind}",
        image_size=16,
        size_multiple=2,
        min_size=8,
        max_size=64,
        sampling=sampling if sdxl else UNetSampling("ddim", steps=3, guidance=2.0),
        empty_negative="zeros" if sdxl else "encoded",
        autoencoder_in_float16=not sdxl,
        text=states,
        text_2=states if sdxl else None,
        licence="Apache-2.0",
    )
    return spec, parts


def save_tiny(folder: Path, kind: Literal["sdxl", "sd"], *, single: bool = False) -> Path:
    """Write a model's folder, or a single file in it; return what names the model."""
    spec, parts = tiny_model(kind)
    folder.mkdir(parents=True)
    write = write_unet_file if single else write_unet_folder
    written = write(spec, parts, folder, torch.float32)
    return written.files[0] if single else folder


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    own, theirs = one.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
