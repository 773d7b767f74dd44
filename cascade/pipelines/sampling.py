"""One diffusion stage: noise to latents, with guidance and a check at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cascade.control import Maps
from cascade.cuda_graphs import CudaGraphs
from cascade.diffusion.denoiser import Denoiser
from cascade.diffusion.guidance import (
    Denoise,
    Guided,
    consistent,
    is_within,
    keeping,
    unguided,
)
from cascade.diffusion.prediction import Prediction
from cascade.diffusion.samplers import SAMPLERS, OnStep, Sampler, StepInfo, sample_ddpm
from cascade.diffusion.schedules import NoiseSchedule, diffuse, equal_times
from cascade.diffusion.timetable import ByTime, timetable_of
from cascade.pipelines.finite import FiniteSteps
from cascade.pipelines.spec import StageSampling
from cascade.placed import example_of
from cascade.rng import PictureNoise
from cascade.text.encoder import TextFeatures
from stages.conditions import concat
from stages.stage_b import StageB, StageBCondition
from stages.stage_b_v2 import StageBV2, StageBV2Condition
from stages.stage_c import StageC, StageCCondition
from stages.stage_c_v2 import StageCV2, StageCV2Condition
from stages.unet.unet import UNet


@dataclass(frozen=True)
class Prompted:
    """Text states of B pictures, and of what guidance leads each of them away from."""

    text: TextFeatures
    negative: TextFeatures
    """As many as ``text``, and as long."""


@dataclass(frozen=True)
class Start:
    """Clean latents of a picture that sampling starts from."""

    latents: Tensor
    """``(1, C, h, w)`` float32, the same for all pictures of the batch, or ``(B, C, h, w)``."""
    strength: float = 1.0
    """Diffusion time to which they are noised; all steps lie between it and 0."""
    kept: Tensor | None = None
    """``(1, 1, h, w)``: where it is 1 the latents come out as they are, where it is 0 anew."""


@dataclass(frozen=True)
class Shown:
    """What Stage C is shown beside the prompt; the same for all pictures of a batch."""

    image: Tensor | None = None
    """``(1, n, E)`` CLIP embeddings of pictures to vary."""
    control: tuple[Maps, Maps] | None = None
    """A ControlNet's maps for the conditional and the unconditional half, one picture each."""


