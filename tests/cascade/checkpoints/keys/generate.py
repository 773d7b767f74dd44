"""Write the key lists of the diffusers layout again: ``python tests/.../keys/generate.py``.

The values are those of the Hub's ``config.json`` files, so that diffusers alone says what the
folders hold. Lists are gzipped text, the same bytes for the same diffusers.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

FOLDER = Path(__file__).parent
CONV, TIME, ATTENTION = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"

# stabilityai/stable-cascade-prior: prior/config.json and prior_lite/config.json
PRIOR: dict[str, Any] = dict(
    in_channels=16,
    out_channels=16,
    timestep_ratio_embedding_dim=64,
    patch_size=1,
    conditioning_dim=2048,
    block_out_channels=(2048, 2048),
    num_attention_heads=(32, 32),
    down_num_layers_per_block=(8, 24),
    up_num_layers_per_block=(24, 8),
    down_blocks_repeat_mappers=(1, 1),
    up_blocks_repeat_mappers=(1, 1),
    block_types_per_layer=((CONV, TIME, ATTENTION),) * 2,
    clip_text_in_channels=1280,
    clip_text_pooled_in_channels=1280,
    clip_image_in_channels=768,
    clip_seq=4,
    kernel_size=3,
    dropout=(0.1, 0.1),
    self_attn=True,
    timestep_conditioning_type=("sca", "crp"),
    switch_level=(False,),
)
PRIOR_LITE = PRIOR | dict(
    conditioning_dim=1536,
    block_out_channels=(1536, 1536),
    num_attention_heads=(24, 24),
    down_num_layers_per_block=(4, 12),
    up_num_layers_per_block=(12, 4),
)
# stabilityai/stable-cascade: decoder/config.json and decoder_lite/config.json
DECODER: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    timestep_ratio_embedding_dim=64,
    patch_size=2,
    conditioning_dim=1280,
    block_out_channels=(320, 640, 1280, 1280),
    num_attention_heads=(0, 0, 20, 20),
    down_num_layers_per_block=(2, 6, 28, 6),
    up_num_layers_per_block=(6, 28, 6, 2),
    down_blocks_repeat_mappers=(1, 1, 1, 1),
    up_blocks_repeat_mappers=(3, 3, 2, 2),
    block_types_per_layer=((CONV, TIME),) * 2 + ((CONV, TIME, ATTENTION),) * 2,
    clip_text_pooled_in_channels=1280,
    clip_seq=4,
    effnet_in_channels=16,
    pixel_mapper_in_channels=3,
    kernel_size=3,
    dropout=(0.0, 0.0, 0.1, 0.1),
    self_attn=True,
    timestep_conditioning_type=("sca",),
)
DECODER_LITE = DECODER | dict(
    block_out_channels=(320, 576, 1152, 1152),
    num_attention_heads=(0, 9, 18, 18),
    down_num_layers_per_block=(2, 4, 14, 4),
    up_num_layers_per_block=(4, 14, 4, 2),
    up_blocks_repeat_mappers=(2, 2, 2, 2),
)
# warp-ai/wuerstchen-prior: prior/config.json; the other networks of v2 are the classes' defaults
PRIOR_V2: dict[str, Any] = dict(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24)


def _unet(config: dict[str, Any]) -> nn.Module:
    from diffusers.models.unets.unet_stable_cascade import StableCascadeUNet

    return StableCascadeUNet(**config)


def _stage_c_v2() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    return WuerstchenPrior(**PRIOR_V2)


def _stage_b_v2() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
        WuerstchenDiffNeXt,
    )

    # Its own start runs through all blocks for each module: minutes, and no value matters here.
    with mock.patch.object(WuerstchenDiffNeXt, "_init_weights", lambda self, module: None):
        return WuerstchenDiffNeXt()


def _stage_a() -> nn.Module:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    return PaellaVQModel()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "stage_a": _stage_a,
    "stage_b_v2": _stage_b_v2,
    "stage_b_v3": lambda: _unet(DECODER),
    "stage_b_v3_lite": lambda: _unet(DECODER_LITE),
    "stage_c_v2": _stage_c_v2,
    "stage_c_v3": lambda: _unet(PRIOR),
    "stage_c_v3_lite": lambda: _unet(PRIOR_LITE),
}


def listed(name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that diffusers gives a published network's tensors."""
    with torch.device("meta"):
        state = NETWORKS[name]().state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def main() -> None:
    import diffusers

    for name in NETWORKS:
        lines = [f"# {name}, diffusers layout; source: diffusers {diffusers.__version__}"]
        for key, shape in listed(name).items():
            lines.append(f"{key} {'x'.join(map(str, shape)) or '-'}")
        path = FOLDER / f"{name}.diffusers.txt.gz"
        path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
        print(path.name, len(lines) - 1)


if __name__ == "__main__":
    main()
