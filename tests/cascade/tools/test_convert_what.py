"""What ``convert`` and its like take, what they refuse, and what they write of odd students."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sample
from cascade.adapters.lora_write import write_lora
from cascade.checkpoints.files import save_network
from cascade.checkpoints.part_files import find_network
from cascade.errors import UserError, run_main
from cascade.pipelines.latent import LatentSpec, save_latent_spec
from cascade.pipelines.unet_parts import open_unet_source
from cascade.tools.__main__ import main
from cascade.tools.convert_unet import why_not_diffusers, write_unet_folder
from stages.unet.unet import UNet
from tests.lora_toys import lora_of
from tests.unet_models import save_tiny, tiny_model
from train.distill.__main__ import main as distill

ROOT = Path(__file__).parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def odd_student() -> UNet:
    """A level of which one layer attends and one does not: diffusers has no words for it."""
    sizes = tiny_model("sdxl")[1].unet.config
    first, *rest = (list(depths) for depths in sizes.up_depths)
    first[0] = 0
    config = replace(sizes, up_depths=(tuple(first), *map(tuple, rest)))
    assert why_not_diffusers(config) is not None
    return UNet(config)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two U-Nets, the second larger than the first."""
    folder = tmp_path / "two"
    folder.mkdir()
    save_network(folder / "small.safetensors", odd_student())
    save_network(folder / "large.safetensors", tiny_model("sdxl")[1].unet)
    return folder


def lora_in(folder: Path) -> Path:
    parts, path = tiny_model("sdxl")[1], folder / "lora.safetensors"
    write_lora(path, {"unet": lora_of(parts)["unet"]}, "peft", unet=parts.unet.config)
    return path


def line_of(command: Callable[[], int | None], capsys: Any) -> str:
    assert run_main(command) == 2
    err: str = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def convert(model: Path, to: str, out: Path) -> int:
    told = ["convert", str(model), "--to", to, "--out", str(out), "--dtype", "fp32"]
    return run_main(lambda: main(told))


# Several U-Nets


def test_of_several_unets_none_is_taken(two: Path, tmp_path: Path, capsys: Any) -> None:
    model, out = save_tiny(tmp_path / "model", "sdxl"), str(tmp_path / "out")
    recipe = str(ROOT / "configs" / "distill" / "my_student.yaml")
    told = f"{two}: several U-Nets in it; name one: large.safetensors, small.safetensors"
    for command in (
        lambda: main(["convert", str(two), "--to", "ours", "--out", out]),
        lambda: sample.main(["--model", str(model), "--unet", str(two), "--prompt", "a"]),
        lambda: distill(["make-student", "--teacher", str(two), "--recipe", recipe, "--out", out]),
    ):
        assert told in line_of(command, capsys)
    lora = lora_in(tmp_path)
    words = ["convert-lora", str(lora), "--to", "kohya", "--out", f"{out}.safetensors"]
    assert told in line_of(lambda: main([*words, "--model", str(two)]), capsys)


def test_variants_and_a_teacher_beside_a_model_are_no_several(two: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "sdxl")
    shutil.copy(two / "small.safetensors", model / "teacher.safetensors")
    assert find_network(model, "unet").path == model / "unet" / WEIGHTS
    assert open_unet_source(model, model).unet_config == tiny_model("sdxl")[1].unet.config
    for name in ("openvino_model.bin", "flax_model.msgpack"):  # as published folders have them
        (model / "unet" / name).write_bytes(b"no weights of torch")
    assert find_network(model, "unet").path == model / "unet" / WEIGHTS
    alone = two / "small.safetensors"
    alone.rename(two / "large.fp16.safetensors")
    assert find_network(two, "unet").path == two / "large.safetensors"
    # Of a training: the file that it exports, whatever it kept beside.
    (two / "large.fp16.safetensors").rename(two / "unet.safetensors")
    assert find_network(two, "unet").path == two / "unet.safetensors"
    shutil.copy(two / "large.safetensors", model / "unet" / "other.safetensors")
    assert find_network(model, "unet").path == model / "unet" / WEIGHTS


def test_a_report_names_the_teachers_file(tmp_path: Path, capsys: Any) -> None:
    model = save_tiny(tmp_path / "model", "sdxl")
    (tmp_path / "none.yaml").write_text("remove: []\n")
    words = ["make-student", "--teacher", str(model), "--recipe", str(tmp_path / "none.yaml")]
    assert run_main(lambda: distill([*words, "--out", str(tmp_path / "out")])) == 0
    report = (tmp_path / "out" / "report.txt").read_text()
    assert str(model / "unet" / WEIGHTS) in report.splitlines()[0]
    assert "the recipe removes nothing: the student is its teacher" in report
    assert "the recipe removes nothing" in capsys.readouterr().out


# Students that diffusers has no words for


