"""Pages are counted, not timed: the system counts each page that it gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade.cpu_memory import VARIABLE, tune_cpu_memory

ROOT = Path(__file__).parents[2]
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_COUNT = """
import resource
{before}
import torch
from stages.layers import ResBlock
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block, x = ResBlock(96), torch.randn(1, 96, 160, 160)
with torch.inference_mode():
    block(x)
    first = faults()
    block(x)
    print(faults() - first)
"""
_ASK = "from cascade.cpu_memory import tune_cpu_memory\ntune_cpu_memory()"


def faults_of_a_block(before: str) -> int:
    command = [sys.executable, "-c", _COUNT.format(before=before)]
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    found = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(
    not _SETTING.is_file() or "[madvise]" not in _SETTING.read_text(),
    reason="this system gives huge pages to all, or to none",
)
def test_a_block_s_large_tensors_are_given_in_far_fewer_pages():
    plain, asked = faults_of_a_block(""), faults_of_a_block(_ASK)
    assert plain > 20_000 and asked < plain / 4


def test_sampling_asks_before_it_makes_a_tensor():
    """The programs' own modules make none before ``main``."""
    for program in ("sample", "cascade.evaluate.__main__", "train.distill.__main__"):
        script = (
            "import torch\nfrom torch.utils._python_dispatch import TorchDispatchMode\n"
            "class Refuse(TorchDispatchMode):\n"
            "    def __torch_dispatch__(self, op, types, args=(), kwargs=None):\n"
            "        raise SystemExit(f'a tensor was made: {op}')\n"
            f"with Refuse():\n    import {program}\n"
        )
        command = [sys.executable, "-c", script]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    tune_cpu_memory()
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    tune_cpu_memory()
    assert os.environ[VARIABLE] == "1"
