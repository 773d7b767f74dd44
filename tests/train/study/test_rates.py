from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cascade.errors import UserError, run_main
from train.study.__main__ import main
from train.study.rates import load_compression

TRUNK = {"kind": "fused", "expand": 1, "kernel": 3, "stride": 2, "out_channels": 8, "layers": 1}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, object]:
    for stride in (4, 8):
        stages = [TRUNK] * (1 if stride == 4 else 2)
        training = {"data": {"batch_size": 2}, "compressor": {"stages": stages}}
        (tmp_path / f"b{stride}.yaml").write_text(yaml.safe_dump(training))
    arm = {
        "description": "at {fraction}, {cell} px a cell, {extra}",
        "steps": [
            {
                "name": "b",
                "train": "stage_b",
                "config": f"{tmp_path}/b{{stride}}.yaml",
                "share": 0.5,
                "set": {
                    "compressor.input_fraction": "{fraction}",
                    "compressor.latent_channels": "{channels}",
                },
            },
            {
                "name": "c",
                "train": "stage_c",
                "config": "c.yaml",
                "share": 0.5,
                "set": {"compressor": "{here}/b/compressor.safetensors"},
            },
        ],
        "model": {
            "command": "train.assemble",
            "config": "m.yaml",
            "set": {"stage_c": "{weights}/c", "spec.pixels_per_stage_c_cell": "{cell}"},
        },
    }
    return {
        "name": "s",
        "budget": {"unit": "samples", "amounts": [8]},
        "judge": {"protocol": "p.yaml"},
        "image_size": 32,
        "strides": [8, 4],
        "rates": [
            {"grid": 3, "values": {"extra": 1}},
            {"grid": 6, "channels": 4, "values": {"extra": 2}},
        ],
        "reconstruction": {"protocol": "r.yaml", "real": "x"},
        "arm": arm,
    }


def load(values: dict[str, object], tmp_path: Path):  # type: ignore[no-untyped-def]
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_compression(path)


def test_each_rate_becomes_an_arm_with_its_stride_and_its_resize(values, tmp_path):
    config = load(values, tmp_path)
    coarse, fine = config.study.arms
    assert (coarse.name, fine.name) == ("3x3x16", "6x6x4")
    # The largest stride that reaches the grid, and the resize does the rest.
    assert Path(str(coarse.steps[0].config)).name == "b8.yaml"
    assert Path(str(fine.steps[0].config)).name == "b4.yaml"
    assert coarse.steps[0].set["compressor.input_fraction"] == 3 * 8 / 32
    assert fine.steps[0].set["compressor.input_fraction"] == 6 * 4 / 32
    assert fine.steps[0].set["compressor.latent_channels"] == 4
    assert coarse.model.set["spec.pixels_per_stage_c_cell"] == pytest.approx(32 / 3)
    # What is the study's stays for it to fill in.
    assert coarse.steps[1].set["compressor"] == "{here}/b/compressor.safetensors"
    assert fine.description == f"at 0.75, {32 / 6} px a cell, 2"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": [{"grid": 16}, {"grid": 4}]}, "with stride 4, the least of strides, 8x8 is the"),
        ({"rates": [{"grid": 4}, {"grid": 4}]}, "4x4x16 is there twice"),
        ({"rates": [{"grid": 4}]}, "two or more make a curve"),
        ({"rates": [{"grid": 0}, {"grid": 4}]}, "grid and channels must be at least 1"),
        ({"rates": [{"grid": 4, "values": {"a": 1}}, {"grid": 3}]}, "some give values.a and"),
        ({"rates": [{"grid": 4}, {"grid": 3}]}, "arm.description: names {extra}, which no rate"),
        ({"rates": [{"grid": 4, "values": {"here": 1}}, {"grid": 3}]}, "the study's own name"),
        ({"rates": [{"grd": 4}, {"grid": 3}]}, "did you mean 'grid'"),
        ({"ratse": []}, "ratse: unknown key; did you mean 'rates'"),
        ({"arm": None}, "arm: missing"),
        ({"budget": {"unit": "samples", "amounts": [8, 16]}}, "has one budget"),
        ({"strides": []}, "a compressor's stride is at least 2"),
    ],
    ids=str,
)
def test_rates_that_can_not_be_are_refused_in_one_line(values, changes, message, tmp_path, capsys):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    assert run_main(lambda: main(["compression", "--config", str(path)])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_compressor_of_another_size_than_its_rate_is_refused_before_anything_is_trained(
    values, tmp_path
):
    del values["arm"]["steps"][0]["set"]["compressor.input_fraction"]  # type: ignore[index]
    values["rates"] = [{"grid": g, "values": {"extra": 1}} for g in (2, 3)]
    with pytest.raises(UserError, match="makes latents of 3x3x16 of pictures of 32 px, and the"):
        load(values, tmp_path)
