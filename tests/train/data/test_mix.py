"""Rows of several sets by weight: as many as is said, and the same after any stop."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.errors import UserError
from tests.train.data.conftest import colored, encoded, write_members, write_set
from train.data.__main__ import main as check_main
from train.data.cached import CachedBatch
from train.data.config import BucketConfig, DataConfig, FilterConfig, MixConfig
from train.data.latents import PrecomputeOptions, precompute_shards
from train.data.mix import MixedRows, Mixture, in_places
from train.data.open import open_data
from train.data.paired import joined
from train.encode import FrozenPaths


def named_set(folder: Path, name: str, count: int) -> str:
    """A shard of square pictures whose captions tell the set."""
    folder.mkdir(parents=True, exist_ok=True)
    members = []
    for number in range(count):
        members += [
            (f"{number:04d}.png", encoded(colored(number, (32, 32)))),
            (f"{number:04d}.txt", f"{name} {number}".encode()),
            (f"{number:04d}.json", json.dumps({"aesthetic": number % 10}).encode()),
        ]
    write_members(folder / f"{name}.tar", members)
    return f"{folder}/{name}.tar"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    return named_set(folder, "real", 40), named_set(folder, "made", 30)


def mixed(sets: tuple[str, str], mode: str, weight: float = 3.0, **values: object) -> DataConfig:
    real, made = sets
    plain: dict[str, object] = {"mode": mode, "batch_size": 6, "seed": 4}
    if mode != "memory":
        plain["size"] = 32
    mix = (MixConfig("teacher", made, weight),)
    return DataConfig(**{"shards": real, "mix": mix, **plain, **values})  # type: ignore[arg-type]


def take(data, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list[CachedBatch]:
    return list(itertools.islice(data.loader_from(start, rank, world), count))


def owners(batches: list[CachedBatch]) -> Counter[str]:
    return Counter(caption.split()[0] for batch in batches for caption in batch.captions)


def assert_same(ours: list[CachedBatch], theirs: list[CachedBatch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.captions, one.keys, one.drawn) == (other.captions, other.keys, other.drawn)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.groups, other.groups)


MODES = pytest.mark.parametrize("mode", ["memory", "exact", "resampled"])


@MODES
@pytest.mark.parametrize("weight", [3.0, 0.1])
def test_rows_come_from_each_set_by_its_weight(sets, mode, weight):
    batches = take(open_data(mixed(sets, mode, weight)), 100)
    found = owners(batches)
    expected = 600 * weight / (1 + weight)
    assert abs(found["made"] - expected) < 25 and found.total() == 600
    # A set's share of a step is its weight to less than a row, and is what the batch says.
    for batch in batches:
        mine = owners([batch])
        assert abs(mine["made"] - expected / 100) < 1
        assert batch.drawn == {"own": mine["real"], "teacher": mine["made"]}
    # All samples of both come, and captions belong to their pictures.
    if weight == 3.0 and mode != "resampled":  # once an epoch of its own
        seen = Counter(caption for batch in batches for caption in batch.captions)
        assert len(seen) == 70
        for name, size in (("real", 40), ("made", 30)):
            times = {count for caption, count in seen.items() if caption.startswith(name)}
            assert times <= {found[name] // size, found[name] // size + 1}
    for batch in batches[:10]:
        for caption, pixels in zip(batch.captions, batch.pixels, strict=True):
            assert round(float(pixels[0, 0, 0]) * 255) == int(caption.split()[1])


@MODES
def test_a_mixture_resumed_anywhere_goes_on_as_if_it_had_not_stopped(sets, mode):
    workers = {"workers": 2} if mode != "memory" else {}
    config = mixed(sets, mode, **workers)
    whole = take(open_data(config), 40)
    for start in (1, 8, 33):
        assert_same(whole[start : start + 4], take(open_data(config), 4, start))


@pytest.mark.parametrize("mode", ["memory", "exact"])
def test_any_split_into_ranks_sees_the_same_rows(sets, mode):
    whole = take(open_data(mixed(sets, mode)), 12)
    halves = open_data(mixed(sets, mode, batch_size=3))
    for rank in range(2):
        for one, half in zip(whole, take(halves, 12, 0, rank, 2), strict=True):
            assert half.captions == one.captions[3 * rank : 3 * rank + 3]
            assert half.drawn == one.drawn


def test_ranks_of_a_stream_have_one_shape_a_step_and_the_shares_over_all(tmp_path):
    real = write_set(tmp_path / "real", [20, 22])
    made = named_set(tmp_path, "made", 30)
    config = mixed((real, made), "resampled", 1.0, buckets=BucketConfig(step=8), batch_size=4)
    ranks = [take(open_data(config), 30, 0, rank, 2) for rank in range(2)]
    shapes = set()
    for one, other in zip(*ranks, strict=True):
        assert one.pixels.shape == other.pixels.shape and len(one) == 4
        assert one.drawn == other.drawn == {"own": 4, "teacher": 4}
        shapes.add(one.pixels.shape[-2:])
        assert owners([one, other])["made"] == 4
    assert len(shapes) > 1


def test_a_block_of_a_stream_repeats_no_sample_of_a_set(sets):
    batches = take(open_data(mixed(sets, "resampled", 1.0)), 10)
    seen = Counter(caption for batch in batches for caption in batch.captions)
    assert seen.most_common(1)[0][1] == 1 and len(seen) == 60


def test_a_set_of_a_small_share_is_not_counted_from_the_start_at_every_step(sets, monkeypatch):
    asked: list[int] = []
    count = MixedRows.count
    monkeypatch.setattr(
        MixedRows, "count", lambda self, step: asked.append(step) or count(self, step)
    )
    batches = take(open_data(mixed(sets, "resampled", 0.01)), 100)
    assert 1 <= owners(batches)["made"] <= 12
    # Each step once as itself and once as one that came before, of each of the sets.
    assert len(asked) <= 4 * 110


def test_a_set_may_have_filters_of_its_own(sets):
    real, made = sets
    own = FilterConfig(min_scores={"aesthetic": 8})
    mix = (MixConfig("teacher", made, 1.0, filters=FilterConfig(min_scores={"aesthetic": 2})),)
    config = DataConfig(real, 4, mode="resampled", size=32, filters=own, mix=mix)
    for batch in take(open_data(config), 30):
        for caption in batch.captions:
            name, number = caption.split()
            assert int(number) % 10 >= (8 if name == "real" else 2)


def test_systematic_rows_are_the_same_on_all_ranks_and_change_with_the_step():
    mixture = Mixture(("own", "a", "b"), (1.0, 0.5, 2.5), 5, seed=1)
    counts = np.zeros(3)
    for step in range(400):
        rows = mixture.sources(step, 2)
        counts += np.bincount(rows, minlength=3)
        assert np.array_equal(rows[5:], mixture.of_rank(step, 1, 2))
    assert np.allclose(counts / 4000, mixture.shares, atol=0.01)
    assert not np.array_equal(mixture.sources(0, 2), mixture.sources(1, 2))


def test_equal_captions_of_two_sets_are_one_group_in_memory(tmp_path):
    real = named_set(tmp_path / "a", "same", 8)
    made = named_set(tmp_path / "b", "same", 8)
    batches = take(open_data(mixed((real, made), "memory", 1.0)), 20)
    groups: dict[str, set[int]] = {}
    for batch in batches:
        for caption, group in zip(batch.captions, batch.groups.tolist(), strict=True):
            groups.setdefault(caption, set()).add(group)
    assert all(len(found) == 1 for found in groups.values())
    assert len({next(iter(found)) for found in groups.values()}) == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mode": "exact", "size": 32, "buckets": BucketConfig(step=8)},
            "mix and buckets are set and mode is exact",
        ),
        ({"mix": (MixConfig("own", "x", 1.0),)}, "the name 'own' twice"),
        ({"mix": (MixConfig("a", "x", 1.0), MixConfig("a", "y", 1.0))}, "the name 'a' twice"),
        (
            {"mode": "resampled", "size": 32, "mix": (MixConfig("a", "x", 1.0, folder="y"),)},
            "folder is set but mode is resampled",
        ),
    ],
)
def test_mixtures_that_can_not_be_are_refused(values, message):
    plain = {"shards": "x", "batch_size": 2, "mix": (MixConfig("a", "x", 1.0),)}
    with pytest.raises(ValueError, match=message):
        DataConfig(**{**plain, **values})
    with pytest.raises(ValueError, match="weight is 0"):
        MixConfig("a", "x", 0.0)


def test_caches_of_two_sets_are_mixed_and_must_have_the_same_shapes(sets, tiny_model, tmp_path):
    frozen = FrozenPaths(stage_a=str(tiny_model))

    def cache(shards: str, name: str, buckets: BucketConfig | None = None) -> str:
        data = DataConfig(shards, 8, mode="resampled", size=32, buckets=buckets)
        precompute_shards(PrecomputeOptions(data, tmp_path / name, frozen))
        return f"{tmp_path}/{name}/*.tar"

    caches = cache(sets[0], "real"), cache(sets[1], "made")
    for mode in ("resampled", "exact"):
        config = mixed(caches, mode, batch_size=4)
        whole = take(open_data(config, frozen, pixels=False), 12)
        assert owners(whole) == {"real": 12, "made": 36}
        again = take(open_data(config, frozen, pixels=False), 4, 5)
        for one, other in zip(whole[5:9], again, strict=True):
            assert one.keys == other.keys and one.pixels is None
            assert torch.equal(one.stage_a_latents, other.stage_a_latents)
    with pytest.raises(UserError, match="all of its sets hold pictures, or all hold latents"):
        open_data(mixed((caches[0], sets[1]), "resampled"), frozen, pixels=False)
    step = BucketConfig(step=8)
    wide = cache(write_set(tmp_path / "wide", [24]), "shapes", step)
    square = cache(sets[1], "square", step)
    with pytest.raises(UserError, match=r"data.mix: teacher has no latents of \d+x\d+"):
        mix = mixed((wide, square), "resampled", buckets=step, batch_size=2)
        open_data(mix, frozen, pixels=False)


def test_what_both_of_two_paired_streams_left_out_is_added():
    def batch(lost: dict[str, int] | None) -> CachedBatch:
        return CachedBatch(["x"], torch.zeros(1), pixels=torch.zeros(1, 3, 8, 8), lost=lost)

    both = joined(batch({"broken": 1, "filtered": 2}), batch({"broken": 4}), 1.0)
    assert both.lost == {"broken": 5, "filtered": 2}
    assert joined(batch(None), batch(None), 1.0).lost is None


def test_an_exact_mixture_may_have_a_set_smaller_than_a_step_and_tells_what_is_left_out(
    sets, tmp_path, capsys
):
    few = named_set(tmp_path, "few", 2)
    config = mixed((sets[0], few), "exact", 1.0, filters=FilterConfig(min_scores={"aesthetic": 1}))
    data = open_data(config)
    assert data.lost == {"filtered": 4 + 1}
    batches = take(data, 13)
    seen = Counter(caption for batch in batches for caption in batch.captions)
    assert seen["few 1"] == 39 and seen["few 0"] == 0
    assert sorted(seen[f"real {n}"] for n in range(40) if n % 10) == [1] * 33 + [2] * 3
    options = ["--batch_size", "4", "--mode", "exact", "--size", "32", "--samples", "0"]
    more = ["--mix", json.dumps([{"name": "few", "shards": few, "weight": 1}])]
    assert check_main(["check", sets[0], *options, *more]) == 0
    assert "steps an epoch" not in capsys.readouterr().out


def test_a_mixture_tells_of_what_each_of_its_sets_left_out(sets):
    real, made = sets
    own = FilterConfig(min_scores={"aesthetic": 8})
    mix = (MixConfig("teacher", made, 1.0, filters=FilterConfig(min_scores={"aesthetic": 2})),)
    config = DataConfig(real, 4, mode="resampled", size=32, filters=own, mix=mix)
    [first, *_] = take(open_data(config), 2)
    # Of 40 pictures eight in ten are below 8, of 30 two in ten below 2.
    assert len({caption.split()[0] for caption in first.captions}) == 2
    assert first.lost == {"filtered": 32 + 6, "broken": 0}


def test_check_looks_at_every_set(sets, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    mix = [{"name": "teacher", "shards": sets[1], "weight": 2, "folder": "of a cache"}]
    data = {"shards": sets[0], "batch_size": 2, "folder": "of a cache", "mix": mix}
    path.write_text(json.dumps({"data": data}))
    assert check_main(["check", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "set teacher" in shown and "40" in shown and "30" in shown


def test_sets_of_several_sizes_and_a_set_that_is_not_there_are_one_line(sets, tmp_path):
    small = write_set(tmp_path / "small", [6], [(16, 16)])
    with pytest.raises(UserError, match=r"data.mix: pictures of 2 sizes"):
        open_data(mixed((sets[0], small), "memory"))
    with pytest.raises(UserError, match="no shard matches"):
        open_data(mixed((sets[0], "/none/*.tar"), "resampled"))
    one = CachedBatch(["a"], torch.zeros(1), stage_c_latents=torch.zeros(1, 2))
    with pytest.raises(UserError, match="stage_c_latents of its sets is of several sizes or not"):
        in_places([one, CachedBatch(["b"], torch.zeros(1))], np.array([0, 1]))
