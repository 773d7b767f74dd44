"""The mean of two exported files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade.checkpoints.files import file_hash, load_network, read_metadata, save_network
from cascade.errors import run_main
from cascade.tools.__main__ import main
from stages.semantic_compressor import SemanticCompressor
from stages.stage_c import StageC, StageCConfig


@pytest.fixture
def other(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny Stage C, fine-tuned: every weight is another."""
    network = load_network(tiny_model / "stage_c.safetensors", expect=StageC)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_network(tmp_path / "other.safetensors", network)
    return tmp_path / "other.safetensors"


def average(*words: object) -> int:
    return run_main(lambda: main(["average", *map(str, words)]))


def test_half_of_each_is_the_mean_and_says_of_what(
    tiny_model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tiny_model / "stage_c.safetensors", tmp_path / "mean.safetensors"
    assert average(first, other, "--weights", 0.5, 0.5, "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    one, two, mean = (load_file(path) for path in (first, other, out))
    assert one.keys() == mean.keys()
    for key, value in mean.items():
        torch.testing.assert_close(value, (one[key] + two[key]) / 2)
    load_network(out, expect=StageC)
    sources = json.loads(read_metadata(out)["averaged_from"])
    assert sources == [
        {"file": str(first), "hash": file_hash(first), "weight": 0.5},
        {"file": str(other), "hash": file_hash(other), "weight": 0.5},
    ]
    assert "train_steps" not in read_metadata(out)
    main(["describe", str(out)])
    assert "an average: " in capsys.readouterr().out


def test_it_is_computed_in_float32_and_written_as_the_first_is(
    tiny_model: Path, other: Path, tmp_path: Path
) -> None:
    half, out = tmp_path / "half.safetensors", tmp_path / "mean.safetensors"
    network = load_network(tiny_model / "stage_c.safetensors", expect=StageC)
    save_network(half, network, dtype=torch.bfloat16)
    assert average(half, other, "--weights", 0.25, 0.75, "--out", out) == 0
    one, two, mean = (load_file(path) for path in (half, other, out))
    for key, value in mean.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (0.25 * one[key].float() + 0.75 * two[key]).bfloat16()), key


def test_counts_of_batch_norms_stay_whole(tiny_model: Path, tmp_path: Path) -> None:
    first, out = tiny_model / "compressor.safetensors", tmp_path / "mean.safetensors"
    assert average(first, first, "--weights", 0.5, 0.5, "--out", out) == 0
    load_network(out, expect=SemanticCompressor)
    assert all(torch.equal(value, load_file(first)[key]) for key, value in load_file(out).items())


def test_a_file_that_is_there_is_not_replaced(
    tiny_model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = other.read_bytes()
    words = (tiny_model / "stage_c.safetensors", other, "--weights", 0.5, 0.5, "--out", other)
    assert average(*words) == 2
    assert "is there already" in capsys.readouterr().err and other.read_bytes() == before


def test_what_is_no_pair_is_one_line_and_writes_nothing(
    tiny_model: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tiny_model / "stage_c.safetensors", tmp_path / "mean.safetensors"
    small = StageC(StageCConfig(**{**_sizes(first), "cond_channels": 8}))
    save_network(tmp_path / "small.safetensors", small)
    state = {f"{key}": value for key, value in load_file(other).items()}
    state["more"] = state.pop("out.bias")
    save_file(state, tmp_path / "renamed.safetensors", metadata=read_metadata(other))
    shutil.copy(first, tmp_path / "cut.safetensors")
    with open(tmp_path / "cut.safetensors", "r+b") as file:
        file.truncate(1000)
    told = {"cascade_diffusion": '{"prediction": "epsilon"}'}
    network = load_network(first, expect=StageC)
    save_network(tmp_path / "epsilon.safetensors", network, metadata={**told, "train_steps": "3"})
    told["cascade_diffusion"] = told["cascade_diffusion"].replace("epsilon", "v")
    save_network(tmp_path / "v.safetensors", network, metadata=told)
    half = ["--weights", 0.5, 0.5]
    for words, message in (
        ([first, tiny_model / "stage_b.safetensors", *half], "a Stage B v3, but"),
        ([first, tmp_path / "small.safetensors", *half], "its cond_channels is 8, but 16 in"),
        ([first, tmp_path / "renamed.safetensors", *half], "lacks out.bias, which"),
        (
            [tmp_path / "epsilon.safetensors", tmp_path / "v.safetensors", *half],
            "its cascade_diffusion is",
        ),
        ([first, tmp_path / "none.safetensors", *half], "no such file"),
        ([first, tmp_path / "cut.safetensors", *half], "cut.safetensors"),
        ([first, other, "--weights", 0.5, 0.6], "they sum to 1.1, not to 1"),
        ([first, other, "--weights", 1.0], "1 for 2 files"),
        ([first, "--weights", 1.0], "at least two files"),
        ([first, other, "--weights", "nan", 0.5], "not to 1"),
    ):
        assert average(*words, "--out", out) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert not out.exists()
    assert average(first, other, *half, "--out", tmp_path / "none" / "mean.safetensors") == 2


def _sizes(path: Path) -> dict[str, object]:
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in json.loads(read_metadata(path)["cascade_config"]).items()
    }
