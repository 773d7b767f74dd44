"""Compile the networks of a pipeline for a plan and say what that saves; record their passes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import nn
from torch._dynamo.exc import TorchDynamoException

from cascade.compiled import check_stays, compile_blocks
from cascade.cuda_graphs import CudaGraphs, GpuCapture, check_graphs
from cascade.errors import UserError
from cascade.pipelines.cascade import CascadePipeline
from cascade.pipelines.loaded import GPU_BATCH_SIZE
from cascade.pipelines.plan import Plan
from cascade.pipelines.results import Picture
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetPlan


@dataclass(frozen=True)
class CompileReport:
    """What compilation cost and what it saves, measured by the plan's first pictures."""

    compile_s: float
    """Seconds that the first pictures took more than the same ones again."""
    plain_s: Mapping[str, float]
    """Seconds of a picture by stage before."""
    compiled_s: Mapping[str, float]
    """The same after."""

    def describe(self) -> str:
        """Say it in a line."""
        plain, compiled = sum(self.plain_s.values()), sum(self.compiled_s.values())
        said = (
            f"compiled in {self.compile_s:.0f} s: a picture takes {compiled:.2f} s, "
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

    Another size or batch is compiled once more, when it comes; a network that another plan brings
    in is not. Pictures differ from those of the plain networks by rounding.

    Args:
        pipeline: The pipeline; nothing of it is offloaded.
        plan: What will be made; its first pictures, as many as run together, are made four times:
            twice before, of which the second counts, and twice after.

    Returns:
        What it cost and saves.

    Raises:
        UserError: The pipeline offloads, nothing is drawn, or there is no compiler.
        NonFiniteError: As a run does.
    """
    check_stays("--compile", "model" if _moves(pipeline) else None, None)
    if plan.picture is not None and plan.picture.mode == "reconstruct":
        raise UserError("--compile: a reconstruction is one pass of each network; leave it out")
    pipeline.arrange(plan)  # type: ignore[arg-type]
    together = 1 if pipeline.device.type == "cpu" else GPU_BATCH_SIZE
    trial = replace(plan, requests=plan.requests[:together])

    def run() -> Mapping[str, float]:
        pictures = list(pipeline.run(trial, progress=False))  # type: ignore[arg-type]
        return cast(Picture, pictures[0]).seconds

    run()  # what is slow at first is no fault of the plain networks
    plain = run()
    for network in _networks(pipeline).values():
        compile_blocks(network)
    started_s = time.perf_counter()
    try:
        run()
    except TorchDynamoException as error:
        raise UserError(
            "compilation failed; it needs a C++ compiler, and Triton on a GPU: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    first_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    compiled = run()
    return CompileReport(first_s - (time.perf_counter() - started_s), plain, compiled)


def use_cuda_graphs(pipeline: CascadePipeline | UNetPipeline) -> None:
    """Have the passes of a pipeline's steps recorded as CUDA graphs and replayed.

    A pass is recorded when it first meets a size, batch, length of the text or number of guidance
    passes, which takes about as long as four of it; goes with compiled networks. Stage A and the
    autoencoder run once a picture and are left as they are. ``pipeline.graphs = None`` undoes it.

    Args:
        pipeline: The pipeline, on a GPU; nothing of it is offloaded.

    Raises:
        UserError: It is not on one, or offloads.
    """
    check_graphs(pipeline.device, "model" if _moves(pipeline) else None, None)
    pipeline.graphs = CudaGraphs(GpuCapture(pipeline.device))


def _moves(pipeline: CascadePipeline | UNetPipeline) -> bool:
    """Return whether weights come and go."""
    memory = pipeline.memory
    ways = (memory.plan.way(name) for name in _networks(pipeline))
    return memory.has_budget or any(way != "stay" for way in ways)


def _networks(pipeline: CascadePipeline | UNetPipeline) -> dict[str, nn.Module]:
    """Return what is compiled: the text encoders run once a prompt."""
    if isinstance(pipeline, UNetPipeline):
        return {"unet": pipeline.unet, "autoencoder": pipeline.autoencoder}
    return {
        "stage_c": pipeline.stage_c,
        "stage_b": pipeline.stage_b,
        "stage_a": pipeline.stage_a,
    }
