"""The clock of ``benchmarks/sampling.py``: one part of a model on all sides, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import sampling_sides as sides
from benchmarks.sampling_models import (
    Build,
    CascadeModel,
    Model,
    same_in_diffusers,
    shared_bytes,
)
from benchmarks.sampling_sides import (
    HERE,
    HERE_COMPILED,
    HERE_GRAPHS,
    THEIRS,
    THEIRS_COMPILED,
    Side,
)
from cascade.checkpoints.files import build_on_meta
from cascade.compiled import compile_blocks
from cascade.cuda_graphs import CudaGraphs, GpuCapture
from cascade.evaluate.cost import Spread, peak_memory, spread_of, wait

TITLES = {
    "stage_c": "Stage C",
    "stage_b": "Stage B",
    "stage_a": "Stage A",
    "unet": "U-Net",
    "autoencoder": "autoencoder",
}
WHOLE = "end to end"
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.06}
"""Largest difference of two sides' predictions, of their root mean square: beyond it they compute
something else."""
_RATE_SIDE = {"cpu": 2048, "cuda": 8192}
_RATE_REPEATS = 5
_GPU_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """A model at a size, and how it is run."""

    key: str
    px: int
    batch_size: int
    dtype: torch.dtype
    repeats: int
    loop_steps: int = 0
    """Steps of each loop that run, the others being computed from them; 0 runs all."""
    steps: int | None = None
    """Of a U-Net; None, here and below: the model's own."""
    steps_c: int | None = None
    steps_b: int | None = None


@dataclass(frozen=True)
class Row:
    """A part of a model on one side."""

    key: str
    model: str
    part: str
    px: int
    batch_size: int
    dtype: str
    side: str
    parameters: int
    steps: int
    """Steps of the loop; of a decoder 1, end to end all of them."""
    steps_run: int
    """Those that ran on the clock; fewer than ``steps``: the seconds are computed from them."""
    seconds: Spread
    """Of the whole loop."""
    least_s: float
    all_s: tuple[float, ...]
    """Of each repeat."""
    times_diffusers: float
    """Diffusers' median divided by this one's: above 1 is faster."""
    flops: float
    """What the loop needs at least, computed once for both sides."""
    roofline_share: float
    """Share of the matrix products' rate, measured in the same run."""
    peak_bytes: int | None
    """Of a loop that ran before, above what was there; None: this system can't tell."""
    difference: float
    """Of the predictions from diffusers', of their root mean square."""
    shared_bytes: int
    """Bytes of diffusers' weights that are ours."""
    copied_bytes: int
    """Bytes of diffusers' weights that had to be copied."""

    @property
    def is_computed(self) -> bool:
        """Whether some steps were not run."""
        return self.steps_run < self.steps

    @property
    def step_s(self) -> float:
        """Seconds of a step, what is done once a picture included."""
        return self.seconds.median / self.steps


