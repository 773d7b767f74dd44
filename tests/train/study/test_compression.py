"""A whole compression study of tiny arms, with the baseline of equal bytes beside the curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cascade.text.encoder import TextConfig
from stages.autoencoder_kl import AutoencoderKL
from train.data.precompute import precompute
from train.encode import FrozenEncoders, FrozenPaths
from train.study.budget import RESULTS_FILE
from train.study.compression import run_compression
from train.study.rates import load_compression
from train.study.report import HTML_FILE, MARKDOWN_FILE


@pytest.fixture
def study(
    make_run,
    shards: str,
    cache: Path,
    tiny_model: Path,
    tiny_unet: Path,
    clip_folder: Path,
    tmp_path: Path,
) -> Path:
    loss = {"prediction": "v", "weight": "constant"}
    optim = {"lr": 1e-2, "warmup_fraction": 0.25, "schedule": "cosine"}
    stage_b = make_run("stage_b", "stage_b", diffusion=loss, optim=optim)
    stage_c = make_run("stage_c", "stage_c", diffusion=loss, optim=optim)
    spec = json.loads((tiny_model / "model.json").read_text())
    spec["stage_c"] |= {"prediction": "v", "steps": 2}
    spec["stage_b"] |= {"prediction": "v", "steps": 1}
    model = {"spec": spec, "text": str(clip_folder), "stage_b": "x", "compressor": "x"}
    model |= {"stage_a": str(tiny_model / "stage_a.safetensors"), "stage_c": "x"}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(model))
    kept = ("name", "image_size", "size_multiple", "min_size", "max_size", "stage_c")
    autoencoder = str(tiny_unet / "autoencoder_kl.safetensors")
    f8 = {"spec": {key: spec[key] for key in kept}, "text": str(clip_folder)}
    f8 |= {"autoencoder_kl": autoencoder, "stage_c": "x"}
    (tmp_path / "f8.yaml").write_text(yaml.safe_dump(f8))
    protocol = {
        "name": "tiny",
        "prompts": {"inline": ["a red apple", "a blue fish", "a green hat"]},
        "metrics": ["clip_score"],
        "generated_size": 32,
        "size": 32,
        "clip": {"kind": "clip", "name": "tiny CLIP"},
        "features": {"kind": "clip", "name": "tiny CLIP"},
        "resamples": 0,
    }
    (tmp_path / "protocol.yaml").write_text(yaml.safe_dump(protocol))
    again = protocol | {"prompts": {}, "metrics": ["psnr", "frechet"]}
    (tmp_path / "reconstruction.yaml").write_text(yaml.safe_dump(again))

    def compressed(name: str, compressor: str) -> dict[str, Any]:
        options = {"shards": shards, "out": "{here}/cache", "text": str(tiny_model / "text")}
        options |= {"reuse": str(cache), "compressor": compressor}
        return {"name": name, "command": "train.data precompute", "set": options}

    own = "{here}/b/compressor.safetensors"
    sizes = {"compressor.latent_channels": "{channels}", "model.compressed_channels": "{channels}"}
    learns_c = {"name": "c", "train": "stage_c", "config": str(stage_c.config)}
    stage_c_set = {"data.folder": "{here}/cache", "compressor": own}
    f8_set = {"data.folder": "{here}/cache", "compressor": autoencoder}
    f8_set |= {"model.latent_channels": 4, "model.patch_size": 2}
    weights = {"stage_c": "{weights}/stage_c.safetensors"}
    values = {
        "name": "rates",
        "budget": {"unit": "samples", "amounts": [32]},
        "seeds": [3],
        "evaluate_at": [1.0],
        "judge": {"protocol": str(tmp_path / "protocol.yaml"), "clip": str(clip_folder)},
        "grid_prompts": 2,
        "device": "cpu",
        "image_size": 32,
        "strides": [16],
        "rates": [{"grid": 1, "channels": 16}, {"grid": 2, "channels": 8}],
        "reconstruction": {
            "protocol": str(tmp_path / "reconstruction.yaml"),
            "real": str(Path(shards).parent),
            "count": 6,
        },
        "arm": {
            "steps": [
                {
                    "name": "b",
                    "train": "stage_b",
                    "config": str(stage_b.config),
                    "share": 0.5,
                    "set": {"compressor.input_fraction": "{fraction}", **sizes},
                },
                compressed("cache", own),
                learns_c
                | {"share": 0.5, "set": {**stage_c_set, "model.latent_channels": "{channels}"}},
            ],
            "model": {
                "command": "train.assemble",
                "config": str(tmp_path / "model.yaml"),
                "set": {
                    "stage_b": "{here}/b/stage_b.safetensors",
                    "compressor": own,
                    "spec.pixels_per_stage_c_cell": "{cell}",
                    **weights,
                },
            },
        },
        "arms": [
            {
                "name": "f8",
                "steps": [
                    compressed("latents", autoencoder),
                    learns_c | {"share": 1.0, "set": f8_set},
                ],
                "model": {
                    "command": "train.assemble_latent",
                    "config": str(tmp_path / "f8.yaml"),
                    "set": weights,
                },
            }
        ],
    }
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.slow
def test_a_study_of_two_rates_and_a_baseline_says_what_each_costs_and_is_worth(study, tmp_path):
    out = tmp_path / "out"
    assert run_compression(load_compression(study), out) == 0
    rows = {
        row["arm"]: row for row in map(json.loads, (out / RESULTS_FILE).read_text().splitlines())
    }
    assert list(rows) == ["1x1x16", "2x2x8", "f8"]
    # Float16: two bytes a number.
    assert rows["1x1x16"]["latents"] == {"shape": [16, 1, 1], "bytes": 32}
    assert rows["2x2x8"]["latents"] == {"shape": [8, 2, 2], "bytes": 64}
    assert rows["f8"]["latents"] == {"shape": [4, 8, 8], "bytes": 512}
    for name, row in rows.items():
        assert set(row["reconstruction"]["metrics"]) == {"psnr", "frechet"}
        assert len(list((out / row["reconstruction"]["pictures"]).glob("*.png"))) == 6
        seen = {step: one["samples"] for step, one in row["training"].items()}
        assert seen == ({"c": 32} if name == "f8" else {"b": 16, "c": 16})
        assert ("stage_b" in row["stage_seconds"]) == (name != "f8")
    # Text was encoded once, for all.
    links = {(out / f"runs/32/{arm}/seed_3/cache/text.safetensors").stat().st_ino for arm in rows}
    assert len(links) == 1
    report = (out / MARKDOWN_FILE).read_text()
    assert "no clear knee (1 rates are too few)" in report
    assert "| f8 | 8x8 | 4 | 512 | 6.0 | 4 |" in report
    plots = {path.name for path in (out / "plots").iterdir()}
    assert {"reconstruction_psnr.svg", "generation_clip_score.svg", "speed_sampling.svg"} <= plots
    assert (out / "reconstructions.png").is_file() and (out / HTML_FILE).is_file()
    before = (out / RESULTS_FILE).read_bytes()
    assert run_compression(load_compression(study), out) == 0  # all is there
    assert (out / RESULTS_FILE).read_bytes() == before


def test_an_autoencoder_in_a_compressors_place_is_named_in_the_caches_hash(tiny_unet, tiny_model):
    compressor = FrozenPaths(compressor=str(tiny_model / "compressor.safetensors"))
    autoencoder = FrozenPaths(compressor=str(tiny_unet / "autoencoder_kl.safetensors"))
    assert "/" not in compressor.hashes()["stage_c"]
    assert autoencoder.hashes()["stage_c"].endswith("/mean/0.7/0.0")
    pixels = torch.rand(2, 3, 32, 32)
    encoders = FrozenEncoders(autoencoder)
    assert isinstance(encoders.compressor, AutoencoderKL)
    made = encoders.encode_pixels(pixels)["stage_c_latents"]
    assert torch.equal(made, encoders.compressor.latent_gaussian(pixels)[0])


def test_a_part_is_taken_over_only_from_a_cache_of_the_same_weights(
    shards, cache, tiny_model, tmp_path
):
    text = FrozenPaths(text=str(tiny_model / "text"))
    precompute(shards, tmp_path / "same", text, reuse=cache)
    assert (tmp_path / "same/text.safetensors").samefile(cache / "text.safetensors")
    other = FrozenPaths(text=text.text, text_states=TextConfig(hidden="post_norm"))
    precompute(shards, tmp_path / "other", other, reuse=cache)
    assert not (tmp_path / "other/text.safetensors").samefile(cache / "text.safetensors")
