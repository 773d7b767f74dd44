"""Settings and weights that contradict each other, damaged settings, and what a hash covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import sample
from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.errors import UserError, run_main
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.latent import LatentPipeline, LatentSpec, save_latent_spec
from cascade.pipelines.spec import CascadeSpec, StageSampling, name_of
from cascade.pipelines.trained import DIFFUSION_KEY
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_published import LORA_ADVICE, with_lora
from cascade.pipelines.unet_spec import (
    UNET_DIFFUSION_KEY,
    UNET_TEACHER_KEY,
    UNetSampling,
    UNetSpec,
    learned_prediction,
)
from cascade.tools.__main__ import main as tools
from cascade.tools.convert import convert
from stages.stage_c import StageC
from tests.unet_models import save_tiny
from tests.unet_models import tiny_model as tiny_unet_model
from train.initial import start_from

WEIGHTS = "diffusion_pytorch_model.safetensors"
V = {UNET_DIFFUSION_KEY: json.dumps({"prediction": "v"})}


def noted(path: Path, told: dict[str, str]) -> None:
    """Add to a file's metadata."""
    save_file(load_file(path), path, metadata=read_metadata(path) | told)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def line_of(command: Callable[[], int | None], capsys: Any) -> str:
    """Return the one line of a command that ends with a user's error."""
    assert run_main(command) == 2
    err: str = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "unet-model", "sdxl")


@pytest.fixture
def latent(tiny_model: Path, tmp_path: Path) -> Path:
    """A Stage C on the latents of an autoencoder of 2 pixels a cell."""
    folder = tmp_path / "latent-model"
    folder.mkdir()
    stage_c = load_network(tiny_model / "stage_c.safetensors", expect=StageC)
    parts = tiny_unet_model("sdxl")[1]
    save_network(folder / "autoencoder_kl.safetensors", parts.autoencoder)
    channels = parts.autoencoder.config.latent_channels
    fitting = StageC(replace(stage_c.config, latent_channels=channels))
    trained = {DIFFUSION_KEY: json.dumps({"prediction": "epsilon", "schedule": "cosine"})}
    save_network(folder / "stage_c.safetensors", fitting, metadata=trained)
    shutil.copytree(tiny_model / "text", folder / "text")
    spec = LatentSpec("tiny", 64, stage_c=StageSampling(steps=2))
    save_latent_spec(spec, folder)
    return folder


# Names and sizes


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "", " ", "..", ".", "a\nb", "a\x00b"])
def test_a_name_that_is_no_files_is_refused(name: str) -> None:
    for make in (
        lambda: UNetSpec(name),
        lambda: LatentSpec(name, 64),
        lambda: CascadeSpec(name, image_size=64, pixels_per_stage_c_cell=32.0),
    ):
        with pytest.raises(ValueError, match="files are named after it"):
            make()


def test_nothing_is_written_beside_out(unet: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "evil.safetensors").write_bytes(b"mine")
    edit(unet / "pipeline.json", name="../evil")
    words = ["convert", str(unet), "--to", "original", "--out", str(tmp_path / "out")]
    assert "pipeline.json: name is '../evil'" in line_of(lambda: tools(words), capsys)
    assert (tmp_path / "evil.safetensors").read_bytes() == b"mine"


def test_a_model_without_settings_is_named_after_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert name_of(Path()) == tmp_path.name == name_of(Path("x/.."))
    assert name_of(Path("a\nb.safetensors")) == "a_b" and name_of(Path("/")) == "model"


@pytest.mark.parametrize("change", [{"image_size": 100}, {"image_size": 0}, {"size_multiple": 0}])
def test_impossible_sizes_are_one_line(change: dict[str, int], latent: Path, capsys: Any) -> None:
    edit(latent / "latent.json", **change)
    words = ["--model", str(latent), "--prompt", "x", "--device", "cpu"]
    assert f"{latent / 'latent.json'}: " in line_of(lambda: sample.main(words), capsys)


# Weights and settings


def test_a_latent_model_is_drawn_as_it_was_trained_or_not_at_all(latent: Path) -> None:
    assert LatentPipeline(latent, device="cpu").spec.stage_c.prediction == "epsilon"
    edit(latent / "latent.json", stage_c={"steps": 2, "prediction": "v"})
    with pytest.raises(UserError, match=r"stage_c\.safetensors: trained with prediction epsilon, "
                       r"but .*latent\.json: stage_c\.prediction is v; set it"):  # fmt: skip
        LatentPipeline(latent, device="cpu")


def test_a_folder_of_two_models_is_refused(latent: Path, tiny_model: Path) -> None:
    shutil.copyfile(tiny_model / "model.json", latent / "model.json")
    with pytest.raises(UserError, match=r"latent\.json: model\.json lies beside it"):
        LatentPipeline(latent, device="cpu")


def test_a_cascade_is_drawn_as_it_was_trained_or_not_at_all(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    noted(model / "stage_b.safetensors", {DIFFUSION_KEY: json.dumps({"prediction": "v"})})
    wrong = r"stage_b\.safetensors: trained with prediction v, but .*{}: stage_b\.prediction is eps"
    with pytest.raises(UserError, match=wrong.format(r"model\.json")):
        CascadePipeline.from_folder(model, device="cpu")


def test_a_unet_is_drawn_as_it_was_trained_or_not_at_all(unet: Path, tmp_path: Path) -> None:
    noted(unet / "unet" / WEIGHTS, V)
    wrong = r"trained with prediction v, but .*{}prediction is epsilon; set it to v"
    with pytest.raises(UserError, match=wrong.format(r"pipeline\.json: sampling\.")):
        open_unet_source(unet)
    (unet / "pipeline.json").unlink()
    scheduler = unet / "scheduler" / "scheduler_config.json"
    wrong = r"prediction_type v_prediction, but .*config\.json: prediction_type is epsilon; set it"
    with pytest.raises(UserError, match=wrong):
        open_unet_source(unet)
    said = json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}
    for name in ("beta_start", "beta_end"):  # what is not said is no contradiction
        said.pop(name, None)
    scheduler.write_text(json.dumps(said))
    assert open_unet_source(unet).spec.sampling.prediction == "v"  # by doing what was said
    (unet / "scheduler" / "scheduler_config.json").unlink()
    assert open_unet_source(unet).spec.sampling.prediction == "v"  # only the weights say it


