from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from cascade.errors import UserError
from cascade.pipelines.memory import Footprint
from cascade.pipelines.memory_plan import (
    GIB,
    RESERVE,
    MemoryPlan,
    Offload,
    check_offload,
    check_vram,
    pick_plan,
)


def gib(value: float) -> int:
    return int(value * GIB)


SIZES = {
    "text": Footprint(gib(1), gib(0.1), gib(0.1)),
    "stage_c": Footprint(gib(6), gib(0.2), gib(0.5)),
    "stage_b": Footprint(gib(3), gib(0.2), gib(1)),
    "stage_a": Footprint(gib(0.1), gib(0.02), gib(2), {128: gib(0.6), 64: gib(0.2)}),
}


def pick(vram: float, batch: int = 1, offload: Offload | None = None) -> MemoryPlan:
    batches = list(range(batch, 0, -1))
    return pick_plan(SIZES, gib(vram) + RESERVE, batches, offload=offload, what="1024x1024")


def test_the_fastest_plan_that_fits_is_picked() -> None:
    everything = pick(12.2)
    assert (everything.offload, everything.tile) == ("none", None)
    text_goes = pick(10.5)
    assert (text_goes.way("text"), text_goes.way("stage_c")) == ("stage", "stay")
    by_stage = pick(9)
    assert set(by_stage.ways.values()) == {"stage"} and by_stage.offload == "model"
    assert (by_stage.tile, pick(6.5).tile) == (None, None)
    layered = pick(5)
    assert layered.ways == {
        "text": "stage",
        "stage_c": "layer",
        "stage_b": "stage",
        "stage_a": "stage",
    }


def test_stage_a_is_cut_only_where_the_whole_picture_does_not_fit() -> None:
    assert pick(12.0).tile == 128  # everything stays: 10.1 of weights, and 2 more do not fit
    assert pick(2.0, offload="sequential").tile == 128


def test_fewer_pictures_run_together_before_parts_are_moved() -> None:
    assert (pick(14.1, batch=4).offload, pick(14.1, batch=4).batch_size) == ("none", 4)
    fewer = pick(12.2, batch=4)
    assert (fewer.offload, fewer.batch_size) == ("none", 2)


def test_a_plan_keeps_to_its_budget_and_says_what_it_is() -> None:
    for tenths in range(18, 160):
        budget = gib(tenths / 10) + RESERVE
        plan = pick(tenths / 10, batch=4)
        assert plan.peak <= budget
        line = plan.describe()
        assert "\n" not in line and "memory plan for 1024x1024" in line
        assert re.search(r"computed peak \d+\.\d\d GiB in (text|Stage [ABC])", line)
    assert "Stage A in tiles of 512 px" in pick(12.0).describe()
    assert "Stage C layer by layer, the rest stage by stage" in pick(5).describe()
    assert "up to 4 pictures together" in pick(20, batch=4).describe()


