"""Pictures made of pictures: what is kept is exact, what is drawn obeys the prompt and the seed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from cascade.images import image_to_pixels, pixels_to_images
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.control_input import ControlInput
from cascade.pipelines.memory_plan import RESERVE
from cascade.pipelines.picture_input import PictureInput
from cascade.pipelines.plan import Settings, make_plan
from cascade.text.picture_encoder import PictureEncoder
from cascade.tools.convert import convert
from stages.controlnet import ControlNet, ControlNetConfig
from stages.semantic_compressor import TrunkStage
from stages.stage_c import StageC, StageCCondition

SEED = Settings(seed=3)


def randomized(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return network.eval()


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a Stage C that is told of pictures, and a CLIP that sees them."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("pictures") / "model"))
    half = [0.5, 0.5, 0.5]
    content = {"image_size": 32, "mean": half, "std": half}
    (folder / "text/preprocessor.json").write_text(json.dumps(content))
    config = load_network(folder / "stage_c.safetensors", expect=StageC).config
    torch.manual_seed(0)
    network = randomized(StageC(replace(config, image_channels=12)))
    save_network(folder / "stage_c.safetensors", network)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(folder, device="cpu")


@pytest.fixture
def image() -> Image.Image:
    return pixels_to_images(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))[0]


@pytest.fixture
def mask() -> Image.Image:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    return mask


# Masks


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_what_the_mask_leaves_is_kept_in_latents_and_exactly_in_pixels(
    pipeline: CascadePipeline, image: Image.Image, mask: Image.Image, sampler: str
) -> None:
    settings = Settings(seed=3, num_images=2, sampler=sampler)
    output = pipeline.inpaint(image, mask, "a hat", settings=settings)
    pixels = image_to_pixels(image)[None]
    assert torch.equal(output.pixels[..., :16], pixels[..., :16].expand(2, -1, -1, -1))
    task = make_plan(pipeline.spec, "a", picture=PictureInput(image, "inpaint", mask)).picture
    assert task is not None
    known_c = pipeline.encode_picture(task.pixels)
    with torch.inference_mode():
        known_b = pipeline.stage_a.encode(task.pixels)
    for latents, known in ((output.stage_c_latents, known_c), (output.stage_b_latents, known_b)):
        half = known.shape[-1] // 2
        same = known[..., :half].expand(2, -1, -1, -1)
        torch.testing.assert_close(latents[..., :half], same)
        assert not torch.allclose(latents[..., half:], known[..., half:], atol=1e-2)
        assert not torch.allclose(latents[0, ..., half:], latents[1, ..., half:], atol=1e-2)


def test_the_drawn_part_obeys_the_prompt_and_the_seed_alone_makes_it_again(
    pipeline: CascadePipeline, image: Image.Image, mask: Image.Image
) -> None:
    first = pipeline.inpaint(image, mask, "a hat", settings=Settings(seed=3, num_images=2))
    again = pipeline.inpaint(image, mask, "a hat", settings=Settings(seed=4))
    other = pipeline.inpaint(image, mask, "a blue fish", settings=Settings(seed=4))
    assert torch.equal(first.pixels[1], again.pixels[0])
    assert not torch.equal(other.pixels, again.pixels)


def test_the_whole_is_larger_and_the_picture_lies_in_it_as_it_was(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    output = pipeline.outpaint(image, "a hat", Settings(seed=3, width=64, height=48))
    assert output.pixels.shape == (1, 3, 48, 64)
    assert torch.equal(output.pixels[0, :, 8:40, 16:48], image_to_pixels(image))


# The whole picture


def test_reconstruction_as_a_mode_equals_the_method(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    plan = make_plan(pipeline.spec, "", SEED, picture=PictureInput(image, "reconstruct"))
    output = pipeline.make(plan)
    whole = pipeline.reconstruct(image_to_pixels(image)[None], seeds=[3])
    assert torch.equal(output.pixels, whole.pixels)
    assert torch.equal(output.stage_c_latents, whole.stage_c_latents)
    assert "stage_c" not in output.seconds


def test_the_less_strength_the_nearer_to_the_picture(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    known = pipeline.encode_picture(image_to_pixels(image)[None])
    distances = []
    for strength in (0.02, 0.3, 1.0):
        output = pipeline.image_to_image(image, "a hat", strength, SEED)
        distances.append(float((output.stage_c_latents - known).abs().mean()))
    assert distances[0] < distances[1] < distances[2]


def test_the_default_strength_is_that_of_the_published_notebook(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    output = pipeline.image_to_image(image, "a hat", settings=SEED)
    assert torch.equal(output.pixels, pipeline.image_to_image(image, "a hat", 0.8, SEED).pixels)
    told = json.loads(output.metadata[0]["settings"])["picture"]
    assert (told["mode"], told["strength"]) == ("img2img", 0.8)


def test_a_picture_s_text_makes_it_again(
    pipeline: CascadePipeline, image: Image.Image, tmp_path: Path
) -> None:
    image.save(tmp_path / "given.png")
    wanted = replace(SEED, steps_c=5, steps_b=2)
    output = pipeline.image_to_image(tmp_path / "given.png", "a hat", 0.5, wanted)
    told = json.loads(output.metadata[0]["settings"])
    again = Settings(
        seed=output.seeds[0], steps_c=told["stage_c"]["steps"], steps_b=told["stage_b"]["steps"]
    )
    strength = told["picture"]["strength"]
    remade = pipeline.image_to_image(image, "a hat", strength, again)
    assert torch.equal(remade.pixels, output.pixels)
    assert remade.metadata == output.metadata


def test_what_is_no_picture_is_refused(pipeline: CascadePipeline) -> None:
    with pytest.raises(UserError, match=r"type Tensor: give a PIL.Image or a file's path"):
        pipeline.variation(torch.zeros(3, 8, 8))  # type: ignore[arg-type]


def test_an_output_is_shown_without_its_values(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    shown = repr(pipeline.variation(image, settings=SEED))
    assert "tensor" not in shown and "seeds=[" in shown


def test_a_picture_made_of_a_prompt_alone_says_nothing_of_another(
    pipeline: CascadePipeline,
) -> None:
    assert "picture" not in json.loads(pipeline("a hat", seed=1).metadata[0]["settings"])


# Variations


def test_a_variation_depends_on_the_picture_and_needs_no_prompt(
    pipeline: CascadePipeline, image: Image.Image
) -> None:
    first = pipeline.variation(image, settings=SEED)
    other = pipeline.variation(Image.new("RGB", (40, 20), "red"), settings=SEED)
    prompted = pipeline.variation(image, "a hat", SEED)
    assert first.pixels.shape == other.pixels.shape == (1, 3, 32, 32)
    assert not torch.equal(first.stage_c_latents, other.stage_c_latents)
    assert not torch.equal(first.stage_c_latents, prompted.stage_c_latents)


def test_stage_c_is_told_the_embedding_and_zeros_to_be_led_away_from(
    pipeline: CascadePipeline, folder: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    prepare = pipeline.stage_c.prepare

    def seen(cond: StageCCondition) -> object:
        told.append(cond)
        return prepare(cond)

    monkeypatch.setattr(pipeline.stage_c, "prepare", seen)
    pipeline.variation(image, settings=SEED)
    embeds = PictureEncoder.from_folder(folder / "text")(image_to_pixels(image)[None])
    [cond] = told
    torch.testing.assert_close(cond.image[:1, 0], embeds)
    assert not cond.image[1].any()


def test_a_converted_model_varies_pictures_as_before(
    pipeline: CascadePipeline, folder: Path, tmp_path: Path, image: Image.Image
) -> None:
    before = pipeline.variation(image, settings=SEED).stage_c_latents
    for target in ("ours", "diffusers"):
        convert(folder, target, tmp_path / target, torch.float32)
    again = CascadePipeline.from_pretrained(tmp_path / "ours", device="cpu")
    after = again.variation(image, settings=SEED).stage_c_latents
    # Weights that lie otherwise in their file are multiplied in another order.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.std()))
    there = PictureEncoder.from_folder(tmp_path / "diffusers/prior/image_encoder")
    here = pipeline.image_encoder
    assert there.preprocessing == here.preprocessing
    pixels = image_to_pixels(image)[None]
    torch.testing.assert_close(there(pixels), here(pixels))


def test_a_model_that_is_told_nothing_of_pictures_says_so(
    tiny_model: Path, image: Image.Image
) -> None:
    with pytest.raises(UserError, match="told nothing of pictures"):
        CascadePipeline.from_pretrained(tiny_model, device="cpu").variation(image)


def test_a_model_without_an_image_encoder_says_so(
    folder: Path, tmp_path: Path, image: Image.Image
) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "text/preprocessor.json").unlink()
    with pytest.raises(UserError, match="no image encoder"):
        CascadePipeline.from_pretrained(bare, device="cpu").variation(image)


def test_a_model_without_a_compressor_says_so(
    folder: Path, tmp_path: Path, image: Image.Image
) -> None:
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "compressor.safetensors").unlink()
    with pytest.raises(UserError, match="no compressor"):
        CascadePipeline.from_pretrained(bare, device="cpu").image_to_image(image, "a hat")


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_pictures_as_input_are_the_same_under_any_placement(
    folder: Path, image: Image.Image, mask: Image.Image, offload: str
) -> None:
    pipeline = CascadePipeline.from_pretrained(folder, device="cpu")

    def both() -> list[torch.Tensor]:
        return [
            pipeline.variation(image, settings=SEED).pixels,
            pipeline.inpaint(image, mask, "a hat", settings=SEED).pixels,
        ]

    before = both()
    pipeline.place(offload=offload)
    assert all(map(torch.equal, both(), before))


@pytest.mark.parametrize("tight", [False, True])
def test_pictures_as_input_are_the_same_within_a_budget(
    folder: Path,
    image: Image.Image,
    mask: Image.Image,
    tmp_path: Path,
    tight: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has no budget: one is put in behind the check."""
    monkeypatch.setattr("cascade.pipelines.memory.TILE_CELLS", (4,))
    pipeline = CascadePipeline.from_pretrained(folder, device="cpu")
    edges, small = (
        ControlInput(control_file(tmp_path / f"{channels}.safetensors", channels), image)
        for channels in (1, 16)
    )
    calls = {
        "variation": lambda: pipeline.variation(image, settings=SEED).pixels,
        "inpaint": lambda: pipeline.inpaint(image, mask, "a hat", settings=SEED).pixels,
        "img2img": lambda: pipeline.image_to_image(image, "a hat", settings=SEED).pixels,
        "edges": lambda: drawn(pipeline, edges),
        "super-resolution": lambda: drawn(pipeline, small),
    }
    read = {
        "variation": {"image_encoder"},
        "inpaint": {"compressor", "stage_a_encoder"},
        "img2img": {"compressor"},
        "edges": {"controlnet"},
        "super-resolution": {"controlnet", "compressor"},
    }
    before = {name: call() for name, call in calls.items()}
    # Edges are found in 224 x 224 pixels, however small the picture.
    least = {"edges": 8e6, "super-resolution": 2e6}
    for name, call in calls.items():
        budget = RESERVE + int(least.get(name, 6e5) if tight else 2e7)
        pipeline.memory._budget, pipeline.memory._arranged = budget, None
        torch.testing.assert_close(call(), before[name], atol=1e-5, rtol=1e-5)
        plan = pipeline.memory.plan
        assert 0 < plan.peak <= budget
        assert set(plan.peaks) - {"text", "stage_c", "stage_b", "stage_a"} == read[name]
        assert "controlnet" not in pipeline.memory._placement.parts
    assert "32x32 with a ControlNet" in plan.describe()
    for network in (pipeline.compressor, pipeline.image_encoder):
        assert all(weight.is_meta for weight in network.parameters())


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_a_controlnet_comes_and_goes_as_the_mode_says(
    folder: Path,
    image: Image.Image,
    tmp_path: Path,
    offload: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = CascadePipeline.from_pretrained(folder, device="cpu")
    control = ControlInput(control_file(tmp_path / "control.safetensors"), image)
    expected = drawn(pipeline, control)
    pipeline.place(offload=offload)
    seen = []
    forward = ControlNet.forward

    def watched(self: ControlNet, signal: torch.Tensor) -> object:
        stages = (pipeline.stage_c, pipeline.stage_b, pipeline.stage_a)
        seen.append([next(one.parameters()).is_meta for one in (self, *stages)])
        return forward(self, signal)

    monkeypatch.setattr(ControlNet, "forward", watched)
    assert torch.equal(drawn(pipeline, control), expected)
    assert seen == [[offload == "sequential", *[offload != "none"] * 3]]
    assert "controlnet" not in pipeline.memory._placement.parts

    monkeypatch.setattr(ControlNet, "forward", lambda self, signal: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(pipeline, control)
    assert "controlnet" not in pipeline.memory._placement.parts


# ControlNet


def control_file(path: Path, in_channels: int = 1, channels: int = 16) -> Path:
    torch.manual_seed(2)
    config = ControlNetConfig(
        in_channels=in_channels,
        bottleneck="large" if in_channels == 16 else "effnet",
        stages=(TrunkStage("fused", 1, 3, 1, 6, 1), TrunkStage("fused", 2, 3, 2, 8, 1)),
        blocks=(0, 2),
        out_channels=(channels, channels),
        feature_channels=10,
        stem_channels=6,
        residual_channels=6,
        residual_blocks=1,
    )
    save_network(path, randomized(ControlNet(config)))
    return path


def drawn(pipeline: CascadePipeline, control: ControlInput, **given: PictureInput) -> torch.Tensor:
    plan = make_plan(pipeline.spec, "a hat", SEED, control=control, **given)
    return pipeline.make(plan).stage_c_latents


@pytest.mark.parametrize("in_channels", [1, 16])
def test_a_controlnet_leads_stage_c_as_strongly_as_it_is_told(
    pipeline: CascadePipeline, image: Image.Image, tmp_path: Path, in_channels: int
) -> None:
    path = control_file(tmp_path / "control.safetensors", in_channels)
    plain = pipeline("a hat", seed=3).stage_c_latents
    assert torch.equal(drawn(pipeline, ControlInput(path, image, 0.0)), plain)
    weak, full = (drawn(pipeline, ControlInput(path, image, s)) for s in (0.01, 1.0))
    assert not torch.equal(full, plain)
    assert (weak - plain).abs().mean() < (full - plain).abs().mean()
    if in_channels == 16:  # at 8 x 8 pixels there are no edges to tell two pictures by
        other = ControlInput(path, Image.new("RGB", (64, 64), "white"))
        assert not torch.equal(drawn(pipeline, other), full)


def test_a_controlnet_for_holes_sees_the_pictures_own_mask(
    pipeline: CascadePipeline, image: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    path = control_file(tmp_path / "control.safetensors", 4)
    given = PictureInput(image, "inpaint", mask)
    other = PictureInput(image, "inpaint", Image.new("L", (32, 32), 255))
    first, second = (drawn(pipeline, ControlInput(path), picture=one) for one in (given, other))
    assert not torch.equal(first[..., 1:], second[..., 1:])
    with pytest.raises(UserError, match="needs a mask"):
        drawn(pipeline, ControlInput(path, image))


def test_a_picture_tells_of_its_control(
    pipeline: CascadePipeline, image: Image.Image, tmp_path: Path
) -> None:
    path = control_file(tmp_path / "control.safetensors")
    plan = make_plan(pipeline.spec, "a hat", SEED, control=ControlInput(path, image, 0.5))
    told = json.loads(pipeline.make(plan).metadata[0]["settings"])["control"]
    assert told["strength"] == 0.5 and len(told["network"]) == len(told["fingerprint"]) == 12


def test_controls_that_do_not_fit_are_refused(
    pipeline: CascadePipeline, image: Image.Image, tmp_path: Path, tiny_model: Path
) -> None:
    path = control_file(tmp_path / "control.safetensors", channels=24)
    with pytest.raises(UserError, match=r"24 channels in block 0, but this one has 16 channels"):
        drawn(pipeline, ControlInput(path, image))
    with pytest.raises(UserError, match="holds a stage_a, but controlnet is needed"):
        drawn(pipeline, ControlInput(tiny_model / "stage_a.safetensors", image))
    with pytest.raises(UserError, match="needs a picture"):
        drawn(pipeline, ControlInput(path))
    with pytest.raises(UserError, match="finite"):
        drawn(pipeline, ControlInput(path, image, float("inf")))
    with pytest.raises(UserError, match="which a reconstruction does not run"):
        drawn(pipeline, ControlInput(path), picture=PictureInput(image, "reconstruct"))
    with pytest.raises(UserError, match="no such file"):
        make_plan(pipeline.spec, "a", control=ControlInput(tmp_path / "nowhere", image))
