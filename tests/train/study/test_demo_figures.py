from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.errors import UserError
from cascade.evaluate.clip_scorer import ClipScorer
from train.data.shards import Sample
from train.study.demo_figures import measure_agreement, measure_reconstruction, measure_sizes
from train.study.demo_markdown import agreement_table, reconstruction_table, sizes_table
from train.study.held_out import Split, read_splits
from train.study.pictures import PictureStore

COUNT = 60


class PerfectScorer(ClipScorer):
    """Reads a picture's number from its pixels, and a prompt's from its last word."""

    def __init__(self) -> None:
        pass

    def embed_pictures(self, pixels: Tensor, batch_size: int = 32) -> Tensor:
        numbers = (pixels[:, 0, 0, 0] * 255).round().long()
        return torch.nn.functional.one_hot(numbers, 256).float()

    def embed_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        numbers = torch.tensor([int(prompt.split()[-1]) for prompt in prompts])
        return torch.nn.functional.one_hot(numbers, 256).float()


def _splits() -> dict[str, Split]:
    def sample(number: int) -> Sample:
        pixels = torch.full((3, 16, 16), number, dtype=torch.uint8)
        split = "test_combo" if number < COUNT else "test_concept"
        return Sample(f"key{number}", pixels, (f"thing {number}",), {"split": split})

    return read_splits([sample(i) for i in range(COUNT + 20)], COUNT, seed=0)


def _generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    numbers = torch.tensor([float(prompt.split()[-1]) for prompt in prompts])
    return (numbers / 255).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)


def _store(folder: Path) -> PictureStore:
    return PictureStore(folder, _generate, lambda pixels, seeds: (pixels + 0.1).clamp(0, 1))


def test_reconstruction_has_known_values_for_each_split_and_all(tmp_path: Path):
    rows = measure_reconstruction(_splits(), lambda pixels: pixels, _store(tmp_path), seed=0)
    assert [(row.split, row.num_pictures) for row in rows] == [
        ("test_combo", COUNT),
        ("test_concept", 20),
        ("all", COUNT + 20),
    ]
    for row in rows:
        assert row.stage_a_psnr_db == 100.0 and row.stage_a_ssim == pytest.approx(1.0)
        # 0.1 becomes 25 or 26 of 255 levels in the file.
        assert row.stage_ab_psnr_db == pytest.approx(20.0, abs=0.3)
        assert row.stage_ab_ssim < 1.0
    assert "| **all** | 80 | 100.00 | 1.000 |" in reconstruction_table(rows)


def test_agreement_is_whole_where_pictures_show_their_prompt_and_chance_where_shuffled(
    tmp_path: Path,
):
    split = _splits()["test_combo"]
    rows = measure_agreement(split, PerfectScorer(), _store(tmp_path), 50, seed=0)
    found = {row.pictures: row.agreement for row in rows}
    assert found["real"].top_1.rate == 1.0
    assert found["generated"].top_1.rate == 1.0
    # Every score of a shuffled picture is 0 or a distractor's 1, and ties count as wrong.
    assert found["shuffled"].top_5.rate == 0.0
    assert found["reconstructed (A+B)"].top_1.rate < 1.0
    table = agreement_table(rows)
    assert "| real | 60 | 100.0 % (60) | 94.0 to 100.0 |" in table


def test_agreement_is_the_same_when_measured_again(tmp_path: Path):
    split = _splits()["test_combo"]
    first = measure_agreement(split, PerfectScorer(), _store(tmp_path), 50, seed=3)
    assert first == measure_agreement(split, PerfectScorer(), _store(tmp_path), 50, seed=3)


def test_sizes_and_costs_are_read_from_the_files(tmp_path: Path):
    metadata = {"train_steps": "100", "train_samples": "3200", "train_seconds": "61"}
    tensors = {
        "weight": torch.zeros(10, 100, dtype=torch.bfloat16),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "stage_a.safetensors", metadata=metadata)
    (tmp_path / "text").mkdir()
    save_file({"weight": torch.zeros(500)}, tmp_path / "text" / "model.safetensors")
    first, second = measure_sizes(tmp_path)
    assert (first.file, first.parameters, first.bf16_mb) == ("stage_a.safetensors", 1000, 0.002)
    assert (first.train_steps, first.train_samples, first.train_seconds) == (100, 3200, 61.0)
    assert (second.file, second.parameters) == ("text/model.safetensors", 500)
    assert second.train_samples is None
    table = sizes_table([first, second])
    assert "| **all** | 1,500 |" in table and "not recorded" in table


def test_a_folder_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--model"):
        measure_sizes(tmp_path)