def sample_stage_c(
    network: StageC | StageCV2,
    sampling: StageSampling,
    prompted: Prompted,
    noise: PictureNoise,
    latent_size: tuple[int, int],
    *,
    start: Start | None = None,
    shown: Shown | None = None,
    graphs: CudaGraphs | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw Stage C latents of B prompts.

    Args:
        network: Stage C; device and number format are those of its weights.
        sampling: Sampler, steps, guidance.
        prompted: The prompts' states.
        noise: One seed for each picture.
        latent_size: Height and width of the latents.
        start: A picture to start from.
        shown: What the v3 network is shown beside the prompts.
        graphs: Records and replays the network's passes.
        on_step: Called after each step.

    Returns:
        ``(B, 16, h, w)`` float32.

    Raises:
        NonFiniteError: Naming the step.
    """
    weight = example_of(network)
    states = (prompted.text, prompted.negative)
    cond: Any
    uncond: Any
    if isinstance(network, StageCV2):
        cond, uncond = (StageCV2Condition(one.hidden.to(weight)) for one in states)
    else:
        cond, uncond = (
            StageCCondition(one.hidden.to(weight), one.pooled.to(weight)) for one in states
        )
        if shown is not None:
            cond, uncond = _show(shown, cond, uncond)
        if "cfg" in network.config.time_conds:
            cond = replace(cond, cfg=scales(sampling, prompted, weight))
    x = noise.randn((network.config.latent_channels, *latent_size))
    return sample_latents(
        "Stage C",
        network,
        walk_of(sampling),
        network.prepare,
        (cond, uncond),
        noise,
        x,
        start=start,
        graphs=graphs,
        on_step=on_step,
    )


def _show(
    shown: Shown, cond: StageCCondition, uncond: StageCCondition
) -> tuple[StageCCondition, StageCCondition]:
    """Put what is shown into both conditions, once for each picture."""
    count = len(cond.text_pooled)
    if shown.image is not None:
        image = shown.image.to(cond.text_pooled).expand(count, -1, -1)
        cond = replace(cond, image=image)
        uncond = replace(uncond, image=torch.zeros_like(image))  # as published
    if shown.control is not None:
        told, untold = (
            tuple(None if one is None else one.expand(count, -1, -1, -1) for one in maps)
            for maps in shown.control
        )
        cond, uncond = replace(cond, control=told), replace(uncond, control=untold)
    return cond, uncond


def scales(sampling: StageSampling, prompted: Prompted, weight: Tensor) -> Tensor:
    """Return the guidance scale ``(B,)`` that a network is told, float32."""
    return torch.full((len(prompted.text.pooled),), sampling.guidance, device=weight.device)


def sample_stage_b(
    network: StageB | StageBV2,
    sampling: StageSampling,
    stage_c_latents: Tensor,
    prompted: Prompted,
    noise: PictureNoise,
    latent_shape: tuple[int, int, int],
    *,
    start: Start | None = None,
    graphs: CudaGraphs | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw Stage B latents that fit Stage C latents ``(B, 16, h, w)``.

    Guidance leads away from the negative prompt with Stage C latents of zeros, as in training.

    Args:
        network: Stage B; device and number format are those of its weights.
        sampling: Sampler, steps, guidance.
        stage_c_latents: What Stage C drew, or the compressor made of a picture, in the scale that
            Stage B was trained on.
        prompted: The prompts' states.
        noise: One seed for each picture.
        latent_shape: Channels, height and width of the latents: Stage A's.
        start: A picture to start from.
        graphs: Records and replays the network's passes.
        on_step: Called after each step.

    Returns:
        ``(B, 4, H/4, W/4)`` float32.

    Raises:
        NonFiniteError: Naming the step.
    """
    weight = example_of(network)
    latents = stage_c_latents.to(weight)
    cond: Any
    uncond: Any
    if isinstance(network, StageBV2):
        cond = StageBV2Condition(latents, prompted.text.hidden.to(weight))
        uncond = StageBV2Condition(torch.zeros_like(latents), prompted.negative.hidden.to(weight))
    else:
        cond = StageBCondition(latents, prompted.text.pooled.to(weight))
        uncond = StageBCondition(torch.zeros_like(latents), prompted.negative.pooled.to(weight))
        if "cfg" in network.config.time_conds:
            cond = replace(cond, cfg=scales(sampling, prompted, weight))

    def prepare(told: Any) -> Any:
        return network.prepare(told, latent_shape[1:])

    x = noise.randn(latent_shape)
    return sample_latents(
        "Stage B",
        network,
        walk_of(sampling),
        prepare,
        (cond, uncond),
        noise,
        x,
        start=start,
        graphs=graphs,
        on_step=on_step,
    )


@dataclass(frozen=True)
class Walk:
    """How a sampler walks from noise to latents, whatever the network."""

    schedule: NoiseSchedule
    prediction: Prediction
    time_input: Literal["cosine", "raw"]
    """See ``Denoiser``."""
    sampler: Sampler
    times: Tensor
    """Decreasing, one more than steps."""
    guidance: float
    """1 is off."""
    rescale: float = 0.0
    """See ``Guided``."""
    interval: tuple[float, float] = (0.0, 1.0)
    """See ``Guided``."""
    is_consistency: bool = False
    """Whether the estimate of x0 is made a consistency function."""


def walk_of(sampling: StageSampling) -> Walk:
    """Return how a stage of the cascade is sampled."""
    sampler = SAMPLERS[sampling.sampler]
    if sampling.sampler == "ddpm":
        sampler = partial(sample_ddpm, last=sampling.last_step)
    return Walk(
        schedule=sampling.noise_schedule(),
        prediction=Prediction(sampling.prediction),
        time_input=sampling.time_input,
        sampler=sampler,
        times=torch.tensor(sampling.times) if sampling.times else equal_times(sampling.steps),
        guidance=sampling.guidance if sampling.is_guided_by_passes else 1.0,
        rescale=sampling.rescale,
        interval=sampling.guidance_interval,
    )


def sample_latents(
    stage: str,
    network: StageC | StageCV2 | StageB | StageBV2 | UNet,
    walk: Walk,
    prepare: Callable[[Any], Any],
    conds: tuple[Any, Any],
    noise: PictureNoise,
    x: Tensor,
    *,
    start: Start | None = None,
    graphs: CudaGraphs | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample from noise ``x``, ``(B, C, h, w)``, with a check at every step.

    Args:
        stage: Name of the network, for messages.
        network: The network; device and number format are those of its weights.
        walk: How.
        prepare: Makes the network's prepared condition of one for any number of pictures.
        conds: The conditional and the unconditional condition of B pictures.
        noise: Source of fresh noise.
        x: Where the walk starts.
        start: A picture to start from instead.
        graphs: Records and replays the network's passes.
        on_step: Called after each step.

    Returns:
        ``(B, C, h, w)`` float32.

    Raises:
        NonFiniteError: Naming the step.
    """
    weight = example_of(network)
    finite = FiniteSteps(stage, weight.dtype, weight.device)

    def check(info: StepInfo) -> None:
        finite.see(info.x0_hat, info.index, info.num_steps)
        if on_step is not None:
            on_step(info)

    schedule, times = walk.schedule, walk.times
    if start is not None:
        times = times * start.strength
    table = timetable_of(schedule, times[:-1], weight.device, walk.time_input)

    def by_time(cond: Any) -> ByTime:
        return ByTime(network.at_times(prepare(cond), table.network_times))

    run = network if graphs is None else graphs.of(network)
    denoiser = Denoiser(run, schedule, walk.prediction, walk.time_input, weight.dtype, table)
    denoise: Denoise
    if walk.guidance == 1:
        denoise = unguided(denoiser, by_time(conds[0]))
    else:
        pauses = not all(is_within(time, walk.interval) for time in times[:-1].tolist())
        denoise = Guided(
            denoiser,
            by_time(conds[0]) if pauses else None,
            by_time(concat(conds)),
            walk.guidance,
            walk.rescale,
            walk.interval,
        )
    if walk.is_consistency:
        denoise = consistent(denoise, schedule.network_time)
    x = x.to(weight.device)
    if start is not None:
        latents = start.latents.to(x).expand_as(x)
        x = diffuse(latents, x, times[:1].to(x.device).expand(len(x)), schedule)
        if start.kept is not None:
            denoise = keeping(denoise, latents, start.kept.to(x))
    latents = walk.sampler(
        denoise,
        schedule,
        x,
        times,
        randn_like=noise.randn_like,
        on_step=check,
    )
    finite.check()
    return latents
