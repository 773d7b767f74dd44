"""Which part of a cascade is on the device when, so that a picture fits into its memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from cascade.config import not_among
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
    "text_2": "the second text",
    "unet": "the U-Net",
    "autoencoder": "the autoencoder",
    "image_encoder": "the CLIP image encoder",
    "compressor": "the semantic compressor",
    "controlnet": "the ControlNet",
    "stage_a_encoder": "Stage A's encoder",
    "autoencoder_encoder": "the autoencoder's encoder",
}
_ENCODERS = ("stage_a_encoder", "autoencoder_encoder")
"""What runs with the weights of a part that decodes as well."""
_READING = ("image_encoder", "compressor", "controlnet", *_ENCODERS)
"""What runs before the stages, on one picture, and only if there is one."""
_PARTS = tuple(part for part in _TITLES if part not in _ENCODERS)
"""What has weights of its own."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where the parts are while pictures are made.

    Every plan makes the same pictures, but for the tiles of a U-Net's autoencoder: see ``tiles``.
    """

    offload: Offload
    """The way of the parts that ``ways`` does not name."""
    ways: Mapping[str, Way] = field(default_factory=dict)
    """The way of "text", "stage_c", and so on."""
    tile: int | None = None
    """Side of the autoencoder's tiles in latent cells; None: the picture as a whole."""
    encoder_tile: int | None = None
    """The same of its encoder."""
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
    def one_by_one(self) -> bool:
        """Whether pictures are read one at a time, as was computed; else as they are given."""
        return bool(self.peaks)

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
    raise not_among("offload", offload, OFFLOADS)


def check_vram(vram: float | None) -> int | None:
    """Return a budget of GiB in bytes.

    Raises:
        UserError: If it is no positive number.
    """
    if vram is None:
        return None
    if isinstance(vram, bool) or not isinstance(vram, (int, float)):
        raise UserError(f"vram {vram!r}: a number of GiB is needed, such as 8")
    if not math.isfinite(vram * GIB) or vram <= 0:
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
    ways = dict.fromkeys(_PARTS, _WAY_OF[offload])
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
    each, fewer pictures together before the next; Stage A in tiles only where it must. Tiles that
    make another picture come after all of these.

    While a part runs the device holds the weights of all parts that stay, its own weights (or, of
    those that come layer by layer, its largest layer), and what it works on, which is proportional
    to the pictures that run together; tiles are decoded one at a time. What reads a picture comes
    for that alone and never stays; its pictures, too, come one at a time.

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
    blamed: tuple[str, ...] = ()
    tried: list[Mapping[str, Footprint]] = [sizes]
    if any(size.tiles_differ for size in sizes.values()):
        whole = {
            step: replace(size, tiled=None) if size.tiles_differ else size
            for step, size in sizes.items()
        }
        tried.insert(0, whole)
    for tiled in tried:
        for mode, ways in _candidates(tiled, room, offload):
            for batch in batches:
                fit = _fit(tiled, ways, batch, room)
                if not fit.tight:
                    plan = MemoryPlan(
                        offload=mode,
                        ways=ways,
                        tile=fit.tiles.get("stage_a", fit.tiles.get("autoencoder")),
                        encoder_tile=next(
                            (fit.tiles[one] for one in _ENCODERS if one in fit.tiles), None
                        ),
                        batch_size=batch,
                        peaks=fit.peaks,
                    )
                    return replace(plan, text=_describe(sizes, plan, blamed, budget, what, cell))
                if not blamed and all(step in _READING for step in fit.tight):
                    blamed = fit.tight  # a prompt alone would have been made this way
    raise UserError(_nothing_fits(sizes, budget, batches, offload, what))


@dataclass(frozen=True)
class _Fit:
    """How far everything fits."""

    tight: tuple[str, ...]
    """What does not."""
    tiles: Mapping[str, int]
    """Sides of the tiles that are needed, in latent cells."""
    peaks: Mapping[str, int]
    """Bytes while each part runs."""


def _candidates(
    sizes: Mapping[str, Footprint], room: int, offload: Offload | None
) -> Iterator[tuple[Offload, dict[str, Way]]]:
    parts = [part for part, size in sizes.items() if size.of is None]
    modes = OFFLOADS if offload is None else (offload,)
    for mode in modes:
        if mode == "sequential" and offload is None:
            break
        if mode == "model" and offload is None:
            yield "model", {part: _stay_unless_text(part) for part in parts}
        yield mode, _same_way(parts, mode)
    if offload is None:
        least = {
            part: max(
                (
                    _least_working(size)
                    for step, size in _running(sizes)
                    if part == _part(step, size)
                ),
                default=0,
            )
            for part in parts
        }
        yield (
            "sequential",
            {
                part: "stage" if sizes[part].weights + least[part] <= room else "layer"
                for part in parts
            },
        )


def _same_way(parts: Iterable[str], mode: Offload) -> dict[str, Way]:
    way = _WAY_OF[mode]
    return {part: "stage" if way == "stay" and part in _READING else way for part in parts}


def _stay_unless_text(part: str) -> Way:
    return "stage" if part.startswith("text") or part in _READING else "stay"


def _running(sizes: Mapping[str, Footprint]) -> list[tuple[str, Footprint]]:
    return [(step, size) for step, size in sizes.items() if not size.idle]


