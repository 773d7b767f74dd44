"""What leaves: folders and single files that diffusers opens, and the same picture there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cascade.pipelines import unet as pipeline_module
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_plan import UNetSettings
from cascade.pipelines.unet_spec import UNetSampling
from cascade.tools.__main__ import main
from cascade.tools.convert_unet import unet_config_of
from stages.unet.unet import UNet
from tests.reference.test_unet_pipelines import SharedNoise
from tests.reference.unet_toys import save_pipeline
from tests.stages.unet.toys import PUBLISHED, toy_of
from tests.unet_models import same_weights

pytestmark = pytest.mark.reference

PROMPT = "a red cat"
SETTINGS = UNetSettings(seed=0, steps=3, guidance=3.0, width=16, height=16)


@pytest.fixture(scope="module", params=["sdxl", "sd"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("export") / request.param
    save_pipeline(folder, request.param)
    return folder


def picture(model: Path, monkeypatch: Any) -> np.ndarray:
    monkeypatch.setattr(pipeline_module, "PictureNoise", SharedNoise)
    pixels = UNetPipeline(model, device="cpu")(PROMPT, SETTINGS).pixels
    shown: np.ndarray = pixels.permute(0, 2, 3, 1).numpy()
    return shown


def theirs(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    images: np.ndarray = pipeline(
        prompt=PROMPT,
        num_inference_steps=SETTINGS.steps,
        guidance_scale=SETTINGS.guidance,
        width=SETTINGS.width,
        height=SETTINGS.height,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images
    return images


def convert(model: Path, layout: str, out: Path) -> None:
    argv = ["convert", str(model), "--to", layout, "--out", str(out), "--dtype", "fp32"]
    assert main(argv) == 0


def assert_same_networks(one: Path, other: Path) -> None:
    first, second = (UNetPipeline(path, device="cpu")._parts for path in (one, other))
    assert same_weights(first.unet, second.unet)
    assert same_weights(first.autoencoder, second.autoencoder)
    assert first.autoencoder.config == second.autoencoder.config
    assert same_weights(first.text.model, second.text.model)
    assert (first.text_2 is None) == (second.text_2 is None)
    if first.text_2 is not None and second.text_2 is not None:
        assert same_weights(first.text_2.model, second.text_2.model)


def test_a_folder_and_a_single_file_hold_the_same_tensors_and_make_the_same_picture(
    original: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    import diffusers

    for layout in ("diffusers", "original"):
        out = tmp_path / layout
        assert (
            main(["convert", str(original), "--to", layout, "--out", str(out), "--dtype", "fp32"])
            == 0
        )
    single = tmp_path / "original" / f"{original.name}.safetensors"
    assert str(single) in capsys.readouterr().out
    wanted = picture(original, monkeypatch)
    for model in (tmp_path / "diffusers", single):
        assert_same_networks(original, model)
        np.testing.assert_array_equal(picture(model, monkeypatch), wanted)
    # And back from the single file.
    back = tmp_path / "back"
    assert (
        main(["convert", str(single), "--to", "ours", "--out", str(back), "--dtype", "fp32"]) == 0
    )
    assert_same_networks(original, back)

    opened = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert np.abs(theirs(opened) - wanted).max() < 1e-4
    name = type(opened).__name__
    from_file = getattr(diffusers, name).from_single_file(
        str(single), config=str(tmp_path / "diffusers"), local_files_only=True
    )
    # diffusers reads no configuration of a toy's scheduler from a single file.
    from_file.scheduler = opened.scheduler
    assert np.abs(theirs(from_file) - wanted).max() < 1e-4


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "bk_sdxl_base"])
def test_diffusers_builds_every_student_of_our_config(name: str) -> None:
    from diffusers import UNet2DConditionModel

    config = toy_of(PUBLISHED[name], 40)
    content = unet_config_of(config, sample_size=8)
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(content).state_dict()
        own = UNet(config).state_dict()
    assert {key: one.shape for key, one in theirs.items()} == {
        key: one.shape for key, one in own.items()
    }


def test_an_exported_scheduler_is_read_as_it_was_written(original: Path, tmp_path: Path) -> None:
    from cascade.tools.convert_unet import write_unet_folder

    source = open_unet_source(original)
    pipeline = UNetPipeline(source, device="cpu")
    for index, sampler in enumerate(("euler_ancestral", "ddim", "dpmpp_2m", "lcm")):
        sampling = UNetSampling(
            sampler,  # type: ignore[arg-type]
            steps=50,
            guidance=source.spec.sampling.guidance,
            spacing="linspace",
            prediction="v",
            ends_clean=True,
        )
        out = tmp_path / str(index)
        out.mkdir()
        write_unet_folder(
            replace(source.spec, sampling=sampling), pipeline._parts, out, torch.float32
        )
        (out / "pipeline.json").unlink()  # as another program would write it
        assert open_unet_source(out).spec.sampling == sampling
