"""Compile the networks of a pipeline for a plan, and say what that cost and what it saves."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from cascade.compiled import check_compile, compile_blocks
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.loaded import GPU_BATCH_SIZE
from cascade.pipelines.plan import Plan
from cascade.pipelines.results import Picture
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetPlan

_SHORT = 2
"""Steps of a trial: of the first one some work is not what the others do."""


@dataclass(frozen=True)
class CompileReport:
    """What compilation cost and what it saves, measured by pictures of few steps."""

    compile_s: float
    """Seconds that the first compiled trial took more than the second."""
    plain_s: Mapping[str, float]
    """Seconds of a picture by stage before, scaled from the trial's steps to the plan's."""
    compiled_s: Mapping[str, float]
    """The same after."""

    def describe(self) -> str:
        """Say it in a line."""
        plain, compiled = sum(self.plain_s.values()), sum(self.compiled_s.values())
        said = (
            f"compiled in {self.compile_s:.0f} s: a picture takes about {compiled:.2f} s, "
            f"{plain:.2f} s without"
        )
        if compiled >= plain:
            return f"{said}; it does not pay here"
        pictures = math.ceil(self.compile_s / (plain - compiled))
        return f"{said}; it pays from {max(pictures, 1)} pictures on"


def compile_pipeline(
    pipeline: CascadePipeline | UNetPipeline, plan: Plan | UNetPlan
) -> CompileReport:
    """Compile the networks that draw a plan's pictures, and try them before and after.

    Another size or batch is compiled once more, when it comes. Pictures differ from those of the
    plain networks by rounding.

    Args:
        pipeline: The pipeline; nothing of it is offloaded.
        plan: What will be made; trials have its sizes and fewer steps.

    Returns:
        What it cost and saves.

    Raises:
        UserError: The pipeline offloads.
        NonFiniteError: As a run does.
    """
    memory = pipeline.memory
    if memory.has_budget or any(memory.plan.way(name) != "stay" for name in _networks(pipeline)):
        check_compile("model", None)
    pipeline.arrange(plan)  # type: ignore[arg-type]
    trial, scales = _trial(plan)
    together = 1 if pipeline.device.type == "cpu" else GPU_BATCH_SIZE
    trial = replace(trial, requests=plan.requests[:together])

    def run() -> dict[str, float]:
        pictures = list(pipeline.run(trial, progress=False))  # type: ignore[arg-type]
        seconds = cast(Picture, pictures[0]).seconds
        return {name: scales.get(name, 1.0) * value for name, value in seconds.items()}

    run()  # what is slow at first is no fault of the plain networks
    plain = run()
    for network in _networks(pipeline).values():
        compile_blocks(network)
    started_s = time.perf_counter()
    run()
    first_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    compiled = run()
    return CompileReport(first_s - (time.perf_counter() - started_s), plain, compiled)


def _networks(pipeline: CascadePipeline | UNetPipeline) -> dict[str, nn.Module]:
    """Return what is compiled: the text encoders run once a prompt."""
    if isinstance(pipeline, UNetPipeline):
        return {"unet": pipeline.unet, "autoencoder": pipeline.autoencoder}
    return {
        "stage_c": pipeline.stage_c,
        "stage_b": pipeline.stage_b,
        "stage_a": pipeline.stage_a,
    }


def _trial(plan: Plan | UNetPlan) -> tuple[Plan | UNetPlan, dict[str, float]]:
    """Return a plan of few steps, and by stage how many times as many the whole one has."""
    if isinstance(plan, UNetPlan):
        steps = min(_SHORT, plan.steps)
        short = replace(plan, sampling=replace(plan.sampling, steps=steps), picture=None)
        return short, {"unet": plan.steps / steps}
    stage_c, times_c = _shortened(plan.stage_c)
    stage_b, times_b = _shortened(plan.stage_b)
    short_plan = replace(plan, stage_c=stage_c, stage_b=stage_b, picture=None, control=None)
    return short_plan, {"stage_c": times_c, "stage_b": times_b}


def _shortened(sampling: StageSampling) -> tuple[StageSampling, float]:
    if sampling.times or sampling.steps <= _SHORT:  # times of its own, of which there are few
        return sampling, 1.0
    return replace(sampling, steps=_SHORT), sampling.steps / _SHORT
