from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from cascade.errors import UserError
from train.data.shards import Sample
from train.study.held_out import identity_of, read_folder, read_splits


def _sample(number: int, split: str, **metadata: object) -> Sample:
    return Sample(
        key=f"picture_{number:05d}",
        pixels=torch.full((3, 4, 4), number % 256, dtype=torch.uint8),
        captions=(f"a drawing of thing {number}", f"thing {number}, drawn"),
        metadata={"split": split, "name": f"thing {number}", "style": "flat", **metadata},
    )


def _samples() -> list[Sample]:
    train = [_sample(i, "train") for i in range(400)]
    return train + [_sample(i, "test_combo") for i in range(400, 430)]


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_reading():
    samples = _samples()
    first = read_splits(samples, 10, seed=1)
    random.Random(0).shuffle(samples)
    again = read_splits(samples, 10, seed=1)
    other = read_splits(samples, 10, seed=2)
    for name in ("train", "test_combo"):
        assert first[name].asked == again[name].asked != other[name].asked
        assert first[name].entries == again[name].entries


def test_every_caption_is_kept_but_only_the_pictures_that_are_needed():
    splits = read_splits(_samples(), 10, seed=0)
    train, combo = splits["train"], splits["test_combo"]
    assert len(train.entries) == 400 and len(combo.entries) == 30
    assert set(train.pixels) == {train.entries[i].key for i in train.asked}
    assert len(train.pixels) == 10 and len(combo.pixels) == 30


def test_a_split_with_fewer_pictures_than_prompts_asks_them_all():
    splits = read_splits(_samples(), 100, seed=0)
    assert sorted(splits["test_combo"].asked) == list(range(30))


def test_wordings_of_one_thing_share_their_identity_and_styles_do_not():
    flat, again = _sample(1, "train"), _sample(1, "test")
    line = _sample(1, "train", style="line")
    assert identity_of(flat) == identity_of(again) != identity_of(line)


def test_copies_on_coloured_grounds_are_neither_asked_nor_offered():
    splits = read_splits([*_samples(), _sample(999, "train", background="peach")], 10, seed=0)
    assert "picture_00999" not in {entry.key for entry in splits["train"].entries}


def test_the_caption_is_the_one_that_the_data_names():
    sample = _sample(3, "test", caption="thing 3, drawn")
    assert read_splits([sample], 10, seed=0)["test"].entries[0].caption == "thing 3, drawn"


def test_a_folder_without_shards_says_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"no \.tar shards"):
        list(read_folder(tmp_path))


def test_shards_without_a_known_split_are_refused():
    with pytest.raises(UserError, match="test_combo"):
        read_splits([_sample(0, "validation")], 10, seed=0)


def test_pictures_of_different_sizes_are_refused():
    odd = Sample("odd", torch.zeros(3, 5, 5, dtype=torch.uint8), ("odd",), {"split": "test"})
    with pytest.raises(UserError, match="different sizes"):
        read_splits([_sample(0, "test"), odd], 10, seed=0)
