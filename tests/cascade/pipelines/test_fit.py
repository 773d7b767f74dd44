from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from stages.stage_b import StageB
from stages.stage_c import StageC


@pytest.mark.parametrize(
    ("name", "network", "sizes", "message"),
    [
        ("stage_c", StageC, {"text_channels": 20}, "states: 16 channels, but Stage C .* for 20"),
        ("stage_c", StageC, {"text_pooled_channels": 20}, "pooled state: 12 .* Stage C .* for 20"),
        ("stage_b", StageB, {"text_pooled_channels": 20}, "pooled state: 12 .* Stage B .* for 20"),
        ("stage_c", StageC, {"latent_channels": 8}, "Stage C's latents: 8 .* Stage B .* for 16"),
        ("stage_b", StageB, {"latent_channels": 8}, "Stage B's latents: 8 .* Stage A .* for 4"),
    ],
)
def test_parts_of_different_models_are_refused_when_they_are_loaded(
    tiny_model: Path,
    tmp_path: Path,
    name: str,
    network: Callable[[Any], nn.Module],
    sizes: dict[str, int],
    message: str,
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / f"{name}.safetensors"
    config = load_network(path, expect=network).config
    save_network(path, network(replace(config, **sizes)))
    with pytest.raises(UserError, match=message) as caught:
        CascadePipeline(model, device="cpu")
    assert str(caught.value).startswith(str(model)) and "\n" not in str(caught.value)
