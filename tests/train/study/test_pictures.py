from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from train.study.pictures import PictureStore


class FakeModel:
    """Draws plain pictures and counts; can be interrupted after a number of batches."""

    def __init__(self, batches_until_interrupt: int | None = None) -> None:
        self.made: list[str] = []
        self.left = batches_until_interrupt

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.left is not None:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        self.made.extend(prompts)
        levels = [(len(p) * 7 + s) % 256 / 255 for p, s in zip(prompts, seeds, strict=True)]
        return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)

    def reconstruct(self, pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        self.made.extend(str(seed) for seed in seeds)
        return pixels * 0.5


def _store(folder: Path, model: FakeModel) -> PictureStore:
    return PictureStore(folder, model.generate, model.reconstruct, batch_size=2)


PROMPTS = ["a cat", "a dog!", "a dog?", "a bird", "a fish"]


def test_an_interrupted_run_goes_on_and_gives_what_a_whole_run_gives(tmp_path: Path):
    whole = _store(tmp_path / "whole", FakeModel()).generated(PROMPTS, range(5))
    with pytest.raises(KeyboardInterrupt):
        _store(tmp_path / "cut", FakeModel(1)).generated(PROMPTS, range(5))
    model = FakeModel()
    resumed = _store(tmp_path / "cut", model).generated(PROMPTS, range(5))
    assert model.made == PROMPTS[2:]
    assert torch.equal(resumed, whole)


def test_a_picture_is_made_once_for_a_prompt_and_seed(tmp_path: Path):
    model = FakeModel()
    store = _store(tmp_path, model)
    first = store.generated(["a cat", "a cat", "a cat"], [0, 0, 1])
    store.generated(["a cat"], [1])
    assert model.made == ["a cat", "a cat"]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_files_say_what_they_hold(tmp_path: Path):
    _store(tmp_path, FakeModel()).generated(["a dog!", "a dog?"], [3, 3])
    names = sorted(path.name for path in (tmp_path / "generated").iterdir())
    assert len(names) == 2
    assert all(name.startswith("a-dog-") and name.endswith("-seed3.png") for name in names)


def test_reconstructions_draw_their_noise_by_key_whatever_the_batch(tmp_path: Path):
    pixels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    together, alone = FakeModel(), FakeModel()
    made = _store(tmp_path / "a", together).reconstructed(["x", "y", "z"], pixels, seed=0)
    _store(tmp_path / "b", alone).reconstructed(["z"], pixels[2:], seed=0)
    assert together.made[2] == alone.made[0]
    torch.testing.assert_close(made, pixels * 0.5, rtol=0, atol=0.5 / 255 + 1e-6)
