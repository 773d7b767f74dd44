"""What a network that steps or guidance were distilled into says of its own sampling."""

from __future__ import annotations

import json
from dataclasses import replace

from cascade.pipelines.spec import StageSampling

DISTILLED_KEY = "cascade_distilled"
"""Metadata of an exported file: how a distilled network is sampled, beside what it predicts."""
DISTILLED = ("sampler", "steps", "times", "guidance", "rescale", "guidance_range", "max_steps")
"""Fields of :class:`StageSampling` that it says."""


def distilled_metadata(sampling: StageSampling) -> dict[str, str]:
    """Return what a distilled network's file says of its sampling."""
    values = {name: getattr(sampling, name) for name in DISTILLED}
    return {DISTILLED_KEY: json.dumps(values)}


def as_distilled(sampling: StageSampling, metadata: dict[str, str]) -> StageSampling:
    """Return a sampling with all that a distilled network's file says of it; else as it is."""
    said = json.loads(metadata.get(DISTILLED_KEY, "{}"))
    for name in ("times", "guidance_range"):
        if said.get(name) is not None:
            said[name] = tuple(said[name])
    return replace(sampling, **said)
