"""A Stage C on an autoencoder's latents: the baseline of equal bytes, as a model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from cascade.pipelines.latent import LatentPipeline
from stages.stage_c import StageC
from tests.unet_models import save_tiny
from train.assemble_latent import main
from train.encode import find_compressor


@pytest.fixture
def config(clip_folder: Path, tmp_path: Path) -> list[str]:
    """The command's options but for the autoencoder and ``--out``."""
    lines = ["spec: {name: latents, image_size: 64}", "autoencoder_kl: none"]
    lines += [f"text: {clip_folder}", f"stage_c: {tmp_path / 'stage_c.safetensors'}"]
    (tmp_path / "model.yaml").write_text("\n".join(lines) + "\n")
    return ["--config", str(tmp_path / "model.yaml")]


def stage_c_of(tiny_model: Path, path: Path, channels: int) -> None:
    sizes = load_network(tiny_model / "stage_c.safetensors", expect=StageC).config
    save_network(path, StageC(replace(sizes, latent_channels=channels, patch_size=2)))


def test_the_autoencoder_of_a_model_of_sdxls_kind_is_taken(config, tiny_model, tmp_path):
    """As the study at the published sizes names SDXL itself."""
    sdxl = save_tiny(tmp_path / "sdxl", "sdxl")
    stage_c_of(tiny_model, tmp_path / "stage_c.safetensors", 4)
    out = tmp_path / "model"
    assert main([*config, "--autoencoder_kl", str(sdxl), "--out", str(out)]) == 0
    pipeline = LatentPipeline(out, device="cpu")
    found = find_compressor(str(sdxl))
    assert pipeline.autoencoder.config == found.published.config
    first = next(iter(found.opened.shapes))
    assert first in dict(pipeline.autoencoder.state_dict())
    pictures = pipeline.autoencoder.decode(torch.zeros(1, 4, 8, 8))
    assert pictures.isfinite().all()


def test_what_holds_neither_compressor_nor_autoencoder_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match="compressor"):
        find_compressor(str(tiny_model / "stage_b.safetensors"))
    assert find_compressor(str(tiny_model)).published.kind == "compressor"
    sdxl = save_tiny(tmp_path / "sdxl", "sdxl")
    assert find_compressor(str(sdxl)).published.kind == "autoencoder_kl"


def test_a_damaged_compressor_is_not_passed_over_for_an_autoencoder(tiny_model, tmp_path):
    sdxl = save_tiny(tmp_path / "sdxl", "sdxl")
    whole = (tiny_model / "compressor.safetensors").read_bytes()
    (sdxl / "compressor.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(UserError, match=r"compressor\.safetensors"):
        find_compressor(str(sdxl))
