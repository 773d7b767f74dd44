from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import hooks
from accelerate.hooks import ModelHook

from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.finite import NonFiniteError
from cascade.pipelines.memory_plan import RESERVE, MemoryPlan
from cascade.pipelines.offload import check_request
from cascade.pipelines.results import Interrupted, Preview
from cascade.text.encoder import TextEncoder
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_c import StageC

CPU = torch.device("cpu")
MIXED = MemoryPlan(
    "sequential",
    {"text": "stage", "stage_c": "layer", "stage_b": "stay", "stage_a": "stage"},
    tile=4,
)


@pytest.fixture
def pipeline(tiny_model: Path) -> CascadePipeline:
    return CascadePipeline(tiny_model, device="cpu")


def networks(pipeline: CascadePipeline) -> list[torch.nn.Module]:
    return [
        pipeline.text_encoder.model,
        pipeline.stage_c,
        pipeline.stage_b,
        pipeline.stage_a,
    ]


def pixels(pipeline: CascadePipeline) -> torch.Tensor:
    prompts = ["a red apple", "a blue fish"]
    return pipeline(prompts, seed=7, negative_prompt="a hat", progress=False).pixels


def away(pipeline: CascadePipeline) -> list[bool]:
    """Whether all weights of each network are off the device."""
    return [all(p.is_meta for p in network.parameters()) for network in networks(pipeline)]


def leftovers(pipeline: CascadePipeline) -> list[str]:
    """What accelerate, or we, forgot to take away."""
    return [
        f"{type(module).__name__}.{name}"
        for network in networks(pipeline)
        for module in network.modules()
        for name in module.__dict__
        if name in ("forward", "_hf_hook", "_old_forward")
    ]


def storages(pipeline: CascadePipeline) -> list[int]:
    return [tensor.data_ptr() for one in networks(pipeline) for tensor in one.state_dict().values()]


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_every_mode_makes_the_same_pictures_bit_by_bit(
    tiny_model: Path, pipeline: CascadePipeline, mode: str
) -> None:
    offloaded = CascadePipeline(tiny_model, device="cpu", offload=mode)
    assert away(offloaded) == [True] * 4
    assert torch.equal(pixels(offloaded), pixels(pipeline))
    assert away(offloaded) == [True] * 4


def test_any_placement_leads_to_any_other_and_back_without_a_trace(
    pipeline: CascadePipeline,
) -> None:
    expected, at_first = pixels(pipeline), storages(pipeline)
    for mode in ("model", "none", "sequential", "model", "sequential", "none"):
        pipeline.place(offload=mode)
        assert torch.equal(pixels(pipeline), expected), mode
        if mode == "none":
            assert storages(pipeline) == at_first  # not even a copy was made
            assert leftovers(pipeline) == []
            assert away(pipeline) == [False] * 4


def test_parts_go_their_own_ways_and_stage_a_comes_in_tiles(pipeline: CascadePipeline) -> None:
    expected = pixels(pipeline)
    pipeline.memory._placement.apply(MIXED)
    assert away(pipeline) == [True, True, False, True]
    torch.testing.assert_close(pixels(pipeline), expected, atol=1e-5, rtol=0)
    pipeline.place()
    assert torch.equal(pixels(pipeline), expected)


def test_one_part_is_there_at_a_time_and_the_text_encoder_once(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, list[bool]]] = []

    def watch(cls: type, name: str, label: str) -> None:
        original = getattr(cls, name)

        def watched(self: object, *args: object, **kwargs: object) -> object:
            seen.append((label, away(pipeline)))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, watched)

    watch(TextEncoder, "encode", "text")
    watch(StageC, "forward", "C")
    watch(StageB, "forward", "B")
    watch(StageA, "decode", "A")
    pipeline.place(offload="model")
    pixels(pipeline)  # two prompts and a negative one, one picture at a time
    order = "".join(label[0] for label, _ in seen)
    assert order == "ttt" + 2 * ("C" * 3 + "B" * 2 + "A")
    for label, gone in seen:
        present = ["text", "C", "B", "A"].index(label)
        assert gone == [part != present for part in range(4)], label


def keep(into: list[bytes], preview: Preview) -> None:
    into.append(preview.images[0].tobytes())


def test_what_is_loaded_later_follows_the_plan(pipeline: CascadePipeline) -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = pipeline.reconstruct(picture)
    previews: list[bytes] = []
    pipeline("a hat", seed=7, on_preview=partial(keep, previews))
    for mode in ("model", "sequential"):
        pipeline.place(offload=mode)
        assert all(p.is_meta for p in pipeline.previewer.parameters())
        assert torch.equal(pipeline.reconstruct(picture).pixels, expected.pixels)
        again: list[bytes] = []
        pipeline("a hat", seed=7, on_preview=partial(keep, again))
        assert again == previews
    pipeline.place()
    assert not any(p.is_meta for p in pipeline.compressor.parameters())


