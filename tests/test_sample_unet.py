"""``sample.py`` with U-Nets: picked by content, with options of their own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sample
from cascade.errors import run_main
from cascade.images import open_image, read_png_metadata
from tests.unet_models import save_tiny

Run = Callable[..., tuple[int, str, str]]
PICTURE = ["--image", "{picture}"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "folder": save_tiny(root / "folder", "sdxl"),
        "file": save_tiny(root / "file", "sdxl", single=True),
        "sd": save_tiny(root / "sd", "sd"),
    }


@pytest.fixture
def drawing(tmp_path: Path) -> Path:
    path = tmp_path / "drawing.png"
    Image.linear_gradient("L").resize((20, 16)).save(path)
    return path


@pytest.fixture
def run(models: dict[str, Path], tmp_path: Path, capsys: Any) -> Run:
    def call(model: str, *arguments: str) -> tuple[int, str, str]:
        named = ["--model", str(models.get(model, model)), "--out", str(tmp_path / "out")]
        code = run_main(lambda: sample.main([*named, "--device", "cpu", *arguments]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_folder_and_its_single_file_make_the_same_picture(run: Run, tmp_path: Path) -> None:
    texts, pictures = [], []
    for model in ("folder", "file"):
        code, out, err = run(model, "--prompt", "a red apple", "--seed", "7")
        assert (code, err) == (0, "")
        assert "U-Net" in out and "autoencoder" in out
    for path in sorted((tmp_path / "out").iterdir()):
        texts.append(read_png_metadata(path))
        pictures.append(open_image(path).tobytes())
    assert pictures[0] == pictures[1]
    for text in texts:
        del text["model_hash"]
    assert texts[0] == texts[1] and texts[0]["model"] == "tiny-sdxl"


def test_every_option_of_a_unet_reaches_the_picture(run: Run, tmp_path: Path) -> None:
    arguments = ["--prompt", "a red apple", "--seed", "7", "--steps", "2", "--guidance", "2"]
    arguments += ["--sampler", "euler_ancestral", "--spacing", "leading", "--width", "24"]
    arguments += ["--original-size", "32x8", "--crop", "2x4", "--target-size", "24x16"]
    code, out, _ = run("folder", *arguments, "--offload", "model")
    assert code == 0 and "offload model" in out
    [path] = (tmp_path / "out").iterdir()
    assert open_image(path).size == (24, 16)
    settings = read_png_metadata(path)["settings"]
    for part in ('"sizes": [8, 32, 4, 2, 16, 24]', '"euler_ancestral"', '"steps": 2', '"leading"'):
        assert part in settings


def test_a_picture_and_its_strength_reach_the_picture(
    run: Run, tmp_path: Path, drawing: Path
) -> None:
    arguments = ["--prompt", "a red apple", "--seed", "7", "--image", str(drawing)]
    for model in ("folder", "sd"):
        for strength in ("0.4", "1"):
            code, _, err = run(model, *arguments, "--strength", strength)
            assert (code, err) == (0, "")
        code, _, err = run(model, *arguments)
        assert (code, err) == (0, "")
    made = sorted((tmp_path / "out").iterdir())
    assert {open_image(path).size for path in made} == {(20, 16)}
    assert len({open_image(path).tobytes() for path in made}) == 6
    told = [read_png_metadata(path)["settings"] for path in made]
    for settings, strength in zip(told, ("0.4", "1.0", "0.8") * 2, strict=True):
        assert '"mode": "img2img"' in settings and f'"strength": {strength}}}' in settings


def test_a_preview_lies_beside_the_picture(run: Run, tmp_path: Path, drawing: Path) -> None:
    arguments = ["--prompt", "a hat", "--seed", "7", "--preview", "--image", str(drawing)]
    assert run("sd", *arguments)[0] == 0
    picture, preview = sorted((tmp_path / "out").iterdir(), key=lambda path: len(path.name))
    assert (picture.name, preview.name) == ("0001-a-hat-seed7.png", "0001-a-hat-seed7.preview.png")
    assert open_image(picture).size == (20, 16) and open_image(preview).size == (10, 8)


def test_float16_is_told_about_sdxls_autoencoder(run: Run) -> None:
    code, _, err = run("folder", "--prompt", "a red apple", "--dtype", "float16")
    assert code == 0 and err.startswith("notice: the autoencoder runs in float32")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("folder", ["--steps-b", "3"], "--steps-b: .* is a U-Net; it takes --steps"),
        ("folder", ["--guidance-c", "3"], "--guidance-c: .* a U-Net; it takes --guidance"),
        ("folder", ["--control", "x"], "--control: .* is a U-Net; leave it out"),
        ("folder", ["--image", "nowhere.png"], "nowhere.png: no such file"),
        ("folder", ["--strength", "0.5"], "--strength is about a picture"),
        ("folder", [*PICTURE, "--strength", "0.1"], "0.1 of 3 steps is less than one"),
        ("folder", [*PICTURE, "--strength", "2"], "strength 2: above 0 and up to 1"),
        ("folder", [*PICTURE, "--mask", "{picture}"], "mode 'inpaint': of pictures a U-Net does"),
        ("folder", [*PICTURE, "--mode", "variation"], "mode 'variation': of pictures a U-Net"),
        ("folder", [*PICTURE, "--mode", "reconstruct"], "mode 'reconstruct': of pictures"),
        ("folder", ["--dialect", "diffusers"], "--dialect: .* is a U-Net; leave it out"),
        ("folder", ["--sampler", "ddpm"], "sampler 'ddpm': did you mean 'ddim'"),
        ("folder", ["--dtype", "unet=float17"], "dtype 'float17': did you mean 'float16'"),
        ("folder", ["--crop", "a"], "'a' is no WxH in pixels"),
        ("folder", ["--unet", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        ("sd", ["--target-size", "8x8"], "target_size: this model is told no sizes"),
        ("tiny", ["--steps", "3"], "--steps: .* is a cascade; it takes --steps-c and --steps-b"),
        ("tiny", ["--unet", "x"], "--unet: .* is a cascade; leave it out"),
    ],
)
def test_slips_are_one_line_and_exit_code_2(
    model: str, arguments: list[str], message: str, run: Run, tiny_model: Path, drawing: Path
) -> None:
    name = str(tiny_model) if model == "tiny" else model
    arguments = [one.replace("{picture}", str(drawing)) for one in arguments]
    code, _, err = run(name, "--prompt", "a red apple", *arguments)
    assert code == 2 and len(err.splitlines()) == 1
    assert re.search(message, err)


def test_a_file_that_is_no_whole_model_is_one_line(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    code, _, err = run(str(path), "--prompt", "a red apple")
    assert code == 2 and "one network alone" in err and len(err.splitlines()) == 1
    path.write_bytes(b"broken")
    code, _, err = run(str(path), "--prompt", "a red apple")
    assert code == 2 and "not a whole safetensors file" in err