def test_what_a_conversion_writes_contradicts_nothing(unet: Path, tmp_path: Path) -> None:
    noted(unet / "unet" / WEIGHTS, V)
    own = json.loads((unet / "pipeline.json").read_text())
    edit(unet / "pipeline.json", sampling=own["sampling"] | {"prediction": "v"})
    for target in ("diffusers", "original"):
        convert(unet, target, tmp_path / target, load_file(unet / "unet" / WEIGHTS)[
            "conv_in.weight"].dtype)  # fmt: skip
        assert open_unet_source(tmp_path / target).spec.sampling.prediction == "v"
    (tmp_path / "diffusers" / "pipeline.json").unlink()
    assert open_unet_source(tmp_path / "diffusers").spec.sampling.prediction == "v"


def test_a_unet_in_place_of_the_models_own_brings_its_own_ways(unet: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_network(other, tiny_unet_model("sdxl")[1].unet, metadata=V)
    assert open_unet_source(unet, other).spec.sampling.prediction == "v"
    # The settings of a single file are still the model's, whose U-Net does not run.
    single = save_tiny(tmp_path / "single", "sdxl", single=True)
    spec = open_unet_source(single, other).spec
    assert (spec.name, spec.image_size, spec.sampling.prediction) == ("tiny-sdxl", 16, "v")


@pytest.mark.parametrize(
    ("folder", "key", "value"),
    [
        ("vae", "scaling_factor", 0.5),
        ("vae", "latent_channels", 16),
        ("unet", "attention_head_dim", 7),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(
    folder: str, key: str, value: float, unet: Path
) -> None:
    edit(unet / folder / "config.json", **{key: value})
    with pytest.raises(
        UserError, match=rf"{folder}/config\.json: {key} is {value}, but .*{WEIGHTS}"
    ):
        open_unet_source(unet)


# Damaged metadata


@pytest.mark.parametrize("text", ["[1]", "{", "7"])
def test_damaged_metadata_of_a_unet_are_one_line(
    text: str, unet: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "damaged.safetensors"
    network = tiny_unet_model("sdxl")[1].unet
    save_network(path, network, metadata={UNET_DIFFUSION_KEY: text})
    words = ["--model", str(unet), "--unet", str(path), "--prompt", "x", "--device", "cpu"]
    for command in (lambda: sample.main(words), lambda: tools(["describe", str(path)])):
        assert f"{path}: its metadata's {UNET_DIFFUSION_KEY} is " in line_of(command, capsys)
    start_from(network, str(path), "unet")  # the weights themselves are whole
    with pytest.raises(UserError, match=UNET_DIFFUSION_KEY):
        learned_prediction(read_metadata(path), str(path))
    save_network(path, network, metadata={UNET_TEACHER_KEY: text})
    assert UNET_TEACHER_KEY in line_of(lambda: tools(["describe", str(path)]), capsys)


# LoRAs


def test_a_distilled_lora_leaves_what_the_unet_predicts() -> None:
    own = UNetSampling(prediction="v", beta_start=0.001, beta_end=0.02)
    for advice in LORA_ADVICE:
        sampling = with_lora(own, advice)
        told = advice.sampling.prediction
        assert sampling.prediction == ("v" if told == "epsilon" else told)
        assert (sampling.beta_start, sampling.beta_end) == (0.001, 0.02)
        assert (sampling.sampler, sampling.steps) == (
            advice.sampling.sampler,
            advice.sampling.steps,
        )


# Hashes


@pytest.mark.parametrize(
    "file",
    [
        "unet/" + WEIGHTS,
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "pipeline.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ],
)
def test_the_hash_of_a_unets_model_is_of_all_that_makes_a_picture(file: str, unet: Path) -> None:
    before = open_unet_source(unet).weights_hash
    (unet / "README.md").write_text("read me")
    (unet / "stray.json").write_text("{}")
    assert open_unet_source(unet).weights_hash == before
    path = unet / file
    if path.suffix == ".json":
        edit(path, **({"licence": "mine"} if file == "pipeline.json" else {"_more": 1}))
    else:
        noted(path, {"more": "1"})
    assert open_unet_source(unet).weights_hash != before


def test_the_hash_of_a_single_file_is_of_its_tokenizers_too(tmp_path: Path) -> None:
    single = save_tiny(tmp_path / "single", "sdxl", single=True)
    before = open_unet_source(single).weights_hash
    edit(single.parent / "tokenizer" / "tokenizer_config.json", _more=1)
    assert open_unet_source(single).weights_hash != before


def test_a_stray_file_does_not_change_a_latent_models_hash(latent: Path) -> None:
    before = LatentPipeline(latent, device="cpu").weights_hash
    (latent / "notes.json").write_text("{}")
    (latent / "more").mkdir()
    shutil.copyfile(latent / "stage_c.safetensors", latent / "more" / "old.safetensors")
    assert LatentPipeline(latent, device="cpu").weights_hash == before
    edit(latent / "text" / "tokenizer_config.json", _more=1)
    assert LatentPipeline(latent, device="cpu").weights_hash != before
