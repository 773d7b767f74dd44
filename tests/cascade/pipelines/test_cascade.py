from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.finite import BlankPictureError, NonFiniteError
from cascade.pipelines.results import Interrupted, Preview
from cascade.pipelines.spec import load_spec, save_spec
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_c import StageC


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(tiny_model, device="cpu")


@pytest.fixture
def copied_model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_prompt_becomes_a_picture_with_all_that_led_to_it(pipeline: CascadePipeline) -> None:
    output = pipeline("a red apple", seed=7)
    assert [picture.size for picture in output.pictures] == [(32, 32)]
    assert output.pixels.shape == (1, 3, 32, 32)
    assert 0 <= output.pixels.min() and output.pixels.max() <= 1
    assert output.stage_c_latents.shape == (1, 16, 2, 2)
    assert output.stage_b_latents.shape == (1, 4, 8, 8)
    assert (output.prompts, output.seeds) == (["a red apple"], [7])
    assert list(output.seconds) == ["text", "stage_c", "stage_b", "stage_a"]
    assert all(value > 0 for value in output.seconds.values())


def test_the_same_seed_gives_the_same_picture_and_another_another(
    pipeline: CascadePipeline,
) -> None:
    first, again = pipeline("a hat", seed=7), pipeline("a hat", seed=7)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, pipeline("a hat", seed=8).pixels)


def test_another_prompt_gives_another_picture_from_the_same_seed(
    pipeline: CascadePipeline,
) -> None:
    apple, fish = pipeline("a red apple", seed=7), pipeline("a blue fish", seed=7)
    assert not torch.equal(apple.stage_c_latents, fish.stage_c_latents)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_each_picture_of_a_batch_equals_its_seed_alone_bit_by_bit(
    pipeline: CascadePipeline, sampler: str
) -> None:
    prompts = ["a red apple", "a blue fish and a green hat"]
    batch = pipeline(prompts, seed=5, num_images=2, sampler=sampler)
    for index, (prompt, seed) in enumerate(zip(batch.prompts, batch.seeds, strict=True)):
        alone = pipeline(prompt, seed=seed, sampler=sampler)
        assert torch.equal(batch.pixels[index], alone.pixels[0])
        assert batch.pictures[index].tobytes() == alone.pictures[0].tobytes()
        assert batch.metadata[index] == alone.metadata[0]


def test_pictures_that_run_together_agree_with_pictures_alone(pipeline: CascadePipeline) -> None:
    prompts = ["a red apple", "a blue fish", "a green hat"]
    together = pipeline(prompts, seed=5, batch_size=3)
    alone = pipeline(prompts, seed=5)
    torch.testing.assert_close(together.pixels, alone.pixels, atol=1e-3, rtol=0)


