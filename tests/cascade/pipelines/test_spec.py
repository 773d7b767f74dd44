from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cascade.errors import UserError
from cascade.pipelines.spec import CascadeSpec, StageSampling, load_spec, model_hash, save_spec

SPEC = CascadeSpec(name="demo", image_size=128, pixels_per_stage_c_cell=128 / 6)


def test_a_spec_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    save_spec(SPEC, tmp_path)
    assert load_spec(tmp_path) == SPEC


@pytest.mark.parametrize(
    ("cell", "size", "expected"),
    [
        (1024 / 24, (1024, 1024), (24, 24)),
        (42.67, (1024, 1536), (24, 36)),
        (21.333, (128, 128), (6, 6)),
        (16.0, (128, 160), (8, 10)),
        (16.0, (130, 8), (9, 1)),
    ],
)
def test_the_stage_c_grid_covers_the_picture(
    cell: float, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert replace(SPEC, pixels_per_stage_c_cell=cell).stage_c_size(size) == expected


def test_an_unknown_key_names_the_file_and_the_nearest_key(tmp_path: Path) -> None:
    save_spec(SPEC, tmp_path)
    path = tmp_path / "model.json"
    path.write_text(path.read_text().replace('"image_size"', '"image_sise"'))
    with pytest.raises(UserError, match=r"model\.json: image_sise.*image_size"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"name": 3}', "[" * 100_000, '{"image_size": ' + "1" * 5000 + "}"],
    ids=["open", "list", "number", "deep", "long"],
)
def test_a_broken_spec_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.json") as caught:
        load_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_spec_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a cascade's model folder"):
        load_spec(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": 100},
        {"min_size": 256},
        {"size_multiple": 0},
        {"pixels_per_stage_c_cell": 0.5},
        {"pixels_per_stage_c_cell": float("nan")},
        {"pixels_per_stage_c_cell": float("inf")},
    ],
)
def test_sizes_that_contradict_each_other_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 10**9},
        {"guidance": 0.5},
        {"guidance": float("inf")},
        {"rescale": 2.0},
        {"shift": 0.0},
        {"shift": float("inf")},
    ],
)
def test_sampling_that_samples_nothing_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(StageSampling(), **change)


def test_the_model_hash_follows_weights_and_settings_only(tmp_path: Path) -> None:
    save_spec(SPEC, tmp_path)
    before = model_hash(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert model_hash(tmp_path) == before
    (tmp_path / "stage_a.safetensors").write_bytes(b"weights")
    assert model_hash(tmp_path) != before