def test_an_error_in_a_stage_sends_it_away_all_the_same(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.place(offload="model")
    with monkeypatch.context() as broken, pytest.raises(NonFiniteError, match="Stage B"):
        broken.setattr(StageB, "forward", lambda self, x, t, cond: x * float("nan"))
        pixels(pipeline)
    assert away(pipeline) == [True] * 4
    pixels(pipeline)


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, interrupted by Ctrl-C after some calls."""
    left = iter(range(calls))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("mode", ["none", "model", "sequential"])
def test_ctrl_c_during_stage_b_leaves_a_pipeline_that_makes_the_same_pictures(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    expected = pixels(pipeline)
    pipeline.place(offload=mode)
    with monkeypatch.context() as pressed, pytest.raises(Interrupted):
        # Deep within a block, whose weights are on the device when it comes.
        pressed.setattr(torch.nn.functional, "gelu", interrupt)
        pressed.setattr(StageC, "forward", lambda self, x, t, cond: x)
        pixels(pipeline)
    if mode != "none":
        assert away(pipeline) == [True] * 4
    assert torch.equal(pixels(pipeline), expected)


def test_ctrl_c_keeps_nothing_of_the_device_alive(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def forward(self: StageB, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        activation = x * 2
        seen.append(weakref.ref(activation))
        raise KeyboardInterrupt

    monkeypatch.setattr(StageB, "forward", forward)
    with pytest.raises(Interrupted) as caught:
        pixels(pipeline)
    gc.collect()
    assert caught.value.finished == []
    assert [one() for one in seen] == [None]


@pytest.mark.parametrize("calls", [0, 1, 7, 40])
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_ctrl_c_while_parts_move_is_made_good_by_the_next_call(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch, mode: str, calls: int
) -> None:
    expected, at_first = pixels(pipeline), storages(pipeline)
    with monkeypatch.context() as pressed, pytest.raises(KeyboardInterrupt):
        moved = after(calls, hooks.set_module_tensor_to_device)
        pressed.setattr(hooks, "set_module_tensor_to_device", moved)
        pipeline.place(offload=mode)
    assert torch.equal(pixels(pipeline), expected)
    assert away(pipeline) == [True] * 4
    pipeline.place()
    assert storages(pipeline) == at_first
    assert leftovers(pipeline) == []
    assert torch.equal(pixels(pipeline), expected)


def test_ctrl_c_while_a_part_is_loaded_late_is_made_good_too(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = pipeline.reconstruct(picture).pixels
    again = CascadePipeline(pipeline.folder, device="cpu", offload="model")
    with monkeypatch.context() as pressed, pytest.raises(KeyboardInterrupt):
        pressed.setattr(hooks.AlignDevicesHook, "init_hook", interrupt)
        again.reconstruct(picture)
    assert torch.equal(again.reconstruct(picture).pixels, expected)


# Budgets; a CPU has none, so one is put in behind the check


def give_budget(pipeline: CascadePipeline, num_bytes: int) -> None:
    pipeline.place()
    pipeline.memory._budget = RESERVE + num_bytes


@pytest.mark.parametrize("kilobytes", [10_000, 1000, 500, 400])
def test_a_budget_makes_the_same_reconstructions_one_at_a_time_or_in_tiles(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch, kilobytes: int
) -> None:
    monkeypatch.setattr("cascade.pipelines.memory.TILE_CELLS", (8, 4))
    picture = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = pipeline.reconstruct(picture, seeds=[1, 2, 3])
    expected_a = pipeline.reconstruct(picture, through="a")
    give_budget(pipeline, kilobytes * 1000)
    for found, wanted in (
        (pipeline.reconstruct(picture, seeds=[1, 2, 3]), expected),
        (pipeline.reconstruct(picture, through="a"), expected_a),
    ):
        plan = pipeline.memory.plan
        assert 0 < plan.peak <= RESERVE + kilobytes * 1000
        # Matrix products of another size round differently, and Stage B's steps amplify it.
        torch.testing.assert_close(found.pixels, wanted.pixels, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            found.stage_b_latents, wanted.stage_b_latents, atol=1e-4, rtol=1e-4
        )
    assert plan.encoder_tile == {500: 8, 400: 4}.get(kilobytes)
    assert "stage_c" not in plan.peaks and "stage_a_encoder" in plan.peaks


def test_what_does_not_fit_is_one_line_and_leaves_the_pipeline_as_it_was(
    pipeline: CascadePipeline,
) -> None:
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = pipeline.reconstruct(picture)
    give_budget(pipeline, 1000)
    with pytest.raises(UserError, match="64x64 with offload sequential needs at least"):
        pipeline.reconstruct(picture)
    pipeline.place()
    assert torch.equal(pipeline.reconstruct(picture).pixels, expected.pixels)


def test_a_plan_that_was_interrupted_is_made_again(
    pipeline: CascadePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipeline("a hat", seed=7).pixels
    give_budget(pipeline, 10_000_000)
    assert torch.equal(pipeline("a hat", seed=7).pixels, expected)
    for num_bytes in (1_000_000, 10_000_000):
        pipeline.memory._budget = RESERVE + num_bytes
        pipeline.memory._arranged = None
        with monkeypatch.context() as pressed, pytest.raises(KeyboardInterrupt):
            pressed.setattr("cascade.pipelines.offload._remove_hooks", interrupt)
            pipeline("a hat", seed=7)
        assert torch.equal(pipeline("a hat", seed=7).pixels, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", "sequential", "changing"])
def test_twenty_calls_leave_nothing_behind(pipeline: CascadePipeline, mode: str) -> None:
    def call(index: int) -> None:
        if mode == "changing":
            pipeline.place(offload=("none", "model", "sequential")[index % 3])
        pipeline("a hat", seed=index, steps_c=1, steps_b=1, progress=False)

    def alive() -> tuple[Counter[str], int]:
        gc.collect()
        kinds: Counter[str] = Counter()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                kinds["tensor"] += 1
            elif isinstance(thing, ModelHook):
                kinds["hook"] += 1
        return kinds, psutil.Process().memory_info().rss

    if mode != "changing":
        pipeline.place(offload=mode)
    for index in range(3):  # caches of torch and tokenizers fill
        call(index)
    before, rss_before = alive()
    for index in range(3, 24):  # 21, so that "changing" ends where it began
        call(index)
    after, rss_after = alive()
    assert after - before == Counter()  # keeps what has grown
    assert rss_after - rss_before < 16 * 2**20


def test_stages_have_their_own_number_formats(tiny_model: Path) -> None:
    mixed = CascadePipeline(
        tiny_model, device="cpu", dtype="stage_c=bfloat16,stage_a=float32,stage_b=float32"
    )
    kinds = [next(one.parameters()).dtype for one in networks(mixed)]
    assert kinds == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    output = mixed("a hat", seed=7)
    written = "stage_c=bfloat16,stage_b=float32,stage_a=float32"
    assert f'"dtype": "{written}"' in output.metadata[0]["settings"]
    same = CascadePipeline(
        tiny_model, device="cpu", dtype={"stage_c": torch.bfloat16}, offload="sequential"
    )
    assert torch.equal(same("a hat", seed=7).pixels, output.pixels)


@pytest.mark.parametrize(
    ("stage", "message"),
    [("stage_c", r"Stage C, step 1 of 3 \(bfloat16\)"), ("stage_b", r"Stage B.*\(float32\)")],
)
def test_a_stage_that_overflows_is_named_with_its_own_format(
    tiny_model: Path, stage: str, message: str
) -> None:
    pipeline = CascadePipeline(tiny_model, device="cpu", dtype="stage_c=bfloat16")
    with torch.no_grad():
        getattr(pipeline, stage).out.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=message):
        pipeline("a hat", seed=7)


@pytest.mark.parametrize(
    ("offload", "vram", "message"),
    [
        ("modle", None, "did you mean 'model'"),
        (None, 8, "cpu has none; leave it out"),
        (None, 0, "a positive number of GiB"),
        (None, float("nan"), "a positive number of GiB"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(
    tiny_model: Path, offload: str, vram: float, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.pipelines.parts.load_network", None)
    with pytest.raises(UserError, match=message):
        CascadePipeline(tiny_model, device="cpu", offload=offload, vram=vram)


def test_a_budget_ends_where_the_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 6 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert check_request(None, 8, torch.device("cuda")) == (None, 6 * 2**30)
    assert check_request("model", 5, torch.device("cuda")) == ("model", 5 * 2**30)


@pytest.mark.gpu
def test_offloading_from_a_gpu_frees_it_and_makes_the_same_pictures(tiny_model: Path) -> None:
    resident = CascadePipeline(tiny_model, device="cuda", dtype="float32")
    expected = pixels(resident)
    for mode in ("model", "sequential"):
        resident.place(offload=mode)
        assert torch.equal(pixels(resident), expected)
        assert away(resident) == [True] * 4
    resident.place(vram=4)
    assert torch.equal(pixels(resident), expected)
    assert "memory plan for 32x32 in 4 GiB" in resident.memory.plan.describe()
    with pytest.raises(UserError, match="needs at least"):
        resident.place(vram=0.5)
        pixels(resident)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["none", "model"])
def test_a_gpu_takes_no_more_than_the_plan_computed(tiny_model: Path, mode: str) -> None:
    pipeline = CascadePipeline(tiny_model, device="cuda", dtype="float32", offload=mode, vram=4)
    pixels(pipeline)  # kernels are loaded, workspaces taken
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    pixels(pipeline)
    assert torch.cuda.max_memory_allocated() <= pipeline.memory.plan.peak
