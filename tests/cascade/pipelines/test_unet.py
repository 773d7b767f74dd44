"""U-Net pipelines with tiny random weights: what users meet."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.errors import UserError
from cascade.pipelines import unet as pipeline_module
from cascade.pipelines.finite import BlankPictureError, NonFiniteError
from cascade.pipelines.results import Interrupted
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan
from tests.unet_models import save_tiny

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unets")
    return {kind: save_tiny(root / kind, kind) for kind in ("sdxl", "sd")}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sdxl(folders: dict[str, Path]) -> UNetPipeline:
    return UNetPipeline(folders["sdxl"], device="cpu")


def test_a_picture_of_a_batch_is_that_of_its_seed_alone(sdxl: UNetPipeline) -> None:
    many = sdxl([PROMPT, "a blue fish"], UNetSettings(seed=4, num_images=2))
    assert many.seeds == [4, 5, 4, 5] and many.pixels.shape == (4, 3, 16, 16)
    alone = sdxl("a blue fish", UNetSettings(seed=5))
    assert torch.equal(alone.pixels[0], many.pixels[3])
    assert alone.metadata[0] == many.metadata[3]
    assert set(alone.seconds) == {"text", "unet", "autoencoder"}
    assert not torch.equal(many.pixels[0], many.pixels[1])


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_every_option_reaches_the_picture(kind: str, folders: dict[str, Path]) -> None:
    pipeline = UNetPipeline(folders[kind], device="cpu")
    base = pipeline(PROMPT, UNetSettings(seed=1))
    changed: list[dict[str, Any]] = [
        {"negative_prompt": "a fish"},
        {"steps": 2},
        {"guidance": 1.0},
        {"sampler": "euler_ancestral"},
        {"sampler": "dpmpp_2m"},
        {"sampler": "lcm"},
        {"spacing": "linspace"},
    ]
    if kind == "sdxl":
        changed += [{"original_size": (8, 8)}, {"crop": (0, 4)}, {"target_size": (32, 8)}]
    for change in changed:
        other = pipeline(PROMPT, UNetSettings(seed=1, **change))
        assert (other.pixels - base.pixels).abs().max() > 1e-5, change
        assert other.metadata[0]["settings"] != base.metadata[0]["settings"] or (
            "negative_prompt" in change
        )


def test_an_empty_negative_prompt_is_what_the_model_wants(folders: dict[str, Path]) -> None:
    pipeline = UNetPipeline(folders["sdxl"], device="cpu")
    zeros = pipeline(PROMPT, UNetSettings(seed=1)).pixels
    pipeline.spec = replace(pipeline.spec, empty_negative="encoded")
    assert (pipeline(PROMPT, UNetSettings(seed=1)).pixels - zeros).abs().max() > 1e-4


def test_a_picture_of_tiles_is_near_the_whole_one_and_says_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = UNetPipeline(folders["sdxl"], device="cpu")
    settings = UNetSettings(seed=1, width=64, height=40)
    whole = pipeline(PROMPT, settings)
    in_tiles = replace(pipeline.memory.plan, tile=16)
    monkeypatch.setattr(type(pipeline.memory), "plan", property(lambda _: in_tiles))
    tiled = pipeline(PROMPT, settings)
    assert tiled.pixels.shape == whole.pixels.shape == (1, 3, 40, 64)
    assert torch.equal(tiled.latents, whole.latents)
    away = (tiled.pixels - whole.pixels).abs()
    assert 0 < float(away.mean()) < 0.05
    cell = pipeline.autoencoder.downscale
    assert json.loads(tiled.metadata[0]["settings"])["tile"] == 16 * cell
    assert "tile" not in json.loads(whole.metadata[0]["settings"])


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloading_makes_the_same_picture(mode: str, sdxl: UNetPipeline) -> None:
    wanted = sdxl(PROMPT, UNetSettings(seed=1)).pixels
    sdxl.place(offload=mode)
    try:
        assert torch.equal(sdxl(PROMPT, UNetSettings(seed=1)).pixels, wanted)
    finally:
        sdxl.place()
    assert torch.equal(sdxl(PROMPT, UNetSettings(seed=1)).pixels, wanted)


def test_sdxls_autoencoder_leaves_float16_with_a_notice(folders: dict[str, Path]) -> None:
    pipeline = UNetPipeline(folders["sdxl"], device="cpu", dtype="float16")
    assert pipeline.dtypes.unet == torch.float16 and pipeline.dtypes.autoencoder == torch.float32
    assert "float32: SDXL's overflows" in pipeline.notices[0]
    assert str(pipeline.dtypes) == "unet=float16,autoencoder=float32"
    named = UNetPipeline(folders["sdxl"], device="cpu", dtype="unet=float16,autoencoder=bfloat16")
    assert named.dtypes.autoencoder == torch.bfloat16 and not named.notices
    assert UNetPipeline(folders["sd"], device="cpu", dtype="float16").notices == []


def test_what_is_not_finite_or_black_is_an_error(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = UNetPipeline(folders["sd"], device="cpu")
    with torch.no_grad():
        weight = pipeline.autoencoder.decoder.conv_out.bias
        assert weight is not None
        kept = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="the autoencoder"):
            pipeline(PROMPT)
        weight.fill_(-100.0)
        with pytest.raises(BlankPictureError, match=r"the autoencoder .* entirely black"):
            pipeline(PROMPT)
        weight.copy_(kept)
        assert pipeline.unet.conv_out.bias is not None
        pipeline.unet.conv_out.bias.fill_(float("inf"))
        with pytest.raises(NonFiniteError, match="the U-Net, step 1 of 3"):
            pipeline(PROMPT)


def test_ctrl_c_keeps_what_is_finished(sdxl: UNetPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = pipeline_module.sample_unet

    def sample(*positional: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*positional, **named)

    monkeypatch.setattr(pipeline_module, "sample_unet", sample)
    with pytest.raises(Interrupted) as caught:
        sdxl(PROMPT, UNetSettings(seed=1, num_images=3))
    assert [picture.seed for picture in caught.value.finished] == [1]


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_a_single_file_makes_the_folders_picture(
    kind: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "x", kind, single=True)
    one, other = (UNetPipeline(where, device="cpu") for where in (folders[kind], path))
    assert one.spec == other.spec
    assert torch.equal(
        one(PROMPT, UNetSettings(seed=1)).pixels, other(PROMPT, UNetSettings(seed=1)).pixels
    )
    assert open_unet_source(path.parent).spec == one.spec  # a folder with that file alone


def test_another_unet_takes_the_models_place(folders: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(folders["sdxl"] / "unet" / "diffusion_pytorch_model.safetensors")
    shutil.copytree(folders["sdxl"] / "unet", tmp_path / "unet")
    save_file(
        {key: one * 0.9 for key, one in state.items()},
        tmp_path / "unet" / "diffusion_pytorch_model.safetensors",
    )
    source = open_unet_source(folders["sdxl"], tmp_path / "unet")
    pipeline = UNetPipeline(source, device="cpu")
    assert torch.equal(pipeline.unet.conv_in.bias, state["conv_in.bias"] * 0.9)
    with pytest.raises(UserError, match="holds no U-Net, only: KL autoencoder"):
        open_unet_source(folders["sdxl"], folders["sdxl"] / "vae")
    with pytest.raises(UserError, match=r"24 channels|40 channels"):
        UNetPipeline(open_unet_source(folders["sd"], tmp_path / "unet"), device="cpu")


def test_a_missing_part_and_a_foreign_index_are_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["sdxl"], tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "vae")
    with pytest.raises(UserError, match="no autoencoder in it"):
        open_unet_source(tmp_path / "a")
    shutil.copytree(folders["sdxl"], tmp_path / "b")
    (tmp_path / "b" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionInpaintPipeline"})
    )
    with pytest.raises(UserError, match="a StableDiffusionInpaintPipeline; StableDiffusionPipe"):
        open_unet_source(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "eular"}, "did you mean 'euler'"),
        ({"spacing": "trail"}, "did you mean 'trailing'"),
        ({"sampler": "lcm", "spacing": "leading"}, "timesteps of its own"),
        ({"sampler": "lcm", "steps": 51}, "lcm takes 1 to 50"),
        ({"steps": 1000, "spacing": "leading"}, "lead beyond the schedule"),
        ({"steps": 0}, "steps 0: a whole number from 1"),
        ({"guidance": 0.5}, "1 switches guidance off"),
        ({"crop": (0, -1)}, "crop .* two whole numbers"),
        ({"width": 6}, "makes 8 to 64 pixels"),
    ],
)
def test_slips_are_one_line(change: dict[str, Any], message: str, sdxl: UNetPipeline) -> None:
    with pytest.raises(UserError, match=message):
        make_unet_plan(sdxl.spec, PROMPT, UNetSettings(**change))


def test_sd_is_told_no_sizes(folders: dict[str, Path]) -> None:
    spec = open_unet_source(folders["sd"]).spec
    with pytest.raises(UserError, match="crop: this model is told no sizes"):
        make_unet_plan(spec, PROMPT, UNetSettings(crop=(0, 0)))