def _part(step: str, size: Footprint) -> str:
    """Return the part whose weights a step runs with."""
    return size.of or step


def _fit(sizes: Mapping[str, Footprint], ways: Mapping[str, Way], batch: int, room: int) -> _Fit:
    """Find out whether everything fits; what can be tiled is, in tiles as large as possible."""
    tight, tiles, peaks = [], {}, {}
    for step, size in _running(sizes):
        there = _present(sizes, ways, step)
        peaks[step] = there + _working(size, step, batch)
        if peaks[step] <= room:
            continue
        for tile, working in (size.tiled or {}).items():
            if there + working <= room:
                tiles[step], peaks[step] = tile, there + working
                break
        else:
            tight.append(step)
    return _Fit(tuple(tight), tiles, peaks)


def _present(sizes: Mapping[str, Footprint], ways: Mapping[str, Way], step: str) -> int:
    """Bytes of weights that are on the device while ``step`` runs."""
    staying = sum(sizes[part].weights for part, way in ways.items() if way == "stay")
    size = sizes[step]
    own = {"stay": 0, "stage": size.weights, "layer": size.layer}
    return staying + own[ways[_part(step, size)]]


def _working(size: Footprint, step: str, batch: int) -> int:
    # Prompts and pictures come one at a time, and a U-Net's autoencoder decodes so.
    alone = step.startswith("text") or step in _READING or step == "autoencoder"
    return size.working * (1 if alone else batch)


def _least_working(size: Footprint) -> int:
    return min((size.working, *(size.tiled or {}).values()))


def _needed(sizes: Mapping[str, Footprint], mode: Offload, batch: int) -> tuple[int, str]:
    """Bytes that a mode needs at least, the reserve included, and what needs them."""
    ways = _same_way((part for part, size in sizes.items() if size.of is None), mode)
    least = {
        step: _present(sizes, ways, step)
        + (_least_working(size) if size.tiled else _working(size, step, batch))
        for step, size in _running(sizes)
    }
    worst = max(least, key=lambda step: least[step])
    return RESERVE + least[worst], worst


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
    needed, worst = _needed(sizes, mode, batch)
    least = math.ceil(needed / GIB * 10) / 10
    where = f" in {_TITLES[worst]}" if worst in _READING else ""
    cures = ["make a smaller picture"]
    if batch > 1:
        cures.insert(0, "run fewer together")
    if mode != "sequential":  # layer by layer, smaller weights would change nothing
        lowest = math.ceil(_needed(sizes, "sequential", batch)[0] / GIB * 10) / 10
        cures.insert(0, f"leave --offload to --vram ({lowest:g} GiB would do)")
        cures.append("or take the model's smaller weights (:lite) where it has them")
    return (
        f"vram {budget / GIB:.4g}: {what}{together} with offload {mode} needs at least {least:g} "
        f"GiB{where}, {RESERVE / GIB:g} of them for CUDA itself; {', '.join(cures)}"
    )


def _describe(
    sizes: Mapping[str, Footprint],
    plan: MemoryPlan,
    blamed: Sequence[str],
    budget: int,
    what: str,
    cell: int,
) -> str:
    ways, peaks = plan.ways, plan.peaks
    running = {_part(step, size) for step, size in _running(sizes)}
    layered = [_TITLES[part] for part, way in ways.items() if way == "layer" and part in running]
    if layered:
        chosen = f"{', '.join(layered)} layer by layer"
        chosen += "" if len(layered) == len(running) else ", the rest stage by stage"
    elif plan.offload == "none":
        chosen = "everything stays on the device"
    elif any(ways.get(part) == "stay" for part in ("stage_c", "unet")):
        chosen = "the text encoder first and then away, the stages stay"
    else:
        chosen = "stage by stage on the device, the text encoder first and then away"
    visiting = [_TITLES[part] for part in _READING if part in ways]
    if visiting and "stay" in ways.values():
        chosen += f", {' and '.join(visiting)} only to read the picture"
    if blamed:
        chosen += f", for what {' and '.join(_TITLES[step] for step in blamed)} needs"
    autoencoder = "stage_a" if "stage_a" in sizes else "autoencoder"
    decoder, encoder = _TITLES[autoencoder], _TITLES[f"{autoencoder}_encoder"]
    for tile, title in ((plan.tile, decoder), (plan.encoder_tile, encoder)):
        if tile is not None:
            chosen += f", {title} in tiles of {tile * cell} px"
    tiled = plan.tile is not None or plan.encoder_tile is not None
    if tiled and any(size.tiles_differ for size in sizes.values()):
        chosen += " (the picture differs a little from the whole one's)"
    if plan.batch_size is not None and plan.batch_size > 1:
        chosen += f", up to {plan.batch_size} pictures together"
    worst = max(peaks, key=lambda part: peaks[part])
    weights = ", ".join(f"{_TITLES[part]} {sizes[part].weights / GIB:.2f}" for part in ways)
    peak = f"{(peaks[worst] + RESERVE) / GIB:.2f} GiB in {_TITLES[worst]}"
    return (
        f"memory plan for {what} in {budget / GIB:.4g} GiB: {chosen} (offload {plan.offload}); "
        f"computed peak {peak}, {RESERVE / GIB:g} of it for CUDA itself; weights in GiB: {weights}"
    )