def test_more_steps_in_stage_c_leave_the_noise_of_stage_b_alone(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []
    forward = StageB.forward

    def watched(self: StageB, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        drawn.append(x.clone())
        return forward(self, x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr(StageB, "forward", watched)
    pipeline("a hat", seed=7, steps_c=2, steps_b=1)
    pipeline("a hat", seed=7, steps_c=5, steps_b=1)
    assert torch.equal(drawn[0], drawn[1])


def test_steps_and_guidance_reach_the_networks(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = StageC.forward

    def watched(self: StageC, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        sizes.append(len(x))
        return forward(self, x, t, cond)  # type: ignore[arg-type]

    monkeypatch.setattr(StageC, "forward", watched)
    pipeline("a hat", steps_c=4, guidance_c=1)
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    pipeline("a hat", steps_c=2, guidance_c=3)
    assert sizes == [2, 2]


def test_the_negative_prompt_steers_and_the_null_prompt_is_its_default(
    pipeline: CascadePipeline,
) -> None:
    plain = pipeline("a hat", seed=7)
    assert torch.equal(plain.pixels, pipeline("a hat", seed=7, negative_prompt="").pixels)
    steered = pipeline("a hat", seed=7, negative_prompt="a red apple")
    assert not torch.equal(plain.stage_c_latents, steered.stage_c_latents)


def test_any_size_is_made_after_rounding(pipeline: CascadePipeline) -> None:
    output = pipeline("a hat", seed=7, width=47, height=24)
    assert output.pictures[0].size == (48, 24)
    assert output.notices[0].startswith("width 47 becomes 48")
    assert output.stage_c_latents.shape == (1, 16, 2, 3)


def test_bfloat16_agrees_with_float32_roughly(tiny_model: Path, pipeline: CascadePipeline) -> None:
    half = CascadePipeline.from_folder(tiny_model, device="cpu", dtype="bfloat16")
    assert next(half.stage_c.parameters()).dtype == torch.bfloat16
    output = half("a hat", seed=7, guidance_c=1)
    assert output.stage_c_latents.dtype == torch.float32
    reference = pipeline("a hat", seed=7, guidance_c=1).stage_c_latents
    correlation = torch.corrcoef(torch.stack([output.stage_c_latents, reference]).flatten(1))[0, 1]
    assert correlation > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_seed_means_the_same_picture_on_a_gpu(
    tiny_model: Path, pipeline: CascadePipeline
) -> None:
    on_gpu = CascadePipeline.from_folder(tiny_model, device="cuda", dtype="float32")
    prompts = ["a red apple", "a blue fish"]
    there = on_gpu(prompts, seed=7, on_preview=lambda preview: None)
    here = pipeline(prompts, seed=7)
    torch.testing.assert_close(there.pixels, here.pixels, atol=0.02, rtol=0)
    alone = on_gpu(prompts[1], seed=7, batch_size=1)
    both = on_gpu(prompts, seed=7, batch_size=1)
    assert torch.equal(alone.pixels[0], both.pixels[1])


@pytest.mark.parametrize(
    ("name", "network", "stage"),
    [
        ("stage_c", StageC, r"Stage C, step 1 of 3 \(float32\)"),
        ("stage_b", StageB, r"Stage B, step 1 of 2 \(float32\)"),
        ("stage_a", StageA, r"Stage A \(float32\)"),
    ],
)
def test_a_stage_that_gives_nonsense_is_named(
    copied_model: Path, name: str, network: type, stage: str
) -> None:
    path = copied_model / f"{name}.safetensors"
    module = load_network(path, expect=network)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    save_network(path, module)
    with pytest.raises(NonFiniteError, match=stage):
        CascadePipeline(copied_model, device="cpu")("a hat", seed=7)


def test_a_black_picture_is_never_a_success(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def black(self: StageA, latents: torch.Tensor) -> torch.Tensor:
        return latents.new_full((len(latents), 3, 32, 32), -1.0)

    monkeypatch.setattr(StageA, "decode", black)
    with pytest.raises(BlankPictureError, match="entirely black"):
        pipeline("a hat", seed=7)


def test_previews_come_while_stage_c_runs_and_at_its_end(pipeline: CascadePipeline) -> None:
    seen: list[Preview] = []
    pipeline("a hat", seed=7, steps_c=5, on_preview=seen.append, preview_every=2)
    assert [preview.step for preview in seen] == [2, 4, 5]
    assert all(preview.num_steps == 5 and preview.indices == (0,) for preview in seen)
    assert seen[0].images[0].size == (4, 4)


def test_previews_do_not_change_the_picture(pipeline: CascadePipeline) -> None:
    watched = pipeline("a hat", seed=7, on_preview=lambda preview: None, preview_every=1)
    assert torch.equal(watched.pixels, pipeline("a hat", seed=7).pixels)


def test_ctrl_c_keeps_the_finished_pictures(pipeline: CascadePipeline) -> None:
    def stop_in_the_second(preview: Preview) -> None:
        if preview.indices == (1,):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="after 1 of 3") as caught:
        pipeline("a hat", seed=7, num_images=3, on_preview=stop_in_the_second)
    [finished] = caught.value.finished
    assert finished.image.tobytes() == pipeline("a hat", seed=7).pictures[0].tobytes()


def test_a_bar_is_shown_for_each_stage_only_when_wanted(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for progress, expected in ((True, True), (False, False), (None, False)):
        screen = io.StringIO()
        monkeypatch.setattr("sys.stderr", screen)
        pipeline("a hat", seed=7, num_images=2, progress=progress)
        shown = screen.getvalue()
        assert ("picture 2 of 2, Stage C" in shown) is expected
        assert ("picture 2 of 2, Stage B" in shown) is expected


def test_reconstruction_through_stage_a_is_stage_a_itself(pipeline: CascadePipeline) -> None:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    result = pipeline.reconstruct(pixels, through="a")
    with torch.inference_mode():
        expected = pipeline.stage_a.decode(pipeline.stage_a.encode(pixels)).clamp(0, 1)
    assert torch.equal(result.pixels, expected)
    assert result.stage_c_latents is None


def test_reconstruction_through_stage_b_follows_picture_and_seed(
    pipeline: CascadePipeline,
) -> None:
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    result = pipeline.reconstruct(pixels, seeds=[1, 2])
    assert result.pixels.shape == pixels.shape
    assert result.stage_c_latents is not None
    assert torch.equal(result.stage_c_latents, pipeline.encode_picture(pixels))
    again = pipeline.reconstruct(pixels, seeds=[1, 3]).pixels
    assert torch.equal(result.pixels[0], again[0])
    assert not torch.equal(result.pixels[1], again[1])


Act = Callable[[CascadePipeline], object]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda p: p(""), "empty"),
        (lambda p: p("a", width=7), "valid sizes near it: 16, 24, 32"),
        (lambda p: p("a", batch_size=0), "batch_size 0"),
        (lambda p: p.reconstruct(torch.rand(1, 3, 30, 32)), "multiples of 8"),
        (lambda p: p.reconstruct(torch.rand(1, 3, 32, 32), seeds=[1, 2]), "2 seeds"),
        (lambda p: p.reconstruct(torch.rand(1, 3, 32, 32), through="b"), "through 'b'"),
    ],
)
def test_what_cannot_be_done_is_refused(pipeline: CascadePipeline, act: Act, message: str) -> None:
    with pytest.raises(UserError, match=message):
        act(pipeline)


@pytest.mark.parametrize("name", ["stage_a", "stage_b", "stage_c"])
def test_a_missing_file_is_named(copied_model: Path, name: str) -> None:
    (copied_model / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match=rf"{name}\.safetensors"):
        CascadePipeline(copied_model, device="cpu")


def test_a_truncated_file_is_named(copied_model: Path) -> None:
    path = copied_model / "stage_b.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"stage_b\.safetensors"):
        CascadePipeline(copied_model, device="cpu")


def test_another_networks_file_is_refused(copied_model: Path) -> None:
    shutil.copy(copied_model / "stage_c.safetensors", copied_model / "stage_b.safetensors")
    with pytest.raises(UserError, match="StageB is needed"):
        CascadePipeline(copied_model, device="cpu")


def test_a_size_step_that_the_stages_cannot_make_is_refused(copied_model: Path) -> None:
    spec = replace(load_spec(copied_model), size_multiple=4)
    save_spec(spec, copied_model)
    with pytest.raises(UserError, match="multiples of 8"):
        CascadePipeline(copied_model, device="cpu")


def test_a_compressor_of_another_grid_is_refused(copied_model: Path) -> None:
    spec = replace(load_spec(copied_model), pixels_per_stage_c_cell=8.0)
    save_spec(spec, copied_model)
    with pytest.raises(UserError, match="pixels_per_stage_c_cell"):
        CascadePipeline(copied_model, device="cpu").encode_picture(torch.rand(1, 3, 32, 32))


def test_the_text_of_a_picture_is_enough_to_make_it_again(pipeline: CascadePipeline) -> None:
    made = pipeline(
        "a hat", seed=7, negative_prompt="x", steps_c=2, guidance_c=3.5, sampler="ddim", width=40
    )
    [text] = made.metadata
    settings = json.loads(text["settings"])
    again = pipeline(
        text["prompt"],
        seed=int(text["seed"]),
        negative_prompt=text["negative_prompt"],
        steps_c=settings["stage_c"]["steps"],
        steps_b=settings["stage_b"]["steps"],
        guidance_c=settings["stage_c"]["guidance"],
        guidance_b=settings["stage_b"]["guidance"],
        sampler=settings["stage_c"]["sampler"],
        width=settings["width"],
        height=settings["height"],
    )
    assert torch.equal(made.pixels, again.pixels)
    assert text["model"] == "tiny" and len(text["model_hash"]) == 12
    assert isinstance(made.pictures[0], Image.Image)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 1, 32, 32), "are needed"),
        (torch.zeros(3, 32, 32), "are needed"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "are needed"),
        (torch.full((1, 3, 32, 32), 255.0), "divide 8-bit values by 255"),
        (torch.full((1, 3, 32, 32), -0.5), "must lie in"),
        (torch.full((1, 3, 32, 32), float("nan")), "must lie in"),
    ],
)
def test_what_is_no_picture_is_refused(
    tiny_model: Path, pixels: torch.Tensor, message: str
) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu")
    for call in (pipeline.encode_picture, pipeline.reconstruct):
        with pytest.raises(UserError, match=message):
            call(pixels)


