"""A U-Net of SDXL's kind with one text encoder: put together, sampled, read by diffusers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import sample
from cascade.checkpoints.files import load_network, save_network
from cascade.checkpoints.part_files import find_network
from cascade.errors import UserError
from cascade.images import open_image
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_plan import UNetSettings
from cascade.rng import PictureNoise
from cascade.tools.convert import convert
from stages.unet.compress import Recipe, plan_student
from stages.unet.inherit import inherit
from stages.unet.unet import UNet
from train.assemble_unet import main
from train.distill.plans import plan_metadata, read_plan
from train.losses.unet_denoising import UNetDiffusionConfig


@pytest.fixture
def config(tiny_unet: Path, tiny_model: Path, tmp_path: Path) -> Path:
    values = {
        "spec": {
            "name": "tiny-unet",
            "image_size": 32,
            "size_multiple": 4,
            "min_size": 16,
            "max_size": 64,
            "sampling": {"steps": 3, "guidance": 2.0, "spacing": "trailing"},
        },
        "unet": str(tiny_unet / "unet.safetensors"),
        "autoencoder": str(tiny_unet / "autoencoder_kl.safetensors"),
        "text": str(tiny_model / "text"),
        "beside": {"teacher": str(tiny_unet / "unet.safetensors")},
        "dtype": "float32",
    }
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def model(config: Path, tmp_path: Path) -> Path:
    assert main(["--config", str(config), "--out", str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def test_sample_makes_pictures_of_the_student_and_of_the_teacher_beside_it(model, tmp_path):
    arguments = ["--prompt", "a red apple", "--seed", "3", "--model", str(model)]
    assert sample.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    teacher = str(model / "teacher.safetensors")
    assert sample.main([*arguments, "--unet", teacher, "--out", str(tmp_path / "b")]) == 0
    one, other = (next((tmp_path / name).glob("*.png")) for name in "ab")
    # Beside itself it is its own teacher.
    assert np.array_equal(np.asarray(open_image(one)), np.asarray(open_image(other)))
    assert open_image(one).size == (32, 32)


def test_diffusers_draws_the_same_latents_from_the_folder(model):
    from diffusers import StableDiffusionXLPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = StableDiffusionXLPipeline.from_pretrained(model)
    pipeline = UNetPipeline(model, device="cpu")
    settings = UNetSettings(seed=5)
    drawn = pipeline("a blue fish", settings).latents[0]
    prompt = pipeline._parts.text.encode(["a blue fish"])
    noise = PictureNoise([5], "unet").randn(pipeline.latent_shape(32, 32))
    theirs.set_progress_bar_config(disable=True)
    found = theirs(
        prompt_embeds=prompt.hidden,
        pooled_prompt_embeds=prompt.pooled,
        negative_prompt_embeds=torch.zeros_like(prompt.hidden),
        negative_pooled_prompt_embeds=torch.zeros_like(prompt.pooled),
        num_inference_steps=3,
        guidance_scale=2.0,
        latents=noise,
        height=32,
        width=32,
        output_type="latent",
    ).images[0]
    scale = found.std()
    assert (drawn - found).abs().max() < 1e-4 * scale


def test_a_u_net_that_was_trained_for_v_is_sampled_so_in_place_of_another(model, tmp_path):
    own = load_network(model / "teacher.safetensors", expect=UNet)
    path, said = tmp_path / "v.safetensors", UNetDiffusionConfig("v").metadata()
    save_network(path, own, metadata=said)
    assert open_unet_source(model).spec.sampling.prediction == "epsilon"
    assert open_unet_source(model, path).spec.sampling.prediction == "v"
    save_network(path, own, metadata={key: '{"prediction": "w"}' for key in said})
    with pytest.raises(UserError, match="prediction: 'w' is not one of"):
        open_unet_source(model, path)


def test_its_single_file_makes_the_same_picture(model, tmp_path):
    convert(model, "original", tmp_path / "single", torch.float32)
    settings = UNetSettings(seed=5)
    latents = [
        UNetPipeline(source, device="cpu")("a red apple", settings).latents
        for source in (model, tmp_path / "single" / "tiny-unet.safetensors")
    ]
    assert torch.equal(*latents)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_mb": 0.001}, "max_mb allows 0.001"),
        ({"unet": "/none"}, "/none: no such file or folder"),
        ({"beside": {"teacher": "AUTOENCODER"}}, "holds a KL autoencoder, but a U-Net is needed"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(changes, message, config, tmp_path):
    values = yaml.safe_load(config.read_text())
    text = json.dumps(changes).replace("AUTOENCODER", values["autoencoder"])
    config.write_text(yaml.safe_dump(values | json.loads(text)))
    with pytest.raises(UserError, match=message):
        main(["--config", str(config), "--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


def test_a_unet_is_not_put_together_to_be_sampled_otherwise_than_it_was_trained(
    config, tiny_unet, tmp_path
):
    run = UNetDiffusionConfig("v")
    network = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    save_network(tmp_path / "v.safetensors", network, metadata=run.metadata())
    values = yaml.safe_load(config.read_text()) | {"beside": {}}
    config.write_text(yaml.safe_dump(values | {"unet": str(tmp_path / "v.safetensors")}))
    arguments = ["--config", str(config), "--out", str(tmp_path / "v")]
    with pytest.raises(UserError, match=r"trained with prediction v, but spec.sampling.prediction"):
        main(arguments)
    assert not (tmp_path / "v").exists()
    assert main([*arguments, "--spec.sampling.prediction", "v"]) == 0


def test_a_models_u_net_is_not_the_larger_one_beside_it(config, tiny_unet, tmp_path):
    """Whoever trains from a folder gets the network that sampling takes."""
    teacher = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    plan = plan_student(teacher.config, Recipe(("mid_block",)))
    student = UNet(plan.student)
    student.load_state_dict(inherit(teacher.state_dict(), plan)[0])
    diffusion = UNetDiffusionConfig(prediction="v").metadata()
    path = tmp_path / "student.safetensors"
    save_network(path, student, metadata={**plan_metadata(plan), **diffusion})
    out = tmp_path / "pair"
    changed = ["--unet", str(path), "--spec.sampling.prediction", "v"]
    assert main(["--config", str(config), "--out", str(out), *changed]) == 0
    sampled = open_unet_source(out).unet_config
    for name in (out, out / "unet"):
        assert find_network(name, "unet").published.config == sampled == plan.student
    assert find_network(out / "teacher.safetensors", "unet").published.config == teacher.config
    assert open_unet_source(out, out).unet_config == plan.student


@pytest.mark.parametrize("target", ["original", "diffusers"])
def test_a_conversion_keeps_how_a_u_net_predicts_and_whose_student_it_is(
    target, config, tiny_unet, tmp_path
):
    teacher = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    plan = plan_student(teacher.config, Recipe())
    diffusion = UNetDiffusionConfig(prediction="v").metadata()
    path = tmp_path / "student.safetensors"
    save_network(path, teacher, metadata={**plan_metadata(plan), **diffusion, "train_steps": "7"})
    out = tmp_path / "model"
    changed = ["--unet", str(path), "--spec.sampling.prediction", "v"]
    assert main(["--config", str(config), "--out", str(out), *changed]) == 0
    convert(out, target, tmp_path / "converted", torch.float32)
    found = find_network(tmp_path / "converted", "unet")
    assert read_plan(found.told, "it") == plan
    assert diffusion.items() <= found.told.items() and found.told["train_steps"] == "7"


def test_a_student_that_diffusers_has_no_words_for_is_a_folder_of_ours(config, tiny_unet, tmp_path):
    """Of its attentions some are gone, as the automatic recipe has it."""
    teacher = load_network(tiny_unet / "unet.safetensors", expect=UNet)
    plan = plan_student(teacher.config, Recipe(("up_blocks.0.attentions.2",)))
    student = UNet(plan.student)
    student.load_state_dict(inherit(teacher.state_dict(), plan)[0])
    path = tmp_path / "student.safetensors"
    save_network(path, student, metadata=plan_metadata(plan))
    out = tmp_path / "mixed"
    assert main(["--config", str(config), "--out", str(out), "--unet", str(path)]) == 0
    assert not (out / "model_index.json").exists() and not (out / "unet/config.json").exists()
    pipeline = UNetPipeline(out, device="cpu")
    assert pipeline.unet.config == plan.student
    drawn = pipeline("a blue fish", UNetSettings(seed=5)).latents
    again, original = tmp_path / "ours", tmp_path / "original"
    [notice] = convert(out, "ours", again, torch.float32).notices
    assert "diffusers can't build this U-Net" in notice and "for Cascade alone" in notice
    convert(out, "original", original, torch.float32)
    for other in (again, original / f"{pipeline.spec.name}.safetensors"):
        found = UNetPipeline(other, device="cpu")("a blue fish", UNetSettings(seed=5)).latents
        assert torch.equal(found, drawn)
    with pytest.raises(UserError, match="diffusers can't build this U-Net"):
        convert(out, "diffusers", tmp_path / "theirs", torch.float32)
    assert not (tmp_path / "theirs").exists()
