"""How long a U-Net takes, and which of its modules take how much of it, measured here."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.unet.compress import Recipe, plan_student
from stages.unet.unet import UNet


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median duration of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = _now(device)
        call()
        found.append(_now(device) - start)
    return statistics.median(found)


def shares_of_modules(
    network: UNet, call: Callable[[], object], device: torch.device, repeats: int
) -> Mapping[str, float]:
    """Measure which share of a call each module takes by itself, without those inside it.

    Args:
        network: The network.
        call: Runs it once.
        device: Where it is.
        repeats: Runs; each module's median counts.

    Returns:
        By the module's path, of all that a plan has an origin for; ``""`` is the rest, as the
        joining of skips. They sum to 1.
    """
    paths = ["", *plan_student(network.config, Recipe()).origins]
    own: dict[str, list[float]] = {path: [] for path in paths}
    call()
    for _ in range(repeats):
        with _timed(network, paths, device) as whole:
            call()
        for path in paths:
            inside = [other for other in paths if other and _parent(other, paths) == path]
            own[path].append(max(0.0, whole[path] - sum(whole[other] for other in inside)))
    medians = {path: statistics.median(found) for path, found in own.items()}
    total = sum(medians.values())
    return {path: seconds / total for path, seconds in medians.items()}


@contextmanager
def _timed(
    network: nn.Module, paths: list[str], device: torch.device
) -> Iterator[dict[str, float]]:
    """Add up the seconds of modules within the block, by hooks that it removes at its end."""
    found: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    handles = []

    def watch(path: str) -> None:
        def before(module: nn.Module, inputs: Any) -> None:
            started[path] = _now(device)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            found[path] += _now(device) - started[path]

        module = network.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for path in paths:
        watch(path)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _parent(path: str, paths: list[str]) -> str:
    """Return the innermost of the paths that a module is inside."""
    known = set(paths)
    above = path.rpartition(".")[0]
    while above not in known:
        above = above.rpartition(".")[0]
    return above


def _now(device: torch.device) -> float:
    """Return the time when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
