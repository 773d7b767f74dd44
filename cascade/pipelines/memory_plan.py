"""Which part of a cascade is on the device when, so that a picture fits into its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cascade.config import nearest
from cascade.errors import UserError
from cascade.pipelines.memory import Footprint

Way = Literal["stay", "stage", "layer"]
"""A part stays on the device; comes for its stage and goes; or comes layer by layer."""
Offload = Literal["none", "model", "sequential"]
OFFLOADS: tuple[Offload, ...] = ("none", "model", "sequential")

GIB = 2**30
RESERVE = 3 * GIB // 4
"""Bytes of a budget that no plan touches: CUDA's own context, the private workspaces of kernels,
and what the allocator loses by rounding. It is no computed figure."""

_WAY_OF: dict[Offload, Way] = {"none": "stay", "model": "stage", "sequential": "layer"}
_TITLES = {
    "text": "text",
    "text_b": "Stage B's text",
    "stage_c": "Stage C",
    "stage_b": "Stage B",
    "stage_a": "Stage A",
}


@dataclass(frozen=True)
class MemoryPlan:
    """Where the parts are while pictures are made; every plan makes the same pictures."""

    offload: Offload
    """The way of the parts that ``ways`` does not name."""
    ways: Mapping[str, Way] = field(default_factory=dict)
    """The way of "text", "stage_c", and so on."""
    tile: int | None = None
    """Side of Stage A's tiles in latent cells; None: the picture as a whole."""
    batch_size: int | None = None
    """Pictures that may run together; None: as many as the pipeline likes."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """Computed bytes on the device while each part runs, without the reserve; empty if nothing
    had to be computed."""
    text: str = ""
    """What was chosen, and why."""

    def way(self, part: str) -> Way:
        """Return the way of a part; parts that no plan names are small and come for their stage."""
        if part in self.ways:
            return self.ways[part]
        return "stay" if self.offload == "none" and not self.peaks else "stage"

    @property
    def peak(self) -> int:
        """The most computed bytes, the reserve included; 0 if nothing had to be computed."""
        return max(self.peaks.values()) + RESERVE if self.peaks else 0

    def describe(self) -> str:
        """Return one line: what was chosen, and why."""
        return self.text


def check_offload(offload: str | None) -> Offload | None:
    """Return a known way to offload.

    Raises:
        UserError: Naming the nearest.
    """
    for known in OFFLOADS:
        if offload == known:
            return known
    if offload is None:
        return None
    guess = nearest(str(offload), OFFLOADS)
    hint = f"did you mean {guess!r}? " if guess else ""
    raise UserError(f"offload {offload!r}: {hint}valid: {', '.join(OFFLOADS)}")


def check_vram(vram: float | None) -> int | None:
    """Return a budget of GiB in bytes.

    Raises:
        UserError: If it is no positive number.
    """
    if vram is None:
        return None
    if isinstance(vram, bool) or not isinstance(vram, (int, float)):
        raise UserError(f"vram {vram!r}: a number of GiB is needed, such as 8")
    if not math.isfinite(vram) or vram <= 0:
        raise UserError(f"vram {vram:g}: a positive number of GiB is needed, such as 8")
    return int(vram * GIB)


def preset(offload: Offload, device: str) -> MemoryPlan:
    """Return the plan of a mode that was asked for by name, whatever the memory."""
    texts = {
        "none": f"offload none: all parts stay on {device}",
        "model": f"offload model: each part is on {device} for its own stage, the text encoder "
        "first and then away",
        "sequential": f"offload sequential: every part comes to {device} layer by layer, which "
        "needs the least memory and the most time",
    }
    text = texts[offload]
    if device.startswith("cpu") and offload != "none":
        text = (
            f"offload {offload}: nothing is saved on a CPU, whose memory holds the weights anyway"
        )
    ways = dict.fromkeys(_TITLES, _WAY_OF[offload])
    return MemoryPlan(offload, ways, text=text)


def pick_plan(
    sizes: Mapping[str, Footprint],
    budget: int,
    batches: Sequence[int],
    *,
    offload: Offload | None = None,
    what: str = "the picture",
    cell: int = 4,
) -> MemoryPlan:
    """Pick the fastest plan that fits.

    In this order: all parts stay; the text encoder goes when the prompts are encoded; every part
    is there for its own stage alone; parts that even so are too large come layer by layer. Within
    each, fewer pictures together before the next; Stage A in tiles only where it must.

    While a part runs the device holds the weights of all parts that stay, its own weights (or, of
    those that come layer by layer, its largest layer), and what it works on, which is proportional
    to the pictures that run together; tiles are decoded one at a time.

    Args:
        sizes: What each part takes, by name.
        budget: Bytes that may be taken, ``RESERVE`` included.
        batches: Numbers of pictures to run together, best first.
        offload: One mode instead of all.
        what: The picture, for the line.
        cell: Pixels along a side of a latent cell, for the line.

    Raises:
        UserError: If nothing fits; it says what would.
    """
    room = budget - RESERVE
    for mode, ways in _candidates(sizes, room, offload):
        for batch in batches:
            fitted = _fit(sizes, ways, batch, room)
            if fitted is not None:
                tile, peaks = fitted
                text = _describe(sizes, mode, ways, batch, tile, peaks, budget, what, cell)
                return MemoryPlan(mode, ways, tile, batch, peaks, text)
    raise UserError(_nothing_fits(sizes, budget, batches, offload, what))


def _candidates(
    sizes: Mapping[str, Footprint], room: int, offload: Offload | None
) -> Iterator[tuple[Offload, dict[str, Way]]]:
    modes = OFFLOADS if offload is None else (offload,)
    for mode in modes:
        if mode == "sequential" and offload is None:
            break
        if mode == "model" and offload is None:
            text_goes = {part: _stay_unless_text(part) for part in sizes}
            yield "model", text_goes
        yield mode, dict.fromkeys(sizes, _WAY_OF[mode])
    if offload is None:
        yield (
            "sequential",
            {
                part: "stage" if size.weights + _least_working(size) <= room else "layer"
                for part, size in sizes.items()
            },
        )


def _stay_unless_text(part: str) -> Way:
    return "stage" if part.startswith("text") else "stay"


def _fit(
    sizes: Mapping[str, Footprint], ways: Mapping[str, Way], batch: int, room: int
) -> tuple[int | None, dict[str, int]] | None:
    """Return the side of a tile and the peaks with which everything fits, or None."""
    there = {part: _present(sizes, ways, part) for part in sizes}
    peaks = {part: there[part] + _working(size, part, batch) for part, size in sizes.items()}
    if all(peak <= room for part, peak in peaks.items() if part != "stage_a"):
        if peaks["stage_a"] <= room:
            return None, peaks
        for tile, working in (sizes["stage_a"].tiled or {}).items():
            if there["stage_a"] + working <= room:
                return tile, {**peaks, "stage_a": there["stage_a"] + working}
    return None


def _present(sizes: Mapping[str, Footprint], ways: Mapping[str, Way], part: str) -> int:
    """Bytes of weights that are on the device while ``part`` runs."""
    staying = sum(size.weights for one, size in sizes.items() if ways[one] == "stay")
    own = {"stay": 0, "stage": sizes[part].weights, "layer": sizes[part].layer}
    return staying + own[ways[part]]


def _working(size: Footprint, part: str, batch: int) -> int:
    return size.working * (1 if part.startswith("text") else batch)  # prompts come one at a time


def _least_working(size: Footprint) -> int:
    return min((size.working, *(size.tiled or {}).values()))


def _needed(sizes: Mapping[str, Footprint], mode: Offload, batch: int) -> int:
    """Bytes that a mode needs at least, the reserve included."""
    ways = dict.fromkeys(sizes, _WAY_OF[mode])
    return RESERVE + max(
        _present(sizes, ways, part)
        + (_least_working(size) if part == "stage_a" else _working(size, part, batch))
        for part, size in sizes.items()
    )


def _nothing_fits(
    sizes: Mapping[str, Footprint],
    budget: int,
    batches: Sequence[int],
    offload: Offload | None,
    what: str,
) -> str:
    batch = min(batches)
    together = f", {batch} together" if batch > 1 else ""
    mode: Offload = offload or "sequential"
    least = math.ceil(_needed(sizes, mode, batch) / GIB * 10) / 10
    cures = ["make a smaller picture"]
    if batch > 1:
        cures.insert(0, "run fewer together")
    if mode != "sequential":  # layer by layer, smaller weights would change nothing
        lowest = math.ceil(_needed(sizes, "sequential", batch) / GIB * 10) / 10
        cures.insert(0, f"leave --offload to --vram ({lowest:g} GiB would do)")
        cures.append("or take the model's smaller weights (:lite) where it has them")
    return (
        f"vram {budget / GIB:.4g}: {what}{together} with offload {mode} needs at least {least:g} "
        f"GiB, {RESERVE / GIB:g} of them for CUDA itself; {', '.join(cures)}"
    )


def _describe(
    sizes: Mapping[str, Footprint],
    mode: Offload,
    ways: Mapping[str, Way],
    batch: int,
    tile: int | None,
    peaks: Mapping[str, int],
    budget: int,
    what: str,
    cell: int,
) -> str:
    layered = [_TITLES[part] for part, way in ways.items() if way == "layer"]
    if layered:
        chosen = f"{', '.join(layered)} layer by layer"
        chosen += "" if len(layered) == len(sizes) else ", the rest stage by stage"
    elif mode == "none":
        chosen = "everything stays on the device"
    elif ways["stage_c"] == "stay":
        chosen = "the text encoder first and then away, the stages stay"
    else:
        chosen = "stage by stage on the device, the text encoder first and then away"
    if tile is not None:
        chosen += f", Stage A in tiles of {tile * cell} px"
    if batch > 1:
        chosen += f", up to {batch} pictures together"
    worst = max(peaks, key=lambda part: peaks[part])
    weights = ", ".join(f"{_TITLES[part]} {size.weights / GIB:.2f}" for part, size in sizes.items())
    peak = f"{(peaks[worst] + RESERVE) / GIB:.2f} GiB in {_TITLES[worst]}"
    return (
        f"memory plan for {what} in {budget / GIB:.4g} GiB: {chosen} (offload {mode}); computed "
        f"peak {peak}, {RESERVE / GIB:g} of it for CUDA itself; weights in GiB: {weights}"
    )
