"""Networks that steps or guidance were distilled into: what they say, and when they run.

A model may hold a network for few steps beside the plain one of a stage. The number of steps that
is asked for says which of them runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cascade.checkpoints.said import said_in
from cascade.config import from_dict
from cascade.errors import UserError
from cascade.pipelines.spec import CascadeSpec, Stage, StageSampling

DISTILLED_KEY = "cascade_distilled"
"""Metadata of an exported file: how a distilled network is sampled, beside what it predicts."""
DISTILLED = ("sampler", "steps", "times", "guidance", "rescale", "guidance_range", "max_steps")
"""Fields of :class:`StageSampling` that it says."""


def distilled_metadata(sampling: StageSampling) -> dict[str, str]:
    """Return what a distilled network's file says of its sampling."""
    values = {name: getattr(sampling, name) for name in DISTILLED}
    return {DISTILLED_KEY: json.dumps(values)}


def distilled_said(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """Return what a distilled network's file says of its sampling; of another network nothing.

    Args:
        metadata: The file's.
        where: The file, for errors.

    Raises:
        UserError: They are damaged.
    """
    values = said_in(metadata, DISTILLED_KEY, where)
    where = f"{where}: its metadata's {DISTILLED_KEY}"
    for name in values:
        if name not in DISTILLED:
            raise UserError(f"{where} says {name}, which no distilled network's does")
    sampling = from_dict(StageSampling, values, where)
    return {name: getattr(sampling, name) for name in values}


def as_distilled(sampling: StageSampling, metadata: Mapping[str, str], where: str) -> StageSampling:
    """Return a sampling with all that a distilled network's file says of it; else as it is.

    Raises:
        UserError: The file's metadata are damaged.
    """
    return replace(sampling, **distilled_said(metadata, where))


def choose(
    spec: CascadeSpec,
    stage: Stage,
    steps: int | None,
    sampler: str | None,
    *,
    from_within: bool = False,
) -> tuple[StageSampling, frozenset[Stage]]:
    """Choose between a stage's plain network and the one for few steps.

    Args:
        spec: The model.
        stage: Which stage.
        steps: Steps that are asked for; None: the model's own.
        sampler: The sampler that is asked for; None: the model's own.
        from_within: Whether the walk begins at a picture with some noise: a network that jumps from
            each of its own steps to the next knows no others.

    Returns:
        The network's own sampling; the stage itself if the one for few steps runs, else nothing.
    """
    few: StageSampling | None = getattr(spec, f"{stage}_few")
    if few is None or few.max_steps is None:
        return spec.sampling(stage, few=False), frozenset()
    takes_few = spec.prefers_few and sampler in (None, few.sampler)
    if steps is not None:
        takes_few = takes_steps(few, steps)
    if from_within and few.walks_whole:
        takes_few = False
    return spec.sampling(stage, few=takes_few), frozenset({stage} if takes_few else ())


def takes_steps(own: StageSampling, steps: int) -> bool:
    """Return whether a network was made for a number of steps.

    One that jumps to clean latents ("lcm") takes any number up to its largest, one that jumps from
    each of its steps to the next that number alone, a plain one any.
    """
    if own.walks_whole:
        return steps == own.steps
    return own.max_steps is None or steps <= own.max_steps


def own_choice(spec: CascadeSpec) -> frozenset[Stage]:
    """Return the stages whose network for few steps runs when nothing is asked for."""
    return choose(spec, "stage_c", None, None)[1] | choose(spec, "stage_b", None, None)[1]


def check_told(stage: str, time_conds: tuple[str, ...], sampling: StageSampling) -> None:
    """Refuse a network that is told a guidance scale, or is not, against what its settings say.

    Raises:
        UserError: Naming the setting.
    """
    told, known = "cfg" in time_conds, sampling.guidance_range
    if told and known is None:
        raise UserError(
            f"{stage}: guidance was distilled into this network, but its guidance_range is not in "
            "model.json; copy it from the metadata of its file"
        )
    if not told and known is not None and known[0] < known[1]:
        raise UserError(
            f"{stage}: model.json says guidance_range {known}, but the network is told no scale; "
            "leave it out, or take the network that was distilled"
        )


def check_steps(name: str, steps: int, own: StageSampling) -> None:
    """Refuse steps that a network was not distilled for.

    Raises:
        UserError: Saying how many it takes.
    """
    if takes_steps(own, steps):
        return
    takes = "alone" if own.walks_whole else f"and takes up to {own.max_steps}"
    raise UserError(
        f"{name} {steps}: this network was distilled for {own.steps} steps {takes}, and the model "
        "has no plain one"
    )


def check_start(own: StageSampling) -> None:
    """Refuse to begin within the walk of a network that jumps from each of its steps to the next.

    Raises:
        UserError: Saying what works.
    """
    if own.walks_whole:
        raise UserError(
            f"strength: this Stage C was distilled for whole walks of {own.steps} steps, and the "
            "model has no plain one; set it to 1"
        )


def check_range(name: str, scale: float, own: StageSampling) -> None:
    """Refuse a guidance scale that was not distilled into a network.

    Raises:
        UserError: Saying which were.
    """
    if own.guidance_range is None:
        return
    low, high = own.guidance_range
    if not low <= scale <= high:
        known = f"{low:g} alone was" if low == high else f"{low:g} to {high:g} were"
        raise UserError(f"{name} {scale:g}: {known} distilled into this network")


def check_sampler(stage: str, sampler: str, own: StageSampling) -> None:
    """Refuse a sampler that a network was not made for.

    Raises:
        UserError: A network for few steps is sampled by its own, and no other by "lcm".
    """
    if own.max_steps is not None and sampler != own.sampler:
        raise UserError(
            f"sampler {sampler!r}: this {stage} was distilled for few steps of {own.sampler!r}; "
            "leave it out, or ask for the steps of a plain one"
        )
    if sampler == "lcm" and own.sampler != "lcm":
        raise UserError(
            f"sampler 'lcm': steps were not distilled into this {stage}; take another one"
        )
