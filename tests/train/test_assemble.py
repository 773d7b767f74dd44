from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from cascade.errors import run_main
from cascade.pipelines.cascade import CascadePipeline
from train.assemble import NETWORKS, main


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, clip_folder: Path) -> Path:
    values: dict[str, object] = {name: f"{tiny_model}/{name}.safetensors" for name in NETWORKS}
    values |= {"text": str(clip_folder)}
    values |= {"spec": json.loads((tiny_model / "model.json").read_text()), "max_mb": 5}
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def assemble(config: Path, out: Path, *more: str) -> int:
    return run_main(lambda: main(["--config", str(config), "--out", str(out), *more]))


def test_parts_become_a_model_folder_that_generates(config, tmp_path):
    out = tmp_path / "model"
    assert assemble(config, out) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(f"{name}.safetensors" for name in NETWORKS), "model.json", "text"]
    )
    pipeline = CascadePipeline.from_folder(out, device="cpu")
    assert pipeline.spec.name == "tiny"
    assert not list(out.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage_b", "/none.safetensors"], "/none.safetensors: no such weights file"),
        (["--text", "/none"], "/none"),
        (["--max_mb", "0.01"], "MB; max_mb allows 0.01"),
        (["--spec.image_size", "33"], "must be multiples of size_multiple"),
        (["--stage_d", "x"], "did you mean 'stage_"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message, config, tmp_path, capsys):
    out = tmp_path / "model"
    assert assemble(config, out, *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not out.exists()


def test_another_network_s_file_is_refused(config, tmp_path, tiny_model, capsys):
    wrong = str(tiny_model / "stage_b.safetensors")
    assert assemble(config, tmp_path / "model", "--stage_c", wrong) == 2
    assert "holds a StageB, but a StageC is needed" in capsys.readouterr().err


def test_a_missing_text_file_is_refused_before_anything_is_written(
    config, tmp_path, clip_folder, capsys
):
    folder = tmp_path / "text"
    folder.mkdir()
    for path in clip_folder.iterdir():
        if path.name != "preprocessor.json":
            (folder / path.name).write_bytes(path.read_bytes())
    assert assemble(config, tmp_path / "model", "--text", str(folder)) == 2
    assert "preprocessor.json: not there; train it first" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_a_stage_is_sampled_as_it_was_trained_or_not_at_all(config, make_run, tmp_path, capsys):
    """The exported file says what it predicts; a model.json that says otherwise is refused."""
    made = make_run("stage_c", diffusion={"prediction": "flow", "schedule": "linear"})
    assert made.start() == 0
    capsys.readouterr()
    new = ["--stage_c", str(made.out / "stage_c.safetensors")]
    assert assemble(config, tmp_path / "model", *new) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "trained with prediction flow, but spec.stage_c.prediction is" in line
    flow = ["--spec.stage_c.prediction", "flow", "--spec.stage_c.schedule", "linear"]
    assert assemble(config, tmp_path / "model", *new, *flow) == 0
    pipeline = CascadePipeline.from_folder(tmp_path / "model", device="cpu")
    assert pipeline("a red hat", seed=1, progress=False).pictures[0].size == (32, 32)
