"""The loading benchmark runs; what it measures is for full size, and not checked here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.load import FULL, SMALL, report, write_model
from cascade.checkpoints.load import load_any
from cascade.evaluate.process_memory import is_measurable

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not is_measurable(), reason="reads memory from Linux's /proc")


def run(*arguments: str, temporary: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / "load.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@linux
@pytest.mark.slow
@pytest.mark.reference
def test_a_small_run_prints_all_sides_and_their_ratios_and_leaves_nothing(tmp_path: Path) -> None:
    finished = run("--small", "--repeats", "1", temporary=tmp_path)
    assert finished.returncode == 0, finished.stderr
    for start in ("here ", "here, folders ", "diffusers "):
        assert any(line.startswith(start) for line in finished.stdout.splitlines())
    for side in ("here", "here, folders"):
        assert re.search(rf"^ratio {side} / diffusers: seconds \d+\.\d+", finished.stdout, re.M)
    assert "seed 0" in finished.stdout and "commit " in finished.stdout
    assert not list(tmp_path.glob("cascade-load-*"))


@linux
def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    finished = run("--small", "--keep", str(tmp_path), temporary=tmp_path)
    assert finished.returncode == 2
    assert re.fullmatch(r".*: is there already; name a new folder\n", finished.stderr)
    assert not list(tmp_path.iterdir())


def test_the_model_that_it_writes_is_one_of_published_form(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL, seed=1)
    for name, config in SMALL.items():
        [(published, network)] = load_any(tmp_path / "model" / name)
        assert published.layout == "diffusers"
        assert vars(published.config) | {"dropout": None} == vars(config) | {"dropout": None}
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
        [(published, same)] = load_any(tmp_path / "model" / f"{name}.safetensors")
        assert published.layout == "original"
        for key, value in network.state_dict().items():
            assert torch.equal(same.state_dict()[key], value)


def test_the_full_model_is_stable_cascade_lite() -> None:
    assert FULL["prior_lite"].hidden_channels == (1536, 1536)
    assert FULL["decoder_lite"].hidden_channels == (320, 576, 1152, 1152)


def test_the_table_ends_with_the_ratios_to_diffusers() -> None:
    def runs(*seconds: float, memory: float) -> list[dict[str, float]]:
        return [
            {
                "load_s": value / 2,
                "ready_s": value,
                "cpu_s": value,
                "before_bytes": 100e6,
                "peak_bytes": 100e6 + memory,
                "anonymous_bytes": 50e6,
                "mapped_bytes": 50e6,
                "weight_bytes": 200e6,
            }
            for value in seconds
        ]

    figures = {
        "files": runs(1, 2, 9, memory=200e6),
        "folders": runs(4, memory=400e6),
        "diffusers": runs(4, 4, 3, memory=400e6),
    }
    *_, files, folders = report(figures)
    assert files.endswith(
        "here / diffusers: seconds 0.50 (least 0.33, of a processor 0.50), "
        "peak memory 0.60 (above start 0.50)"
    )
    assert "seconds 1.00 (least 1.33" in folders