@dataclass(frozen=True)
class _Part:
    """A part of a case, built on all sides."""

    name: str
    steps: int
    parameters: int
    flops: float
    sides: dict[str, Side]
    shared: tuple[int, int]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of a few large square matrix products, here and now."""
    side = _RATE_SIDE.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    left @ right
    best_s = float("inf")
    for _ in range(_RATE_REPEATS):
        wait(device)
        started_s = time.perf_counter()
        left @ right
        wait(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * side**3 / best_s


def measure(
    case: Case,
    model: Model,
    device: torch.device,
    seed: int,
    rate: float,
    compile_mode: str | None = None,
    give_memory: Callable[[str], object] = lambda side: None,
) -> Iterator[Row]:
    """Yield the rows of each part, then those of all together.

    Args:
        case: What to run.
        model: Its model.
        device: Where.
        seed: Of weights and inputs.
        rate: FLOP/s of matrix products in this number format on this device.
        compile_mode: torch.compile's mode of diffusers' networks on a side of their own, beside
            ours as ``--compile`` has them, on a GPU with ``--cuda-graphs``; None: there are none.
        give_memory: Called with a side before it runs.
    """
    rows: list[list[Row]] = []
    for name, build in model.builders().items():
        part = _build(case, model, name, build, device, seed, compile_mode)
        with torch.inference_mode():
            rows.append(_clock(case, model.title, part, device, rate, give_memory))
        del part
        gc.collect()
        if compile_mode is not None:  # else too many shapes of one code end in running it plainly
            torch.compiler.reset()
        yield from rows[-1]
    wholes = [_together(same_side) for same_side in zip(*rows, strict=True)]
    [theirs] = [one.seconds.median for one in wholes if one.side == THEIRS]
    yield from (replace(one, times_diffusers=theirs / one.seconds.median) for one in wholes)


def _build(
    case: Case,
    model: Model,
    name: str,
    build: Build,
    device: torch.device,
    seed: int,
    compile_mode: str | None,
) -> _Part:
    """Build a part on both sides; diffusers' network has our weights."""
    ours = build(seed, device, case.dtype)
    theirs = same_in_diffusers(ours)
    meta = build_on_meta(type(ours), ours.config, "the benchmark")
    given = _drawn(case, model, name, ours, seed, next(ours.parameters()))
    like_meta = torch.empty(0, device="meta")
    empty = _drawn(case, model, name, meta, seed, like_meta)
    steps, guidance = _steps_of(case, model, name)
    # Not in inference mode, which would hide operations from the counter.
    flops = sides.loop_flops(meta, empty, guidance != 1, steps, case.px)
    wraps: dict[str, sides.Wrap] = {THEIRS: lambda call: call}
    if compile_mode is not None:
        wraps[THEIRS_COMPILED] = lambda call: torch.compile(call, mode=compile_mode, dynamic=False)
    with torch.inference_mode():
        found = {HERE: _here(case, model, name, ours, given, guidance)}
        graphs = None
        if device.type == "cuda":
            graphs = CudaGraphs(GpuCapture(device))
            found[HERE_GRAPHS] = _here(case, model, name, ours, given, guidance, graphs)
        if compile_mode is not None:  # another network over the same tensors: ours stays plain
            again = build_on_meta(type(ours), ours.config, "the benchmark")
            again.load_state_dict(ours.state_dict(), assign=True)
            compile_blocks(again.eval().requires_grad_(False))
            found[HERE_COMPILED] = _here(case, model, name, again, given, guidance, graphs)
        for side, wrap in wraps.items():
            found[side] = _there(case, model, name, ours, theirs, given, guidance, wrap)
    parameters = sum(one.numel() for one in ours.parameters())
    return _Part(name, steps, parameters, flops, found, shared_bytes(ours, theirs))


def _steps_of(case: Case, model: Model, name: str) -> tuple[int, float]:
    """Return a part's steps and guidance scale."""
    if isinstance(model, CascadeModel):
        if name == "stage_c":
            return case.steps_c or model.steps_c, model.guidance_c
        if name == "stage_b":
            return case.steps_b or model.steps_b, model.guidance_b
    elif name == "unet":
        return case.steps or model.sampling.steps, model.sampling.guidance
    return 1, 1.0


def _drawn(
    case: Case, model: Model, name: str, network: nn.Module, seed: int, like: Tensor
) -> sides.Drawn:
    told: Any = None
    if isinstance(model, CascadeModel):
        shape_c, shape_b = sides.cascade_shapes(model, case.px)
        shape = shape_c if name == "stage_c" else shape_b
        told = shape_c if name == "stage_b" else None
    else:
        config = model.autoencoder
        side = case.px // 2 ** (len(config.channels) - 1)
        shape = config.latent_channels, side, side
    return sides.draw(network, shape, model.tokens, seed, case.batch_size, like, told)


def _here(
    case: Case,
    model: Model,
    name: str,
    ours: Any,
    given: sides.Drawn,
    guidance: float,
    graphs: CudaGraphs | None = None,
) -> Side:
    if name in ("stage_a", "autoencoder"):
        return sides.decoder_here(ours, given)
    if isinstance(model, CascadeModel):
        return sides.cascade_here(ours, given, guidance, graphs)
    return sides.unet_here(ours, model, given, case.px, graphs)