def test_an_odd_student_alone_goes_to_ours_and_back(tmp_path: Path, capsys: Any) -> None:
    student = odd_student()
    (tmp_path / "run").mkdir()
    save_network(tmp_path / "run" / "unet.safetensors", student)
    ours, original, back = (tmp_path / name for name in ("ours", "original", "back"))
    assert convert(tmp_path / "run", "ours", ours) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(ours / WEIGHTS)] and "for Cascade alone" in err
    assert convert(ours, "original", original) == 0
    assert convert(original / "unet.safetensors", "ours", back) == 0
    before = student.state_dict()
    for folder in (ours, back):
        after = load_file(folder / WEIGHTS)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    assert convert(ours, "diffusers", tmp_path / "theirs") == 2
    assert "write ours, or the original layout" in capsys.readouterr().err


def test_help_says_which_layouts_of_unets_are_the_same(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert "but for students that diffusers can't build" in " ".join(
        capsys.readouterr().out.split()
    )


# What is refused


def test_a_model_is_not_written_into_itself(tmp_path: Path, capsys: Any) -> None:
    model = save_tiny(tmp_path / "model", "sdxl")
    for out in (model / "new", model / "a" / ".." / "new"):
        words = ["convert", str(model), "--to", "ours", "--out", str(out)]
        assert f"inside {model}, which is read" in line_of(lambda words=words: main(words), capsys)
        assert not (model / "new").exists()


def test_what_is_not_converted_is_named(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "vae.safetensors"
    save_network(path, tiny_model("sdxl")[1].autoencoder)
    words = ["convert", str(path), "--to", "ours", "--out", str(tmp_path / "out")]
    assert "holds a KL autoencoder, and of single files" in line_of(lambda: main(words), capsys)
    (tmp_path / "latent").mkdir()
    save_latent_spec(LatentSpec("latent", 64), tmp_path / "latent")
    words[1] = str(tmp_path / "latent")
    assert "it is not converted" in line_of(lambda: main(words), capsys)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: Any) -> None:
    lora = lora_in(tmp_path)
    words = ["convert-lora", str(lora), "--to", "kohya", "--out", str(tmp_path / "x.safetensors")]
    words += ["--model", "nosuch"]
    assert line_of(lambda: main(words), capsys) == (
        "error: nosuch: no such file or folder; check the path\n"
    )


@pytest.mark.parametrize("more", [[], ["--steps", "3"]])
def test_a_unets_folder_without_its_settings_is_told_so(
    more: list[str], tmp_path: Path, capsys: Any
) -> None:
    spec, parts = tiny_model("sdxl")
    (tmp_path / "model").mkdir()
    parts = replace(parts, unet=odd_student())
    write_unet_folder(spec, parts, tmp_path / "model", torch.float32, theirs=False)
    (tmp_path / "model" / "pipeline.json").unlink()
    words = ["--model", str(tmp_path / "model"), "--prompt", "a hat", *more]
    assert "pipeline.json: not there, and it says how" in line_of(
        lambda: sample.main(words), capsys
    )


@pytest.mark.parametrize(
    ("suffix", "more", "message"),
    [
        (":lite", [], "which has no smaller stages; leave :lite out"),
        ("", ["--variant", "fp16"], "its files have no variants; leave variant 'fp16' out"),
    ],
)
def test_sizes_and_variants_that_are_not_there_are_refused(
    suffix: str, more: list[str], message: str, tmp_path: Path, tiny_model: Path, capsys: Any
) -> None:
    unet = save_tiny(tmp_path / "unet", "sdxl")
    (unet / "model_index.json").unlink()
    latent = tmp_path / "latent"
    latent.mkdir()
    save_latent_spec(LatentSpec("latent", 64), latent)
    cascade = [] if more else [tiny_model]
    for model in (unet, latent, *cascade):
        words = ["--model", f"{model}{suffix}", "--prompt", "a hat", *more]
        assert message in line_of(lambda words=words: sample.main(words), capsys)


def test_the_unet_of_diffusers_name_is_the_one_that_is_meant(tmp_path: Path) -> None:
    home = tmp_path / "model" / "unet"
    home.mkdir(parents=True)
    source = Path("weights/demo-koala/unet/diffusion_pytorch_model.safetensors")
    shutil.copy(source, home / "diffusion_pytorch_model.safetensors")
    shutil.copy(source, home / "old.safetensors")
    shutil.copy(source, home / "diffusion_pytorch_model.fp16.non_ema.safetensors")
    (home / "diffusion_pytorch_model.fp16.safetensors").symlink_to(tmp_path / "pruned")
    found = find_network(tmp_path / "model", "unet")
    assert found.path.name == "diffusion_pytorch_model.safetensors"
    (home / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert find_network(home, "unet").path == found.path
    (home / "diffusion_pytorch_model.fp16.non_ema.safetensors").unlink()
    found.path.rename(home / "other.safetensors")
    with pytest.raises(UserError, match="several U-Nets in it; name one"):
        find_network(home, "unet")
