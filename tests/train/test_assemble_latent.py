"""A Stage C on an autoencoder's latents: the baseline of equal bytes, as a model folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError, run_main
from cascade.pipelines.latent import LatentPipeline
from sample import main as sample
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


@pytest.fixture
def assembled(config, tiny_model, tmp_path) -> Path:
    stage_c_of(tiny_model, tmp_path / "stage_c.safetensors", 4)
    found = str(save_tiny(tmp_path / "sdxl", "sdxl"))
    assert main([*config, "--autoencoder_kl", found, "--out", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def test_sample_draws_with_it(assembled, tmp_path, capsys):
    words = ["--model", str(assembled), "--prompt", "a red hat", "--steps-c", "2", "--seed", "3"]
    words += ["--num-images", "2"]
    for name in ("one", "two"):
        assert run_main(lambda name=name: sample([*words, "--out", str(tmp_path / name)])) == 0
    one, two = (sorted((tmp_path / name).glob("*.png")) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert len({path.read_bytes() for path in one}) == 2
    assert "latents on cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [["--steps-b", "2"], ["--steps", "2"], ["--preview"], ["--compile"]]
)
def test_sample_refuses_what_it_has_no_use_for(option, assembled, tmp_path, capsys):
    words = ["--model", str(assembled), "--prompt", "a hat", "--out", str(tmp_path / "out")]
    assert run_main(lambda: sample([*words, *option])) == 2
    assert f"{option[0]}: {assembled} is a Stage C on an autoencoder's latents" in (
        capsys.readouterr().err
    )


def test_sample_names_the_options_that_it_has(assembled, tmp_path, capsys):
    words = ["--model", str(assembled), "--prompt", "a hat", "--out", str(tmp_path / "out")]
    for given, own in (("--steps", "--steps-c"), ("--guidance", "--guidance-c")):
        assert run_main(lambda given=given: sample([*words, given, "3"])) == 2
        assert capsys.readouterr().err.endswith(f"; it takes {own}\n")


def test_a_model_whose_settings_are_gone_is_told_so(assembled, capsys):
    (assembled / "latent.json").unlink()
    assert run_main(lambda: sample(["--model", str(assembled), "--prompt", "a hat"])) == 2
    assert "no latent.json, which says how such a model is sampled" in capsys.readouterr().err


def test_parts_that_do_not_fit_are_named_as_the_configuration_does(config, tiny_model, tmp_path):
    stage_c_of(tiny_model, tmp_path / "stage_c.safetensors", 8)
    found = str(save_tiny(tmp_path / "sdxl", "sdxl"))
    out = tmp_path / "model"
    with pytest.raises(UserError, match=r"the autoencoder's latents: 4 channels") as error:
        main([*config, "--autoencoder_kl", found, "--out", str(out)])
    for part in (f"stage_c {tmp_path / 'stage_c.safetensors'}", f"autoencoder_kl {found}", "text "):
        assert part in str(error.value)
    stage_c_of(tiny_model, tmp_path / "stage_c.safetensors", 4)
    with pytest.raises(UserError, match=r"^spec: size_multiple is 2, but the autoencoder and"):
        main([*config, "--autoencoder_kl", found, "--spec.size_multiple", "2", "--out", str(out)])
    assert not list(tmp_path.glob(".model*")) and not out.exists()
