from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cascade.checkpoints.written_tensors import save_tensors

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
WORDS = {
    **{f"key {number}": "x" * number for number in range(40)},
    "awkward": 'quotes " and \\ and \n\t\r\b\f\x01\x1f\x7f, é, 猫, 🐈, \u2028',
    "": "",
}


def test_the_same_content_is_the_same_file(tmp_path: Path):
    files = set()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        save_tensors(TENSORS, path, dict(sorted(WORDS.items(), reverse=bool(number % 2))))
        files.add(path.read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("words", [None, {}, {"format": "pt"}, WORDS])
def test_readers_see_what_safetensors_would_have_written(words, tmp_path: Path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_tensors(TENSORS, ours, words)
    save_file(TENSORS, theirs, metadata=words)
    assert ours.stat().st_size == theirs.stat().st_size
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        assert one.metadata() == other.metadata()
    read = load_file(ours)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
