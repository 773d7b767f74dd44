"""``convert-lora``: other names, the same numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.adapters.lora_write import write_lora
from cascade.checkpoints.files import on_meta, read_metadata
from cascade.errors import run_main
from cascade.tools.__main__ import main
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet
from tests.lora_toys import lora_of, updates_of
from tests.unet_models import save_tiny, tiny_model


def convert(file: Path, to: str, out: Path, *more: str) -> int:
    return run_main(lambda: main(["convert-lora", str(file), "--to", to, "--out", str(out), *more]))


def test_a_models_lora_goes_there_and_back(tmp_path: Path, capsys: Any) -> None:
    model = save_tiny(tmp_path / "model", "sdxl")
    parts = tiny_model("sdxl")[1]
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    said = {"train_steps": "7"}
    write_lora(first, lora_of(parts), "peft", unet=parts.unet.config, metadata=said)
    assert convert(first, "kohya", second, "--model", str(model)) == 0
    assert convert(second, "peft", third, "--model", str(model)) == 0
    assert capsys.readouterr().out.splitlines() == [str(second), str(third)]
    before, between, after = (load_file(path) for path in (first, second, third))
    assert all(name.startswith(("lora_unet_", "lora_te1_", "lora_te2_")) for name in between)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_metadata(first) == read_metadata(third)
    assert said.items() <= read_metadata(second).items()


@pytest.mark.parametrize("name", ["sdxl", "bk_tiny"])
def test_published_models_are_told_by_the_layers(name: str, tmp_path: Path) -> None:
    config = getattr(UNetConfig, name)()
    with on_meta():
        unet = UNet(config)
    updates = updates_of(unet, ("attn2.to_k", "upsamplers.0.conv"), rank=1)
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    write_lora(first, {"unet": updates}, "kohya", unet=config)
    assert convert(first, "peft", second) == convert(second, "kohya", third) == 0
    assert {name.split(".")[0] for name in load_file(second)} == {"unet"}
    before, after = load_file(first), load_file(third)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_students_layers_that_are_its_teachers_too_need_the_model(
    tmp_path: Path, capsys: Any
) -> None:
    config = UNetConfig.koala_700m()
    with on_meta():
        unet = UNet(config)
    updates = updates_of(unet, ("attn2.to_k",), rank=1)
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_lora(first, {"unet": updates}, "kohya", unet=config)
    assert convert(first, "peft", second) == 0
    assert {name.split(".lora_")[0].removeprefix("unet.") for name in load_file(second)} == set(
        updates
    )
    assert convert(second, "kohya", tmp_path / "3.safetensors") == 2
    err = capsys.readouterr().err
    assert "fits several published U-Nets" in err and "--model" in err


def test_slips_are_one_line(tmp_path: Path, capsys: Any) -> None:
    path, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    layer = "unet.mid_block.attentions.0.proj_in"
    down, up = torch.ones(1, 3), torch.ones(3, 1)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    for arguments, message in (
        ((path, "kohya", out), "fits no published U-Net; name its model with --model"),
        ((path, "kohya", path), "is there already; name another file"),
        ((path, "kohya", tmp_path), "name a .safetensors file to write"),
        ((out, "kohya", out), "no such file"),
        ((path, "lycoris", out), "invalid choice: 'lycoris'"),
    ):
        assert convert(*arguments) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and re.search(message, err), err
    assert not out.exists()
