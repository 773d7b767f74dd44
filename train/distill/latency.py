"""How long a U-Net takes, and which of its modules take how much of it, measured here."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stages.unet.compress import Recipe, plan_student
from stages.unet.unet import UNet


def compare_seconds(
    one: Callable[[], object], other: Callable[[], object], device: torch.device, repeats: int
) -> tuple[float, float]:
    """Return the durations of two calls, made in turn, after one of each that is not counted.

    The fastest of each counts: what else a machine does makes calls slower, never faster.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 1):
        for call, durations in zip((one, other), found, strict=True):
            start = _now(device)
            call()
            if number:
                durations.append(_now(device) - start)
    return min(found[0]), min(found[1])


def shares_of_modules(
    network: UNet, call: Callable[[], object], device: torch.device, repeats: int
) -> Mapping[str, float]:
    """Measure which share of a call each module takes by itself, without those inside it.

    Args:
        network: The network.
        call: Runs it once.
        device: Where it is.
        repeats: Runs; each module's fastest counts.

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
    fastest = {path: min(found) for path, found in own.items()}
    total = sum(fastest.values())
    return {path: seconds / total for path, seconds in fastest.items()}


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
