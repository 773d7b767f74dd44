"""U-Net pipelines from a picture: what users meet, and what is noised and walked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import UserError
from cascade.images import image_to_pixels, pixels_to_images
from cascade.pipelines import unet as pipeline_module
from cascade.pipelines.finite import NonFiniteError
from cascade.pipelines.memory_plan import RESERVE, pick_plan
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.results import Interrupted
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_memory import UNetWorkload, unet_footprints
from cascade.pipelines.unet_plan import UNetSettings, make_unet_plan
from cascade.rng import PictureNoise
from tests.unet_models import save_tiny

PROMPT = "a red apple"
SAMPLERS = ["euler", "euler_ancestral", "ddim", "dpmpp_2m", "lcm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("unets")
    return {kind: save_tiny(root / kind, kind) for kind in ("sdxl", "sd")}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def sdxl(folders: dict[str, Path]) -> UNetPipeline:
    return UNetPipeline(folders["sdxl"], device="cpu")


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return pixels_to_images(pixels)[0]


def test_a_picture_of_a_batch_is_that_of_its_seed_alone(sdxl: UNetPipeline) -> None:
    settings = UNetSettings(seed=4, num_images=2)
    many = sdxl.image_to_image(picture(), [PROMPT, "a blue fish"], 0.7, settings)
    assert many.seeds == [4, 5, 4, 5] and many.pixels.shape == (4, 3, 16, 16)
    alone = sdxl.image_to_image(picture(), "a blue fish", 0.7, UNetSettings(seed=5))
    assert torch.equal(alone.pixels[0], many.pixels[3])
    assert alone.metadata[0] == many.metadata[3]
    assert set(alone.seconds) == {"text", "unet", "autoencoder"}
    plan = make_unet_plan(
        sdxl.spec, [PROMPT, "a blue fish"], settings, picture=PictureInput(picture(), strength=0.7)
    )
    together = sdxl.make(plan, batch_size=4)
    torch.testing.assert_close(together.pixels, many.pixels, atol=1e-4, rtol=0)


def test_picture_and_strength_reach_the_result_and_its_png(sdxl: UNetPipeline) -> None:
    settings = UNetSettings(seed=1, steps=4)
    base = sdxl.image_to_image(picture(), PROMPT, 0.5, settings)
    for other in (
        sdxl.image_to_image(picture(seed=1), PROMPT, 0.5, settings),
        sdxl.image_to_image(picture(), PROMPT, 0.75, settings),
        sdxl(PROMPT, settings),
    ):
        assert (other.pixels - base.pixels).abs().max() > 1e-4
        assert other.metadata[0]["settings"] != base.metadata[0]["settings"]
    told = json.loads(base.metadata[0]["settings"])
    assert told["picture"]["mode"] == "img2img" and told["picture"]["strength"] == 0.5
    assert len(told["picture"]["fingerprint"]) == 12 and told["unet"]["steps"] == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_a_sample_of_the_picture_is_noised_to_where_the_last_steps_begin(
    kind: str, sampler: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = UNetPipeline(folders[kind], device="cpu")
    infos: list[Any] = []
    real = pipeline_module.sample_unet

    def sample(*positional: Any, on_step: Any, **named: Any) -> Tensor:
        return real(*positional, on_step=infos.append, **named)

    monkeypatch.setattr(pipeline_module, "sample_unet", sample)
    settings = UNetSettings(seed=3, steps=10, sampler=sampler)
    pipeline.image_to_image(picture(), PROMPT, 0.35, settings)  # int(3.5) steps
    plan = make_unet_plan(pipeline.spec, PROMPT, settings)
    times = plan.sampling.walk().times
    assert [info.t for info in infos] == times[7:10].tolist()

    posterior = pipeline.encode(image_to_pixels(picture())[None])
    shape = posterior.mean.shape[1:]
    drawn = posterior.mean + posterior.std * PictureNoise([3], "autoencoder").randn(shape)
    x0 = drawn * pipeline.autoencoder.config.scale
    alpha, sigma = plan.sampling.schedule(times[7])
    noise = PictureNoise([3], "unet").randn(shape)  # as of a prompt alone
    torch.testing.assert_close(infos[0].x_t, alpha * x0 + sigma * noise)
    assert (posterior.std > 1e-3).all(), "else a sample is no other than the mean"


def test_a_picture_of_another_size_is_scaled_cut_and_told(sdxl: UNetPipeline) -> None:
    fitted = sdxl.image_to_image(picture(33, 21), PROMPT, None, UNetSettings(seed=1))
    assert "the picture is scaled and cut from 33x21 to" in fitted.notices[0]
    named = UNetSettings(seed=1, width=24, height=16)
    assert sdxl.image_to_image(picture(33, 21), PROMPT, None, named).pixels.shape[2:] == (16, 24)
    own = sdxl.image_to_image(picture(20, 16), PROMPT, None, UNetSettings(seed=1))
    assert own.pixels.shape[2:] == (16, 20) and not own.notices


def test_a_picture_read_in_tiles_is_near_the_whole_one_and_says_so(
    sdxl: UNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = UNetSettings(seed=1, width=64, height=40)
    whole = sdxl.image_to_image(picture(64, 40), PROMPT, 0.7, settings)
    in_tiles = replace(sdxl.memory.plan, encoder_tile=16)
    monkeypatch.setattr(type(sdxl.memory), "plan", property(lambda _: in_tiles))
    tiled = sdxl.image_to_image(picture(64, 40), PROMPT, 0.7, settings)
    away = (tiled.latents - whole.latents).abs().mean() / whole.latents.std()
    assert 0 < float(away) < 0.2
    told = json.loads(tiled.metadata[0]["settings"])
    assert told["encoder_tile"] == 16 * sdxl.autoencoder.downscale and "tile" not in told
    assert "encoder_tile" not in json.loads(whole.metadata[0]["settings"])


@pytest.mark.slow
def test_the_plan_reads_in_tiles_where_the_whole_does_not_fit(sdxl: UNetPipeline) -> None:
    plan = make_unet_plan(sdxl.spec, PROMPT, UNetSettings(seed=1))
    work = UNetWorkload(plan.sampling, (4, 160, 160), 16, True)
    sizes = unet_footprints(sdxl._parts, sdxl.dtypes, work)
    reader = sizes["autoencoder_encoder"]
    assert reader.tiled is not None and set(reader.tiled) == {128, 96, 64}
    assert reader.tiled[64] < 0.5 * reader.working
    # Everything but the reading fits; of it, the smallest tile.
    sizes |= {name: replace(sizes[name], working=1000) for name in ("text", "text_2", "unet")}
    sizes["autoencoder"] = replace(sizes["autoencoder"], working=1000)
    weights = sum(sizes[name].weights for name in ("text", "text_2", "unet", "autoencoder"))
    chosen = pick_plan(sizes, RESERVE + weights + reader.tiled[64], [1])
    assert chosen.encoder_tile == 64 and chosen.tile is None
    assert "the autoencoder's encoder in tiles of" in chosen.describe()
    assert "differs a little" in chosen.describe()


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offloading_makes_the_same_picture(mode: str, sdxl: UNetPipeline) -> None:
    settings = UNetSettings(seed=1)
    wanted = sdxl.image_to_image(picture(), PROMPT, 0.7, settings).pixels
    sdxl.place(offload=mode)
    try:
        assert torch.equal(sdxl.image_to_image(picture(), PROMPT, 0.7, settings).pixels, wanted)
    finally:
        sdxl.place()


def test_the_encoder_is_in_the_memory_plan(folders: dict[str, Path]) -> None:
    pipeline = UNetPipeline(folders["sdxl"], device="cpu")
    plan = make_unet_plan(pipeline.spec, PROMPT, UNetSettings(seed=1))

    def sizes(side: int, from_picture: bool) -> Any:
        work = UNetWorkload(plan.sampling, (4, side, side), 16, from_picture)
        return unet_footprints(pipeline._parts, pipeline.dtypes, work)

    assert "autoencoder_encoder" not in sizes(8, False)
    large, small = (sizes(side, True)["autoencoder_encoder"] for side in (32, 16))
    assert small.of == "autoencoder" and small.weights == sizes(8, False)["autoencoder"].weights
    assert large.working > 4 * 3 * 64 * 64, "the pixels alone"
    assert 3.5 < large.working / small.working < 6

    wanted = pipeline.image_to_image(picture(), PROMPT, 0.7, UNetSettings(seed=1)).pixels
    pipeline.memory._budget = RESERVE + 10_000_000
    again = pipeline.image_to_image(picture(), PROMPT, 0.7, UNetSettings(seed=1)).pixels
    assert "autoencoder_encoder" in pipeline.memory.plan.peaks
    assert torch.equal(again, wanted)
    pipeline(PROMPT, UNetSettings(seed=1))
    assert "autoencoder_encoder" not in pipeline.memory.plan.peaks


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
        sdxl.image_to_image(picture(), PROMPT, None, UNetSettings(seed=1, num_images=3))
    assert [one.seed for one in caught.value.finished] == [1]


def test_an_encoder_that_fails_is_named(folders: dict[str, Path]) -> None:
    pipeline = UNetPipeline(folders["sd"], device="cpu")
    with torch.no_grad():
        pipeline.autoencoder.encoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the autoencoder's encoder"):
        pipeline.image_to_image(picture(), PROMPT)


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ({"mode": "variation"}, {}, "mode 'variation': of pictures a U-Net does 'img2img' alone"),
        ({"mode": "reconstruct"}, {}, "mode 'reconstruct': of pictures a U-Net"),
        ({"mode": "inpaint", "mask": picture()}, {}, "mode 'inpaint': of pictures a U-Net"),
        ({"mode": "outpaint"}, {"width": 32}, "mode 'outpaint': of pictures a U-Net"),
        ({"mode": "img2imt"}, {}, "did you mean 'img2img'"),
        ({"mask": picture()}, {}, "a mask has no use"),
        ({"strength": 0.0}, {}, "strength 0: above 0 and up to 1"),
        ({"strength": 1.5}, {}, "strength 1.5: above 0 and up to 1"),
        ({"strength": 0.3}, {}, "strength 0.3 of 3 steps is less than one: choose more steps"),
        ({}, {"steps": 1}, "strength 0.8 of 1 steps is less than one"),
    ],
)
def test_slips_are_one_line(
    given: dict[str, Any], change: dict[str, Any], message: str, sdxl: UNetPipeline
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make_unet_plan(
            sdxl.spec, PROMPT, UNetSettings(**change), picture=PictureInput(picture(), **given)
        )
    assert "\n" not in str(caught.value)
