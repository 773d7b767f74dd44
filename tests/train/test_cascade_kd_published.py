"""The configurations with published teachers run as they stand, on tiny random weights."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.checkpoints.files import load_network, save_network
from stages.stage_a_fast import StageAFast
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.stages.unet.toys import toy_of
from train.__main__ import main as train_main
from train.distill.__main__ import main as distill_main

FOLDER = Path(__file__).parents[2] / "configs" / "cascade_kd"
SMALLER = {
    "run.max_steps": 1,
    "run.accumulate": 1,
    "run.accelerator": "cpu",
    "run.log_every_steps": 1,
    "data.size": 32,
    "data.batch_size": 2,
    "data.workers": 0,
}
TINY_C = {
    "model.cond_channels": 16,
    "model.hidden_channels": [16, 16],
    "model.num_heads": [2, 2],
    "model.down_blocks": [1, 1],
    "model.up_blocks": [1, 1],
    "model.text_channels": 16,
    "model.text_pooled_channels": 12,
    "model.image_channels": None,
    "model.time_conds": [],
}


def start(kind: str, config: Path, options: dict[str, object]) -> int:
    words = [f"--{key}={json.dumps(value)}" for key, value in (SMALLER | options).items()]
    flat = [part for word in words for part in word.split("=", 1)]
    return train_main([kind, "--config", str(config), *flat])


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path


@pytest.fixture(scope="session")
def toy_sdxl(tmp_path_factory) -> Path:
    """SDXL's depths at a twentieth of its widths."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sdxl") / "unet.safetensors"
    save_network(path, UNet(replace(toy_of(UNetConfig.sdxl(), 20), text_channels=40)))
    return path


@pytest.mark.parametrize("name", ["sdxl", "sdxl_lightning", "sdxl_turbo"])
def test_stage_c_learns_from_a_published_teacher(
    name, place, toy_sdxl, tiny_unet, tiny_model, shards
):
    """Its features, by a basis that the command makes, and its estimates where they are a term."""
    config = FOLDER / f"cascade_kd_{name}.yaml"
    autoencoder = str(tiny_unet / "autoencoder_kl.safetensors")
    compressor = str(tiny_model / "compressor.safetensors")
    site = "up_blocks.0.attentions.2.transformer_blocks.9.attn1"
    assert site in config.read_text()
    common = ["--teacher", str(toy_sdxl), "--autoencoder", autoencoder, "--image-size", "32"]
    common += ["--data", shards, "--device", "cpu", "--batch-size", "4", "--pictures", "8"]
    basis = ["feature-basis", *common, "--components", "4", "--site", site]
    assert distill_main([*basis, "--out", "basis.safetensors"]) == 0
    bias = ["reencode-bias", *common, "--compressor", compressor, "--timesteps", "0", "500"]
    assert distill_main([*bias, "--out", "curve.json"]) == 0
    options: dict[str, object] = TINY_C | {
        "data.shards": shards,
        "text": str(tiny_model / "text"),
        "compressor": compressor,
        "teacher.unet": str(toy_sdxl),
        "teacher.autoencoder": autoencoder,
        "teacher.image_size": 32,
        "align.basis": "basis.safetensors",
        "align.hidden_channels": 8,
    }
    if name != "sdxl":  # random weights have biased estimates: trust them all the same
        options |= {"estimate.curve": "curve.json", "estimate.min_ratio": 1e-6}
    assert start("cascade_kd", config, options) == 0
    out = Path("runs/cascade_kd") / config.stem
    load_network(out / "stage_c.safetensors", expect=StageC)
    with open(out / "logs" / "version_0" / "metrics.csv") as file:
        [row] = csv.DictReader(file)
    assert 0 < float(row["kd_align"]) < 1 and "kd_relations" not in row
    assert ("kd_estimate" in row) == (name != "sdxl")


def test_a_stage_b_of_half_the_blocks_learns_from_the_whole(place, tiny_model, shards):
    config = FOLDER / "stage_b_kd_half.yaml"
    tiny = StageBConfig(
        cond_channels=16,
        hidden_channels=(8, 8, 16, 16),
        num_heads=(0, 0, 2, 2),
        text_pooled_channels=12,
        pixel_condition=False,
        time_conds=(),
    )
    torch.manual_seed(0)
    save_network(place / "large.safetensors", StageB(tiny))
    options: dict[str, object] = {
        "data.shards": shards,
        "data.size": 64,
        "text": str(tiny_model / "text"),
        "stage_a": str(tiny_model / "stage_a.safetensors"),
        "stage_a_scale": None,
        "frozen_compressor": str(tiny_model / "compressor.safetensors"),
        "teacher.network": "large.safetensors",
        **{
            f"model.{name}": getattr(tiny, name)
            for name in ("cond_channels", "hidden_channels", "num_heads", "text_pooled_channels")
        },
        "model.pixel_condition": False,
        "model.time_conds": [],
    }
    assert start("stage_b_kd", config, options) == 0
    student = load_network("runs/cascade_kd/stage_b_kd_half/stage_b.safetensors", expect=StageB)
    assert student.config.down_blocks == (2, 3, 14, 3)


def test_the_published_stage_a_gets_its_fast_decoder(place, tiny_model, shards):
    options = {
        "data.shards": shards,
        "stage_a": str(tiny_model / "stage_a.safetensors"),
        "stage_a_scale": None,
        "crop": 16,
    }
    assert start("stage_a_decoder", FOLDER / "stage_a_decoder_published.yaml", options) == 0
    out = "runs/cascade_kd/stage_a_decoder_published/stage_a_fast.safetensors"
    load_network(out, expect=StageAFast)