@pytest.mark.parametrize(
    ("vram", "offload", "message"),
    [
        (1.0, None, r"1024x1024 with offload sequential needs at least 2 GiB.*smaller picture"),
        (0.1, "sequential", r"at least 2 GiB, 0.75 of them for CUDA itself"),
        (5.0, "none", r"offload none needs at least 11.9 GiB.*leave --offload to --vram \(2 GiB"),
        (5.0, "model", r"offload model needs at least 7.3 GiB"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    vram: float, offload: Offload | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pick(vram, offload=offload)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vram", [0, -8, math.nan, math.inf, 1e300, True, "8"])
def test_a_budget_that_is_none_is_refused(vram: float) -> None:
    with pytest.raises(UserError, match="number of GiB is needed"):
        check_vram(vram)


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'sequential'"):
        check_offload("sequentially")
    assert check_offload("model") == "model"
    assert check_offload(None) is None


# Pictures as input


READING = {
    "image_encoder": Footprint(gib(0.6), gib(0.1), gib(0.1)),
    "compressor": Footprint(gib(0.1), gib(0.01), gib(0.1)),
    "controlnet": Footprint(gib(0.2), gib(0.01), gib(0.1)),
    "stage_a_encoder": Footprint(
        gib(0.1), gib(0.02), gib(4), {128: gib(1.5), 64: gib(0.3)}, of="stage_a"
    ),
}


def pick_with(
    vram: float, *names: str, offload: Offload | None = None, batch: int = 1
) -> MemoryPlan:
    sizes = SIZES | {name: READING[name] for name in names}
    batches = list(range(batch, 0, -1))
    return pick_plan(sizes, gib(vram) + RESERVE, batches, offload=offload, what="1024x1024")


@pytest.mark.parametrize("tenths", range(18, 160, 3))
def test_what_reads_a_picture_is_within_the_budget_too(tenths: int) -> None:
    plan = pick_with(tenths / 10, *READING, batch=4)
    assert plan.peak <= gib(tenths / 10) + RESERVE
    assert set(plan.peaks) == {*SIZES, *READING}
    assert set(plan.ways) == {*SIZES, *READING} - {"stage_a_encoder"}
    line = plan.describe()
    assert "\n" not in line and "the CLIP image encoder 0.60" in line


def test_what_reads_a_picture_never_stays_and_decides_only_where_it_must() -> None:
    plain, read = pick(12.2), pick_with(12.2, "image_encoder", "compressor")
    assert (read.offload, read.tile) == (plain.offload, plain.tile) == ("none", None)
    assert (read.way("image_encoder"), read.way("compressor")) == ("stage", "stage")
    assert "the CLIP image encoder and the semantic compressor only to read" in read.describe()
    assert ", for what" not in read.describe()
    # 10.1 of weights stay: with Stage B's 1 they fit into 11.2, with 1.6 of the encoder not.
    large = SIZES | {"image_encoder": Footprint(gib(1.5), gib(0.1), gib(0.1))}
    tight = pick_plan(large, gib(11.2) + RESERVE, [1])
    assert (pick(11.2).offload, tight.way("text"), tight.way("stage_c")) == (
        "none",
        "stage",
        "stay",
    )
    assert ", for what the CLIP image encoder needs" in tight.describe()
    sequential = pick_with(1.3, "image_encoder", "compressor", offload="sequential")
    assert set(sequential.ways.values()) == {"layer"}


def test_stage_as_encoder_has_tiles_of_its_own() -> None:
    assert pick_with(14.2, "stage_a_encoder").encoder_tile is None
    plan = pick_with(12.2, "stage_a_encoder")
    assert (plan.offload, plan.tile, plan.encoder_tile) == ("none", None, 128)
    assert "Stage A's encoder in tiles of 512 px" in plan.describe()
    assert plan.peaks["stage_a_encoder"] == gib(10.1) + gib(1.5)
    small = pick_with(11.2, "stage_a_encoder")
    assert (small.tile, small.encoder_tile) == (128, 64)


def test_what_does_not_run_needs_no_room() -> None:
    sizes = {name: replace(size, idle=name == "stage_c") for name, size in SIZES.items()}
    plan = pick_plan(sizes, gib(5) + RESERVE, [1], what="1024x1024")
    assert (plan.offload, plan.way("stage_c")) == ("model", "stage")
    assert "stage_c" not in plan.peaks
    with pytest.raises(UserError, match=r"offload none needs at least 11\.9 GiB"):
        pick_plan(sizes, gib(5) + RESERVE, [1], offload="none", what="1024x1024")


def test_a_refusal_names_the_reading_part_that_is_too_large() -> None:
    sizes = SIZES | {"compressor": Footprint(gib(0.1), gib(0.01), gib(3))}
    with pytest.raises(UserError, match=r"at least 3.8 GiB in the semantic compressor, 0.75"):
        pick_plan(sizes, gib(2) + RESERVE, [1], what="4096x4096 img2img")


def test_tiles_that_make_another_picture_are_the_last_resort() -> None:
    tiles = {128: gib(1), 64: gib(0.3)}
    sizes = {
        "text": Footprint(gib(1), gib(0.1), gib(0.1)),
        "unet": Footprint(gib(5), gib(0.2), gib(1)),
        "autoencoder": Footprint(gib(0.3), gib(0.1), gib(4), tiles, tiles_differ=True),
    }

    def pick(room: float, offload: Offload | None = None) -> MemoryPlan:
        return pick_plan(sizes, gib(room) + RESERVE, [1], offload=offload, cell=8)

    assert (pick(10.5).offload, pick(10.5).tile) == ("none", None)
    # Everything would stay with tiles of 128: 6.3 of weights and 1; moving costs only time.
    moved = pick(8)
    assert (moved.offload, moved.tile) == ("model", None)
    layered = pick(4.5)
    assert (layered.way("unet"), layered.tile) == ("layer", None)
    last = pick(4.0)
    assert last.tile == 128
    assert "the autoencoder in tiles of 1024 px (the picture differs a little" in last.describe()
    assert last.peaks["autoencoder"] <= gib(4.0)
    assert pick(1.2).tile == 64
    assert pick(7.5, "none").tile == 128
    with pytest.raises(UserError, match="needs at least"):
        pick(0.2)
