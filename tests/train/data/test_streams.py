"""What a stream promises: every sample, one shape a step, and the same batches after any stop."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from cascade.config import from_dict
from cascade.errors import UserError
from train.data.buckets import Buckets
from train.data.cached import CachedBatch
from train.data.config import BucketConfig, DataConfig, FilterConfig
from train.data.open import open_data
from train.data.plan import ExactPlan

from .conftest import colored, encoded, write_members

BUCKETS = BucketConfig(step=8)


def config(shards: str, **values: object) -> DataConfig:
    plain = {"shards": shards, "batch_size": 4, "mode": "exact", "size": 32, "buckets": BUCKETS}
    return DataConfig(**{**plain, **values})


def take(data, count: int, start: int = 0, rank: int = 0, world: int = 1) -> list[CachedBatch]:
    return list(itertools.islice(data.loader_from(start, rank, world), count))


def assert_same(ours: list[CachedBatch], theirs: list[CachedBatch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.crops, other.crops)
        assert torch.equal(one.groups, other.groups)


def steps_of(data, world: int = 1) -> int:
    return data.loader_from(0, 0, world)._loader.dataset.source.plan.steps_per_epoch


@pytest.mark.parametrize(
    ("workers", "world", "buckets"), [(0, 1, None), (0, 2, BUCKETS), (2, 2, BUCKETS)]
)
def test_an_exact_epoch_shows_every_sample_once_over_ranks_and_workers(
    several_shapes, workers, world, buckets
):
    data = open_data(config(several_shapes, workers=workers, buckets=buckets))
    steps = steps_of(data, world)
    for epoch in range(2):
        seen = Counter(
            key
            for rank in range(world)
            for batch in take(data, steps, epoch * steps, rank, world)
            for key in batch.keys
        )
        assert len(seen) == 61
        # 61 is odd: two equal ranks must see one sample twice, and no more.
        assert sum(seen.values()) == 61 + (world - 1)


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize(("workers", "crop"), [(0, "random"), (2, "center")])
def test_a_stream_resumed_anywhere_goes_on_as_if_it_had_not_stopped(
    several_shapes, mode, workers, crop
):
    data = open_data(config(several_shapes, mode=mode, workers=workers, crop=crop))
    whole = take(data, 38)
    for start in (1, 7, 16, 35):  # within an epoch of 16 steps, at its end, in a later one
        assert_same(whole[start : start + 3], take(data, 3, start))
    again = open_data(config(several_shapes, mode=mode, workers=workers, crop=crop))
    assert_same(whole[:3], take(again, 3))


def test_exact_batches_do_not_depend_on_the_number_of_workers(several_shapes):
    streams = [take(open_data(config(several_shapes, workers=n)), 18) for n in (0, 2)]
    assert_same(*streams)


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_have_one_shape_a_step_and_equal_batches_of_their_own(several_shapes, mode, workers):
    data = open_data(config(several_shapes, mode=mode, workers=workers))
    ranks = [take(data, 20, 0, rank, 2) for rank in range(2)]
    shapes = set()
    for one, other in zip(*ranks, strict=True):
        assert one.pixels.shape == other.pixels.shape
        shapes.add(tuple(one.pixels.shape[-2:]))
        if mode == "exact" and len(one) == 4:
            assert not set(one.keys) & set(other.keys)
    assert len(shapes) > 2
    assert [b.keys for b in ranks[0]] != [b.keys for b in ranks[1]]


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_order_changes_with_the_seed_and_the_epoch(several_shapes, mode):
    data = open_data(config(several_shapes, mode=mode))
    other = open_data(config(several_shapes, mode=mode, seed=1))
    first, second = (take(data, 5, start) for start in (0, 32))
    keys = [[b.keys for b in batches] for batches in (first, second, take(other, 5))]
    assert keys[0] != keys[1] and keys[0] != keys[2]


def test_a_resampled_stream_reaches_all_samples_and_no_filtered_one(several_shapes):
    filters = FilterConfig(min_scores={"aesthetic": 3})
    data = open_data(config(several_shapes, mode="resampled", filters=filters, buckets=None))
    keys = {key.split("/")[1] for batch in take(data, 100) for key in batch.keys}
    assert keys == {f"{n:06d}" for n in range(61) if n % 10 >= 3}


def test_all_wordings_are_drawn_and_only_those_that_the_filters_leave(several_shapes):
    data = open_data(config(several_shapes, buckets=None))
    words = Counter(c.split()[0] for batch in take(data, 60) for c in batch.captions)
    assert 0.35 < words["number"] / words.total() < 0.65
    long = FilterConfig(min_caption=12)  # "the 0th picture" has 15 characters
    data = open_data(config(several_shapes, buckets=None, filters=long))
    assert all(c.startswith("the ") for batch in take(data, 30) for c in batch.captions)


def test_crops_and_original_sizes_come_with_the_pixels(several_shapes):
    data = open_data(config(several_shapes, buckets=None, batch_size=1))
    by_key = {batch.keys[0][-6:]: batch for batch in take(data, 61)}
    wide = by_key["000004"]  # 64x40, resized to 51x32, middle kept
    assert wide.original_sizes.tolist() == [[40, 64]]
    assert wide.crops.tolist() == [[0, 9]]
    assert wide.pixels.shape == (1, 3, 32, 32)
    assert wide.pixels[0, :, 5, 5].mul(255).round().tolist() == [4, 0, 28]


def test_shapes_have_about_one_area_and_come_in_both_orders():
    buckets = Buckets.of(1024, BucketConfig(step=64, max_aspect=2.0))
    assert (1024, 1024) in buckets.shapes and (832, 1216) in buckets.shapes
    for height, width in buckets.shapes:
        assert (width, height) in buckets.shapes
        assert height % 64 == width % 64 == 0
        assert abs(height * width / 1024**2 - 1) < 0.08
        assert 0.5 <= height / width <= 2
    ratios = [width / height for height, width in buckets.shapes]
    assert ratios == sorted(ratios)
    sizes = np.array([[500, 500], [832, 1216], [100, 3000]])
    numbers = buckets.of_sizes(sizes[:, 0], sizes[:, 1])
    named = [buckets.name(n) for n in numbers]
    assert named[:2] == ["1024x1024", "1216x832"]
    assert numbers[2] == len(buckets.shapes) - 1


def plan_of(counts: list[int], *, croppable: bool = True, world: int = 2) -> ExactPlan:
    """A set of so many samples of each shape in six shards, mixed."""
    numbers = np.repeat(np.arange(len(counts)), counts)
    numbers = np.random.default_rng(0).permutation(np.append(numbers, [-1] * 10))
    starts = np.linspace(0, len(numbers), 7).astype(int)
    return ExactPlan(numbers, starts, 4, world, seed=3, window=2, croppable=croppable)


@pytest.mark.parametrize("croppable", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("counts", [[40, 3, 25], [1, 1, 60], [24], [23, 23, 23]])
def test_a_plan_deals_every_sample_out_once_in_equal_shares(counts, world, croppable):
    plan = plan_of(counts, croppable=croppable, world=world)
    for epoch in range(2):
        steps = plan.epoch(epoch)
        assert len(steps) == plan.steps_per_epoch
        taken = np.concatenate([step.samples for step in steps])
        assert set(taken) == set(np.flatnonzero(plan.numbers >= 0))
        small = [step for step in steps if len(step.samples) < plan.step_size]
        assert len(taken) - sum(counts) <= (world - 1) * (1 if croppable else len(counts))
        assert all(len(step.samples) % world == 0 for step in steps)
        assert len(small) <= (1 if croppable else len(counts))
        if not croppable:
            assert all((plan.numbers[step.samples] == step.bucket).all() for step in steps)


def test_reading_stays_within_a_window_of_shards():
    plan = ExactPlan(np.zeros(600, int), np.arange(0, 601, 100), 4, 1, seed=3, window=2)
    windows = (plan.order(0) // 100).reshape(3, 200)
    assert [len(set(window)) for window in windows] == [2, 2, 2]
    assert len(set(windows[:, :30].ravel())) == 6  # mixed from the first on


def test_what_becomes_of_the_rests_is_said():
    assert plan_of([40, 24]).describe() == "8 steps an epoch"
    line = plan_of([43, 26], world=2).describe()
    assert "9 steps an epoch; 5 samples fill no step of their shape" in line
    assert "cropped to a neighbour's; 1 smaller steps (6 samples); 1 samples seen twice" in line


def test_a_set_smaller_than_a_step_is_refused(several_shapes):
    data = open_data(config(several_shapes, batch_size=31))
    with pytest.raises(UserError, match=r"batch_size is 31 on 2 device.* hold 61 samples"):
        data.loader_from(0, 0, 2)


def test_a_set_of_which_the_filters_leave_nothing_is_refused_with_the_reason(several_shapes):
    for mode in ("exact", "resampled"):
        with pytest.raises(UserError, match=r"all left out \(\d+ filter: min_size 4000"):
            open_data(config(several_shapes, mode=mode, filters=FilterConfig(min_size=4000)))


def test_a_set_of_which_much_is_broken_is_refused_as_a_whole(tmp_path):
    """In memory and by index, before a step is made; what filters leave out is not broken."""
    members = []
    for number in range(120):
        content = b"" if number % 5 == 0 else encoded(colored(number, (8, 8)))
        members += [(f"{number:03d}.png", content), (f"{number:03d}.txt", b"a colour")]
    write_members(tmp_path / "0.tar", members)
    values = {"shards": str(tmp_path / "0.tar"), "batch_size": 4}
    for more in ({"mode": "memory"}, {"mode": "exact", "size": 8}):
        refused = from_dict(DataConfig, values | more, "data")
        with pytest.raises(UserError, match=r"24 of 120 samples can't be used .*\(0\.1\)"):
            open_data(refused)
        assert open_data(replace(refused, max_broken_share=0.3)).shapes == [(8, 8)]
    filtered = {"mode": "exact", "size": 8, "filters": {"min_caption": 100}}
    with pytest.raises(UserError, match="nothing to train on"):
        open_data(from_dict(DataConfig, values | filtered | {"max_broken_share": 0.3}, "data"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "memory"}, "size is set but mode is memory"),
        ({"size": None, "buckets": None}, "size is not set; mode exact needs it"),
        ({"folder": "x"}, "a stream reads cached latents from shards"),
        ({"size": 36}, "size must be a multiple of step"),
        ({"workers": -1}, "workers is -1"),
        ({"max_broken_share": 0.0}, "max_broken_share is 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        config("x", **values)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_knows_how_long_it_waits_and_what_for(several_shapes, workers):
    loader = open_data(config(several_shapes, workers=workers)).loader_from(0, 0, 1)
    assert loader.waiting_s() == 0
    assert "worker 0: has not begun" in loader.describe_wait()
    batches = iter(loader)
    for _ in range(max(1, workers)):  # one of each worker
        next(batches)
    assert loader.waiting_s() == 0  # the step is at work, nobody waits
    lines = loader.activity.lines()
    assert len(lines) == max(1, workers)
    assert all("0000" in line and " for " in line for line in lines)


def test_a_worker_that_dies_is_one_clear_line(several_shapes):
    import os
    import signal

    loader = open_data(config(several_shapes, workers=1)).loader_from(0, 0, 1)
    batches = iter(loader)
    next(batches)
    # An inner iterator's workers are what the system kills for want of memory.
    inner = next(
        value for value in batches.gi_frame.f_locals.values() if hasattr(value, "_workers")
    )
    os.kill(inner._workers[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a data worker has died.*fewer data\.workers"):
        for _ in range(50):
            next(batches)


def test_shapes_of_any_area_can_be_named():
    config = BucketConfig(shapes=((768, 1280), (1280, 768)))
    buckets = Buckets.of(768, config)
    assert [buckets.name(number) for number in range(3)] == ["768x1280", "768x768", "1280x768"]
    assert buckets.of_sizes(np.array([1000, 500, 3000]), np.array([900, 900, 1000])).tolist() == [
        1,
        2,
        0,
    ]
    with pytest.raises(ValueError, match="shapes has 4x16"):
        BucketConfig(shapes=((4, 16),))
