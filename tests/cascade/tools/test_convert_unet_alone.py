"""``convert`` and ``convert-lora`` of a U-Net without the rest of its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cascade.adapters.lora_write import write_lora
from cascade.checkpoints.files import read_metadata, save_network
from cascade.errors import run_main
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY
from cascade.tools.__main__ import main
from sample import main as sample
from tests.lora_toys import lora_of
from tests.unet_models import tiny_model

TRAINED = {UNET_DIFFUSION_KEY: json.dumps({"prediction": "v"}), "train_steps": "7"}


def saved(folder: Path) -> Path:
    """A U-Net as training leaves it."""
    folder.mkdir()
    save_network(folder / "unet.safetensors", tiny_model("sdxl")[1].unet, metadata=TRAINED)
    return folder / "unet.safetensors"


def convert(model: Path, to: str, out: Path) -> int:
    told = ["convert", str(model), "--to", to, "--out", str(out), "--dtype", "fp32"]
    return run_main(lambda: main(told))


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_unet_goes_to_diffusers_and_back(whole_folder: bool, tmp_path: Path, capsys: Any) -> None:
    path = saved(tmp_path / "run")
    there, original, back = (tmp_path / name for name in ("diffusers", "original", "back"))
    assert convert(path.parent if whole_folder else path, "diffusers", there) == 0
    out, err = capsys.readouterr()
    assert str(there / "config.json") in out.splitlines()
    assert "config.json has 128 latent cells per side" in err
    assert convert(there, "original", original) == 0
    assert convert(original / "unet.safetensors", "ours", back) == 0
    before = load_file(path)
    between = load_file(original / "unet.safetensors")
    assert "input_blocks.0.0.weight" in between
    for folder in (there, back):
        file = folder / "diffusion_pytorch_model.safetensors"
        after = load_file(file)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert TRAINED.items() <= read_metadata(file).items()


def test_diffusers_opens_what_is_written(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    path = saved(tmp_path / "run")
    assert convert(path, "diffusers", tmp_path / "out") == 0
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "out").state_dict()
    ours = load_file(path)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_lora_of_a_unet_alone_gets_other_names(tmp_path: Path) -> None:
    model = saved(tmp_path / "run")
    parts = tiny_model("sdxl")[1]
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    write_lora(first, {"unet": lora_of(parts)["unet"]}, "peft", unet=parts.unet.config)
    for before, to, after in ((first, "kohya", second), (second, "peft", third)):
        told = ["convert-lora", str(before), "--to", to, "--out", str(after), "--model", str(model)]
        assert run_main(lambda told=told: main(told)) == 0
    was, now = load_file(first), load_file(third)
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) for name in was)


def test_another_network_alone_is_refused(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "autoencoder.safetensors"
    save_network(path, tiny_model("sdxl")[1].autoencoder)
    assert convert(path, "diffusers", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sample_names_what_a_folder_of_one_network_holds(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "vae").mkdir()
    save_network(tmp_path / "vae" / "it.safetensors", tiny_model("sdxl")[1].autoencoder)
    words = ["--model", str(tmp_path / "vae"), "--prompt", "a hat"]
    assert run_main(lambda: sample([*words, "--out", str(tmp_path / "out")])) == 2
    assert "no model, but KL autoencoder alone" in capsys.readouterr().err
