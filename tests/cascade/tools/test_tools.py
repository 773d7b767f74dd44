"""A cascade goes out in every layout and comes back the same."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.checkpoints.load import load_any
from cascade.errors import UserError, run_main
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.parts import open_source
from cascade.pipelines.spec import load_spec, save_spec
from cascade.tools.__main__ import main
from cascade.tools.describe import describe_path
from cascade.tools.diffusers_names import TRAIN_TIMES, discrete_betas
from stages.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stages.stage_c import StageC
from tests.unet_models import save_tiny

NAMES = {"stage_a", "stage_b", "stage_c", "effnet_encoder", "previewer"}


def convert(model: Path, out: Path, to: str, dtype: str = "fp32") -> int:
    return main(["convert", str(model), "--to", to, "--out", str(out), "--dtype", dtype])


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    one, two = first.state_dict(), second.state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def test_our_folder_comes_back_with_the_same_pictures(tiny_model: Path, tmp_path: Path) -> None:
    assert convert(tiny_model, tmp_path / "out", "ours") == 0
    before, after = (
        CascadePipeline(folder, device="cpu")("a red hat", seed=3)
        for folder in (tiny_model, tmp_path / "out")
    )
    # Not bit by bit: another place in memory can mean another kernel.
    assert (before.pixels - after.pixels).abs().max() < 1e-4


def test_the_authors_layout_comes_back_tensor_by_tensor(tiny_model: Path, tmp_path: Path) -> None:
    convert(tiny_model, tmp_path / "out", "original")
    files = {path.stem: path for path in (tmp_path / "out").glob("*.safetensors")}
    assert files.keys() == NAMES
    for stem, path in files.items():
        [(published, network)] = load_any(path)
        assert published.layout == "original"
        name = {"effnet_encoder": "compressor"}.get(stem, stem)
        [(_, ours)] = load_any(tiny_model / f"{name}.safetensors")
        assert_same_weights(network, ours)


@pytest.mark.parametrize(
    "trained",
    [
        {"prediction": "flow", "schedule": "linear"},
        {"prediction": "flow"},
        {"prediction": "v", "zero_terminal_snr": True},
    ],
    ids=str,
)
def test_what_diffusers_can_t_sample_goes_out_in_the_other_layouts_alone(
    trained: dict[str, object], tiny_model: Path, tmp_path: Path
) -> None:
    spec = load_spec(tiny_model)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    save_spec(replace(spec, stage_c=replace(spec.stage_c, **trained)), model)
    with pytest.raises(UserError, match="diffusers' pipelines can't sample this model"):
        convert(model, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", "original")
    shutil.copytree(model / "text", tmp_path / "out" / "text")
    before, after = (
        CascadePipeline(folder, device="cpu", dtype="float32")("a red hat", seed=3)
        for folder in (model, tmp_path / "out")
    )
    assert (before.pixels - after.pixels).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_normed_queries_stay_in_our_layout(tiny_model: Path, tmp_path: Path, to: str) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / "stage_c.safetensors"
    network = StageC(replace(load_network(file, expect=StageC).config, qk_norm=True))
    save_network(file, network)
    with pytest.raises(UserError, match="qk_norm"):
        convert(model, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    convert(model, tmp_path / "out", "ours")
    assert load_network(tmp_path / "out" / "stage_c.safetensors", expect=StageC).config.qk_norm


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_what_was_converted_is_sampled_as_it_was_trained(
    tiny_model: Path, tmp_path: Path, to: str
) -> None:
    spec = load_spec(tiny_model)
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    stage_c = replace(spec.stage_c, prediction="v", sampler="ddim", steps=3, guidance=2.5)
    save_spec(replace(spec, stage_c=stage_c), model)
    convert(model, tmp_path / "out", to)
    if to == "original":  # whoever opens it brings the text encoder
        shutil.copytree(model / "text", tmp_path / "out" / "text")
    before, after = (
        CascadePipeline(folder, device="cpu", dtype="float32")("a red hat", seed=3)
        for folder in (model, tmp_path / "out")
    )
    assert after.pixels.shape == before.pixels.shape
    assert (before.pixels - after.pixels).abs().max() < 1e-4
    published = open_source(tmp_path / "out", dialect="diffusers").spec
    assert published.stage_c.prediction == "v" and published.image_size == spec.image_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["descibe", "x"], "invalid choice: 'descibe'"),
        (["convert", "x", "--to", "ours", "--outt", "y"], "--out"),
        (["convert", "x", "--too", "ours", "--out", "y"], "--to"),
    ],
)
def test_a_slip_on_the_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda: main(arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_number_format_is_asked_for_and_named_in_the_file(
    tiny_model: Path, tmp_path: Path
) -> None:
    convert(tiny_model, tmp_path / "out", "original", "bf16")
    assert (tmp_path / "out" / "stage_c_bf16.safetensors").is_file()
    [(_, network)] = load_any(tmp_path / "out" / "stage_c_bf16.safetensors")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    ours = load_network(tiny_model / "stage_c.safetensors", expect=StageC, dtype=torch.bfloat16)
    assert_same_weights(network, ours)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_ends_early_leaves_nothing(
    error: BaseException, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("cascade.tools.convert.write_text", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(tiny_model, tmp_path / "new" / "out", "diffusers")
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "new" / "out").mkdir()  # an empty folder is as good as none
    assert convert(tiny_model, tmp_path / "new" / "out", "diffusers") == 0


def test_a_full_disk_under_safetensors_is_one_line_that_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(UserError, match="can't be written: the disk is full; free some space"):
        convert(tiny_model, tmp_path / "out", "ours")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["ours", "original", "diffusers"])
@pytest.mark.parametrize("name", ["stage_b", "text/model"])
def test_a_number_too_large_for_the_format_is_refused(
    name: str, to: str, tiny_model: Path, tmp_path: Path
) -> None:
    if to == "original" and name.startswith("text"):
        pytest.skip("the authors' layout has no text encoder")
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file = model / f"{name}.safetensors"
    state, metadata = load_file(file), read_metadata(file)
    begins = "text_model" if name.startswith("text") else ""
    key = next(k for k, v in state.items() if v.is_floating_point() and k.startswith(begins))
    state[key].view(-1)[0] = 1e6
    save_file(state, file, metadata=metadata)
    with pytest.raises(UserError, match=r"1 of its numbers are not finite in float16"):
        convert(model, tmp_path / "out", to, "fp16")
    assert not (tmp_path / "out").exists()
    assert convert(model, tmp_path / "out", to, "bf16") == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_what_is_written_can_be_read_by_others(tiny_model: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        convert(tiny_model, tmp_path / "out", "diffusers")
    finally:
        os.umask(before)
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_a_conversion_without_its_settings_is_not_taken_for_the_published_cascade(
    to: str, tiny_model: Path, tmp_path: Path
) -> None:
    convert(tiny_model, tmp_path / "out", to)
    shutil.copytree(tiny_model / "text", tmp_path / "out" / "text", dirs_exist_ok=True)
    (tmp_path / "out" / "cascade.json").unlink()
    with pytest.raises(UserError, match=r"converted by Cascade, but cascade\.json.*copy it from"):
        open_source(tmp_path / "out")


def test_our_own_files_without_their_settings_are_told_as_such(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.json").unlink()
    with pytest.raises(UserError, match=r"no model\.json in .*name the model's own folder"):
        open_source(model)


def test_a_file_is_no_cascade(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a Stage A, and of single files U-Nets"):
        convert(tiny_model / "stage_a.safetensors", tmp_path / "out", "ours")


def test_nothing_that_is_there_is_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        convert(tiny_model, tmp_path / "out", "ours")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_the_discrete_times_are_those_of_the_cosine() -> None:
    product = (1.0 - discrete_betas()).cumprod(0)
    assert len(product) == TRAIN_TIMES
    assert product[-1] == pytest.approx(1e-4, rel=1e-6)
    assert product[499] == pytest.approx(0.4938, abs=1e-3)


def test_describe_says_what_every_file_of_a_folder_is(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", str(tiny_model)]) == 0
    out = capsys.readouterr().out
    for line in (
        "network     Stage C, v3",
        "network     Stage B, v3",
        "network     Stage A",
        "network     compressor",
        "network     previewer",
        "network     CLIP: text and image encoder",
        "layout      transformers",
        "layout      ours",
    ):
        assert line in out


@pytest.mark.parametrize("to", ["ours", "diffusers", "original"])
def test_a_converted_model_still_says_where_it_is_from(
    to: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    save_spec(replace(load_spec(model), licence="Apache-2.0"), model)
    file = model / "stage_c.safetensors"
    save_network(file, load_network(file, expect=StageC), metadata={"train_steps": "7"})
    convert(model, tmp_path / "out", to)
    described = describe_path(tmp_path / "out")
    assert {one.licence for one in described} == {"Apache-2.0"}
    origins = {one.network: one.origin for one in described}
    assert origins["Stage C, v3"] == "tiny, trained with Cascade"
    assert origins["Stage A"] == "tiny"
    assert {one.problem for one in described} == {""}


def test_describe_says_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    convert(tiny_model, tmp_path / "out", "original")
    whole = load_file(tmp_path / "out" / "stage_a.safetensors")
    first = min(whole)
    for name, state in (
        ("less", {key: value for key, value in whole.items() if key != first}),
        ("more", {**whole, "extra.weight": torch.zeros(3)}),
    ):
        save_file(state, tmp_path / f"{name}.safetensors")
        [one] = describe_path(tmp_path / f"{name}.safetensors")
        assert one.network == "Stage A"
        assert (first if name == "less" else "extra.weight") in one.problem
        assert any("incomplete" in line for line in one.lines())


def test_describe_goes_by_content(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tiny_model, tmp_path / "out", "original")
    shutil.move(tmp_path / "out" / "stage_c.safetensors", tmp_path / "holiday.safetensors")
    capsys.readouterr()
    assert main(["describe", str(tmp_path / "holiday.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "Stage C, v3" in out and "layout      original" in out and "float32)" in out


def test_what_is_no_network_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert run_main(lambda: main(["describe", str(tmp_path / "x.safetensors")])) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_unets_folder_and_file_are_described(tmp_path: Path) -> None:
    single = save_tiny(tmp_path / "single", "sdxl", single=True)
    for path in (single, save_tiny(tmp_path / "folder", "sdxl")):
        described = describe_path(path)
        networks = [one.network for one in described]
        assert sorted(networks) == ["AutoencoderKL", "U-Net", "text encoder", "text encoder"]
        assert {one.licence for one in described} == {"Apache-2.0"}
        assert {one.problem for one in described} == {""}
        assert {one.origin for one in described} == {"tiny-sdxl"}
    [unet] = [one for one in described if one.network == "U-Net"]
    assert "mid_depth 1, up_depths 1/2 0/0" in unet.sizes


def test_an_autoencoder_alone_is_described_with_what_nobody_tells(tmp_path: Path) -> None:
    config = AutoencoderKLConfig(channels=(32, 64), blocks_per_level=1)
    save_file(AutoencoderKL(config).state_dict(), tmp_path / "vae.safetensors")
    [described] = describe_path(tmp_path / "vae.safetensors")
    assert described.network == "AutoencoderKL"
    assert "no tensor tells its scale" in described.problem
