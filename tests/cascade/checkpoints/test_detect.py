from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cascade.checkpoints import autoencoders, stable_cascade, wuerstchen
from cascade.checkpoints.detect import detect, num_parameters
from cascade.errors import UserError
from stages.previewer import Previewer, PreviewerConfig
from stages.semantic_compressor import CompressorConfig, SemanticCompressor
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config

V3, V2 = stable_cascade, wuerstchen
CASES = [
    (StageC, StageCConfig.full(), V3.stage_c_to_original, "stage_c", "v3", "original"),
    (StageC, StageCConfig.full(), V3.stage_c_to_diffusers, "stage_c", "v3", "diffusers"),
    (StageC, StageCConfig.lite(), V3.stage_c_to_original, "stage_c", "v3", "original"),
    (StageB, StageBConfig.full(), V3.stage_b_to_original, "stage_b", "v3", "original"),
    (StageB, StageBConfig.full(), V3.stage_b_to_diffusers, "stage_b", "v3", "diffusers"),
    (StageB, StageBConfig.lite(), V3.stage_b_to_original, "stage_b", "v3", "original"),
    (StageCV2, StageCV2Config(), V2.stage_c_to_original, "stage_c", "v2", "original"),
    (StageCV2, StageCV2Config(), V2.stage_c_to_diffusers, "stage_c", "v2", "diffusers"),
    (StageBV2, StageBV2Config(), V2.stage_b_to_original, "stage_b", "v2", "original"),
    (StageBV2, StageBV2Config(), V2.stage_b_to_diffusers, "stage_b", "v2", "diffusers"),
    (StageA, StageAConfig(), autoencoders.stage_a_to_original, "stage_a", None, "original"),
    (StageA, StageAConfig(), autoencoders.stage_a_to_diffusers, "stage_a", None, "diffusers"),
    (
        SemanticCompressor,
        CompressorConfig.v2(),
        autoencoders.compressor_to_original,
        "compressor",
        "v2",
        "original",
    ),
    (
        SemanticCompressor,
        CompressorConfig.v3(),
        autoencoders.compressor_to_original,
        "compressor",
        "v3",
        "original",
    ),
    (
        Previewer,
        PreviewerConfig(),
        autoencoders.previewer_to_original,
        "previewer",
        "v3",
        "original",
    ),
]


def published_shapes(network: Any, config: Any, rename: Callable[..., Any]) -> dict[str, Any]:
    with torch.device("meta"):
        ours: nn.Module = network(config)
    return {key: tuple(value.shape) for key, value in rename(ours.state_dict(), config).items()}


@pytest.mark.parametrize(("network", "config", "rename", "kind", "generation", "layout"), CASES)
def test_every_published_network_is_known_by_its_shapes_alone(
    network: Any, config: Any, rename: Any, kind: str, generation: str | None, layout: str
) -> None:
    found = detect(published_shapes(network, config, rename), "file")
    assert (found.kind, found.generation, found.layout) == (kind, generation, layout)
    assert found.config == config


def test_a_small_network_of_other_sizes_is_read_from_its_shapes() -> None:
    config = StageCConfig(
        latent_channels=8,
        time_channels=16,
        cond_channels=32,
        hidden_channels=(64, 128),
        num_heads=(1, 2),
        down_blocks=(1, 2),
        up_blocks=(3, 1),
        text_channels=24,
        text_pooled_channels=20,
        pooled_tokens=2,
        image_channels=None,
        kernel_size=5,
        time_conds=("crp",),
    )
    shapes = published_shapes(StageC, config, stable_cascade.stage_c_to_diffusers)
    assert detect(shapes, "file").config == config


def test_a_declared_number_of_heads_wins_over_the_usual_width() -> None:
    config = StageCConfig(
        cond_channels=32,
        hidden_channels=(32, 32),
        num_heads=(4, 8),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        text_channels=24,
        text_pooled_channels=20,
        dropout=0.3,
    )
    shapes = published_shapes(StageC, config, stable_cascade.stage_c_to_diffusers)
    declared = {"num_attention_heads": [4, 8], "dropout": [0.3, 0.3], "patch_size": 1}
    assert detect(shapes, "file", declared).config == config


@pytest.mark.parametrize("shapes", [{}, {"weight": (3, 4), "bias": (3,)}])
def test_what_is_no_published_network_is_refused_naming_its_first_tensors(shapes: Any) -> None:
    with pytest.raises(UserError, match=r"^x\.safetensors: none of the networks"):
        detect(shapes, "x.safetensors")


def test_a_file_that_lacks_a_tensor_is_refused_naming_it() -> None:
    shapes = published_shapes(StageC, StageCConfig.lite(), stable_cascade.stage_c_to_original)
    del shapes["clip_txt_pooled_mapper.weight"]
    with pytest.raises(UserError, match="clip_txt_pooled_mapper"):
        detect(shapes, "x.safetensors")


def test_parameters_are_counted() -> None:
    assert num_parameters({"a": (3, 4), "b": (5,), "scalar": ()}) == 18
