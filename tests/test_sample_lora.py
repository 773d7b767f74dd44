"""``sample.py --lora``: merged into the weights, named in the picture, strict."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from cascade.adapters.lora_write import write_lora
from cascade.checkpoints.files import file_hash
from cascade.errors import run_main
from cascade.images import open_image, read_png_metadata
from cascade.pipelines import unet_published
from cascade.pipelines.placement import UNetDtypes
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_lora import LoraChoice
from cascade.pipelines.unet_parts import open_unet_source
from cascade.pipelines.unet_plan import UNetSettings
from cascade.sample_options import lora_and_weight
from stages.unet.config import UNetConfig
from tests.lora_toys import lora_of
from tests.reference.unet_toys import SDXL
from tests.unet_models import save_tiny, tiny_model

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for kind in ("sdxl", "sd"):
        save_tiny(root / kind, kind)  # type: ignore[arg-type]
        parts = tiny_model(kind)[1]  # type: ignore[arg-type]
        updates = lora_of(parts, ("to_q", "to_v", "conv1"))
        for naming in ("peft", "kohya"):
            path = root / f"{kind}-{naming}.safetensors"
            write_lora(path, updates, naming, unet=parts.unet.config)  # type: ignore[arg-type]
    return root


@pytest.fixture
def run(root: Path, tmp_path: Path, capsys: Any) -> Run:
    def call(model: str, *loras: str, more: tuple[str, ...] = ()) -> tuple[int, str]:
        arguments = ["--model", str(root / model), "--out", str(tmp_path / "out")]
        arguments += ["--prompt", "a red apple", "--seed", "7", "--device", "cpu", *more]
        for lora in loras:
            arguments += ["--lora", str(root / lora)]
        code = run_main(lambda: sample.main(arguments))
        return code, capsys.readouterr().err

    return call


def pixels_of(folder: Path) -> list[bytes]:
    return [open_image(path).tobytes() for path in sorted((folder / "out").iterdir())]


@pytest.mark.parametrize("kind", ["sdxl", "sd"])
def test_both_namings_make_the_same_picture_every_time(
    kind: str, run: Run, root: Path, tmp_path: Path
) -> None:
    peft, kohya = f"{kind}-peft.safetensors", f"{kind}-kohya.safetensors"
    for loras in ([], [peft], [kohya], [f"{kohya}:1.0"], [f"{peft}:0"], [f"{kohya}:0.5"]):
        assert run(kind, *loras) == (0, "")
    plain, one, same, again, none, half = pixels_of(tmp_path)
    assert one == same == again and none == plain and len({plain, one, half}) == 3
    paths = sorted((tmp_path / "out").iterdir())
    assert paths[2].read_bytes() == paths[3].read_bytes()
    assert "loras" not in json.loads(read_png_metadata(paths[0])["settings"])
    told = json.loads(read_png_metadata(paths[5])["settings"])["loras"]
    assert told == [{"file": kohya, "hash": file_hash(root / kohya), "weight": 0.5}]


def test_several_add_up_wherever_the_weights_are(run: Run, tmp_path: Path) -> None:
    halves = ["sdxl-peft.safetensors:0.5", "sdxl-kohya.safetensors:0.5"]
    assert run("sdxl", "sdxl-peft.safetensors")[0] == 0
    assert run("sdxl", *halves)[0] == 0
    assert run("sdxl", *halves, more=("--offload", "sequential"))[0] == 0
    one, two, offloaded = (torch.tensor(list(each)).float() for each in pixels_of(tmp_path))
    assert (one - two).abs().max() <= 1  # of 255
    assert torch.equal(two, offloaded)


def test_merged_weights_are_the_sum_rounded_once_in_the_format_that_is_run(root: Path) -> None:
    choice = LoraChoice(root / "sdxl-kohya.safetensors", 0.7)
    dtypes = UNetDtypes(torch.bfloat16, torch.float32, torch.bfloat16)
    cpu = torch.device("cpu")
    plain = open_unet_source(root / "sdxl").load_as_stored().updatable
    merged = open_unet_source(root / "sdxl", None, [choice]).load(cpu, dtypes).updatable
    updates = lora_of(tiny_model("sdxl")[1], ("to_q", "to_v", "conv1"))
    for part, network in merged.items():
        before = plain[part].state_dict()
        for name, value in network.state_dict().items():
            expected = before[name]
            update = updates[part].get(name.removesuffix(".weight"))
            if update is not None:
                expected = expected + 0.7 * update.delta()
            assert value.dtype == torch.bfloat16 and torch.equal(value, expected.bfloat16()), name


def test_the_class_takes_loras_as_the_command_does(root: Path, run: Run, tmp_path: Path) -> None:
    assert run("sd", "sd-peft.safetensors:0.5")[0] == 0
    loras = [LoraChoice(root / "sd-peft.safetensors", 0.5)]
    pipeline = UNetPipeline.from_pretrained(root / "sd", loras=loras, device="cpu")
    [image] = pipeline("a red apple", UNetSettings(seed=7)).pictures
    assert image.tobytes() == pixels_of(tmp_path)[0]


def test_a_distilled_loras_name_picks_its_steps(
    run: Run, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = unet_published.lora_advice(UNetConfig.sdxl(), "lightning_4step")
    assert advice is not None
    monkeypatch.setattr(unet_published, "LORA_ADVICE", (replace(advice, shape=SDXL),))
    name = "sdxl_lightning_4step_lora.safetensors"
    shutil.copy(root / "sdxl-peft.safetensors", root / name)
    code, err = run("sdxl", name)
    told = "by its name the LoRA is SDXL-Lightning of 4 steps: euler, 4 steps, guidance 1"
    assert code == 0 and err == f"notice: {told}\n"
    assert run("sdxl", name, more=("--steps", "2"))[0] == 0
    assert run("sdxl", f"{name}:0") == (0, "")
    found = []
    for path in sorted((tmp_path / "out").iterdir()):
        sampling = json.loads(read_png_metadata(path)["settings"])["unet"]
        found.append((sampling["steps"], sampling["guidance"], sampling["spacing"]))
    assert found == [(4, 1.0, "trailing"), (2, 1.0, "trailing"), (3, 3.5, "trailing")]


def test_a_colon_may_be_a_part_of_the_name(tmp_path: Path) -> None:
    odd = tmp_path / "a:0.5"
    odd.write_bytes(b"")
    assert lora_and_weight(str(odd)) == (odd, 1.0)
    assert lora_and_weight(f"{odd}:0.25") == (odd, 0.25)
    assert lora_and_weight("x.safetensors") == (Path("x.safetensors"), 1.0)
    assert lora_and_weight("C:x") == (Path("C:x"), 1.0)


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ("sdxl", "sd-kohya.safetensors", "sd-kohya.*: a LoRA for another model, made for a U-Net "),
        ("sd", "sdxl-peft.safetensors", "whose text is 40 wide; this one's is 24 wide: only "),
        ("sdxl", "nowhere.safetensors:0.4", "nowhere.safetensors: no such file or folder"),
        ("sdxl", "sdxl-peft.safetensors:much", "'much' is no weight; write a number"),
        ("sdxl", "sdxl-peft.safetensors:inf", "the weight of a LoRA is inf"),
        ("sdxl", "sdxl", "sdxl: no weights in it"),
        ("sdxl", "sdxl/vae/diffusion_pytorch_model.safetensors", "none of its .* is a LoRA's"),
        ("sdxl", "sdxl-peft.safetensors:1e40", "not finite in float32; take a smaller weight"),
    ],
)
def test_slips_are_one_line_and_exit_code_2(model: str, lora: str, message: str, run: Run) -> None:
    code, err = run(model, lora)
    assert code == 2 and len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_a_cascade_has_no_use_for_one(tiny_model: Path, capsys: Any, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_model), "--prompt", "x", "--lora", "x", "--out", str(tmp_path)]
    assert run_main(lambda: sample.main(arguments)) == 2
    assert "--lora: " in (err := capsys.readouterr().err) and "is a cascade; leave it out" in err


def test_a_lora_of_one_layer_too_many_is_refused_before_a_weight_changes(
    root: Path, tmp_path: Path
) -> None:
    tensors = load_file(root / "sdxl-peft.safetensors")
    tensors |= {"unet.x.lora_A.weight": torch.ones(1, 2), "unet.x.lora_B.weight": torch.ones(2, 1)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"are here, unet.x.lora_A.weight the first that is not"):
        UNetPipeline.from_pretrained(root / "sdxl", loras=[LoraChoice(path)], device="cpu")
