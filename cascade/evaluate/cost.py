"""What a model costs to run: parameters, FLOPs, seconds by stage, memory, energy.

Seconds are measured after warm-up, with the device waited for, as medians and quartiles: one slow
repeat does not move them. FLOPs are counted in a run of their own, attention included.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cascade.evaluate.energy import EnergyMeter, gpus_of
from cascade.evaluate.flops import FlopCounter
from cascade.evaluate.process_memory import is_measurable, measure, reset_peak
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.latent import LatentPipeline
from cascade.pipelines.unet import UNetPipeline

Run = Callable[[], object]
ELSEWHERE = "elsewhere"
"""Operations outside of every part's modules: guidance, samplers."""


@dataclass(frozen=True)
class Spread:
    """Repeats of a measurement."""

    median: float
    lower: float
    """The first quartile."""
    upper: float
    """The third."""
    repeats: int


@dataclass(frozen=True)
class InferenceCost:
    """What pictures cost; figures are for the whole batch."""

    pictures: int
    """Pictures of the batch that was measured."""
    parameters: dict[str, int]
    """Of each part."""
    flops: dict[str, float]
    """Of each part for the batch, guidance's second evaluations included."""
    seconds: dict[str, Spread]
    """By stage, and of all together under "all"."""
    weights_bytes: int
    """Of all parts, in the number format that they run in."""
    peak_memory_bytes: int | None
    """Above what was there before, the weights; None: this system cannot tell."""
    energy_j: float | None
    """Of the timed repeats, for one of them; None: nothing tells it."""


def parts_of(pipeline: CascadePipeline | UNetPipeline | LatentPipeline) -> dict[str, nn.Module]:
    """Return the networks that make a picture of a prompt, each once."""
    if isinstance(pipeline, (UNetPipeline, LatentPipeline)):
        return pipeline.networks
    found: dict[str, nn.Module] = {"text": pipeline.text_encoder.model}
    if pipeline.text_encoder_b is not pipeline.text_encoder:
        found["text_b"] = pipeline.text_encoder_b.model
    return {
        **found,
        "stage_c": pipeline.stage_c,
        "stage_b": pipeline.stage_b,
        "stage_a": pipeline.stage_a,
    }


def count_parameters(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the parameters of each part; buffers are none."""
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in parts.items()
    }


def count_flops(parts: Mapping[str, nn.Module], run: Run) -> dict[str, float]:
    """Run once and return the FLOPs of each part, two for a multiply-accumulate.

    Products, convolutions and attention count by torch's formulas; norms and activations do not.

    Args:
        parts: The networks; what runs outside of their modules is "elsewhere".
        run: The computation.
    """
    with _where(parts) as where, FlopCounter(take_apart=True, where=where) as counter:
        run()
    return {name: counter.by_place.get(name, 0.0) for name in (*parts, ELSEWHERE)}


@contextmanager
def _where(parts: Mapping[str, nn.Module]) -> Iterator[Callable[[], str]]:
    """Follow which part runs: any module of it, since parts have methods beside ``forward``."""
    running: list[str] = []
    hooks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: object) -> None:
        running.pop()

    for name, part in parts.items():
        for module in part.modules():
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield lambda: running[-1] if running else ELSEWHERE
    finally:
        for hook in hooks:
            hook.remove()


def wait(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def timed(run: Run, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a run, of the clock and of the processor."""
    wait(device)
    started_s, processor_s = time.perf_counter(), time.process_time()
    run()
    wait(device)
    return time.perf_counter() - started_s, time.process_time() - processor_s


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Return the bytes that a run takes above what was there; None: this system can't tell.

    Of a GPU it is what the allocator gave, on a CPU the resident set.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not is_measurable():
        run()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else what earlier runs freed is there already
    reset_peak()
    resident = measure().resident
    run()
    return measure().peak - resident


def spread_of(values: Sequence[float]) -> Spread:
    """Return median and quartiles of at least one value."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], 1)
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, lower, upper, len(values))


def measure_inference(
    pipeline: CascadePipeline | UNetPipeline | LatentPipeline,
    draw: Callable[[], Mapping[str, float]],
    pictures: int,
    *,
    warm_up: int = 2,
    repeats: int = 10,
) -> InferenceCost:
    """Measure what a batch of pictures costs.

    Args:
        pipeline: The model.
        draw: Makes the batch and returns its seconds by stage, as ``Output.seconds`` has them: the
            pipeline's clock waits for the device at the end of each.
        pictures: Pictures of the batch.
        warm_up: Batches before the clock runs, which compile and fill caches.
        repeats: Batches on the clock.

    Raises:
        ValueError: If a number is below 1.
    """
    if min(warm_up, repeats, pictures) < 1:
        raise ValueError(f"{warm_up} warm-ups, {repeats} repeats, {pictures} pictures: at least 1")
    parts, device = parts_of(pipeline), pipeline.device
    for _ in range(warm_up):
        draw()
    peak = peak_memory(draw, device)
    seconds: dict[str, list[float]] = {}
    meter = EnergyMeter(gpus_of(device))
    for _ in range(repeats):
        wait(device)
        started_s = time.perf_counter()
        stages = dict(draw())
        wait(device)
        stages["all"] = time.perf_counter() - started_s
        for name, value in stages.items():
            seconds.setdefault(name, []).append(value)
    spent_j = meter.spent_j()
    return InferenceCost(
        pictures=pictures,
        parameters=count_parameters(parts),
        flops=count_flops(parts, draw),
        seconds={name: spread_of(values) for name, values in seconds.items()},
        weights_bytes=sum(
            one.numel() * one.element_size() for part in parts.values() for one in part.parameters()
        ),
        peak_memory_bytes=peak,
        energy_j=None if spent_j is None else spent_j / repeats,
    )