def test_a_longer_neighbour_does_not_change_a_picture(copied_model: Path) -> None:
    spec = load_spec(copied_model)
    save_spec(replace(spec, text=replace(spec.text, overflow="chunk")), copied_model)
    pipeline = CascadePipeline(copied_model, device="cpu")
    long = "a flat icon of a blue fish " * 6
    settings = {"batch_size": 3, "progress": False}
    together = pipeline(["a red hat", long, "a blue hat"], seeds=[1, 2, 3], **settings)
    for index, prompt in enumerate(["a red hat", long, "a blue hat"]):
        alone = pipeline(prompt, seed=index + 1, **settings)
        assert torch.equal(together.pixels[index], alone.pixels[0])


def test_a_model_without_a_previewer_says_so_before_it_computes(copied_model: Path) -> None:
    (copied_model / "previewer.safetensors").unlink()
    pipeline = CascadePipeline(copied_model, device="cpu")
    pipeline.stage_c.forward = None  # nothing may run
    with pytest.raises(UserError, match="has no previewer"):
        pipeline("a red hat", seed=1, on_preview=lambda preview: None)


def test_the_seconds_of_the_text_are_those_of_encoding_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu")
    encode = pipeline.text_encoder.encode

    def slow(prompts: list[str]) -> object:
        time.sleep(0.05)
        return encode(prompts)

    monkeypatch.setattr(pipeline.text_encoder, "encode", slow)
    # Both the prompt and the null prompt are encoded.
    assert pipeline("a red hat", seed=1, progress=False).seconds["text"] >= 0.1