def _there(
    case: Case,
    model: Model,
    name: str,
    ours: Any,
    theirs: nn.Module,
    given: sides.Drawn,
    guidance: float,
    wrap: sides.Wrap,
) -> Side:
    if name in ("stage_a", "autoencoder"):
        return sides.decoder_there(ours, theirs, given, wrap)
    if isinstance(model, CascadeModel):
        return sides.cascade_there(ours, theirs, given, guidance, wrap)
    return sides.unet_there(ours, theirs, model, given, case.px, wrap)


def _clock(
    case: Case,
    title: str,
    part: _Part,
    device: torch.device,
    rate: float,
    give_memory: Callable[[str], object],
) -> list[Row]:
    """Compare predictions, then run all sides in turn and return their rows."""
    steps_run = min(case.loop_steps or part.steps, part.steps)
    first = {name: side.predict().float() for name, side in part.sides.items()}
    differences = {name: _away(one, first[THEIRS]) for name, one in first.items()}
    del first
    peaks: dict[str, int | None] = {}
    for name, side in part.sides.items():
        give_memory(name)
        for _ in range(_GPU_WARM_UP if device.type == "cuda" else 0):  # compiles, captures graphs
            side.loop(part.steps, None)
        peaks[name] = peak_memory(partial(side.loop, 1, None), device)
    seconds: dict[str, list[float]] = {name: [] for name in part.sides}
    for repeat in range(case.repeats):
        for name in list(part.sides) if repeat % 2 == 0 else list(part.sides)[::-1]:
            give_memory(name)
            taken_s = loop_seconds(part.sides[name], part.steps, steps_run, device)
            seconds[name].append(taken_s)
    theirs = spread_of(seconds[THEIRS]).median
    rows = []
    for name, values in seconds.items():
        spread = spread_of(values)
        rows.append(
            Row(
                key=case.key,
                model=title,
                part=TITLES[part.name],
                px=case.px,
                batch_size=case.batch_size,
                dtype=str(case.dtype).removeprefix("torch."),
                side=name,
                parameters=part.parameters,
                steps=part.steps,
                steps_run=steps_run,
                seconds=spread,
                least_s=min(values),
                all_s=tuple(values),
                times_diffusers=theirs / spread.median,
                flops=part.flops,
                roofline_share=part.flops / rate / spread.median,
                peak_bytes=peaks[name],
                difference=differences[name],
                shared_bytes=part.shared[0],
                copied_bytes=part.shared[1],
            )
        )
    return rows


def loop_seconds(side: Side, steps: int, steps_run: int, device: torch.device) -> float:
    """Return the seconds of a loop of ``steps``, of which ``steps_run`` run.

    Nothing is called in a loop that runs whole. Of one that is cut, the first step, with all that
    is done once a picture, is told apart from the others, which stand for those left out.
    """
    first_s: list[float] = []

    def mark() -> None:
        if not first_s:
            wait(device)
            first_s.append(time.perf_counter())

    is_cut = steps_run < steps
    wait(device)
    started_s = time.perf_counter()
    side.loop(steps_run, mark if is_cut else None)
    wait(device)
    ended_s = time.perf_counter()
    whole_s = ended_s - started_s
    if not is_cut:
        return whole_s
    step_s = (ended_s - first_s[0]) / (steps_run - 1) if steps_run > 1 else whole_s
    return whole_s + (steps - steps_run) * step_s


def _away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def _together(rows: Sequence[Row]) -> Row:
    """Add up the parts of a side, repeat by repeat; memory is that of the largest part."""
    all_s = tuple(sum(values) for values in zip(*(row.all_s for row in rows), strict=True))
    spread = spread_of(all_s)
    ideal_s = sum(row.roofline_share * row.seconds.median for row in rows)
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    return replace(
        rows[0],
        part=WHOLE,
        parameters=sum(row.parameters for row in rows),
        steps=sum(row.steps for row in rows),
        steps_run=sum(row.steps_run for row in rows),
        seconds=spread,
        least_s=min(all_s),
        all_s=all_s,
        flops=sum(row.flops for row in rows),
        roofline_share=ideal_s / spread.median,
        peak_bytes=max(peaks) if len(peaks) == len(rows) else None,
        difference=max(row.difference for row in rows),
        shared_bytes=sum(row.shared_bytes for row in rows),
        copied_bytes=sum(row.copied_bytes for row in rows),
    )
