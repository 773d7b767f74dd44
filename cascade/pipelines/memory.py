"""How much device memory each part of a cascade takes: its weights, and what it works on.

Weights are counted. What a stage works on is computed, not guessed: the code that makes a picture
runs on the meta device, where tensors have a size and no content, and the bytes that are alive at
once are followed. Kernels' private workspaces and the allocator's rounding are not in it; plans
keep a reserve for them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cascade.control import control_maps, control_signal
from cascade.pipelines.memory_peak import peak_bytes
from cascade.pipelines.placement import Dtypes
from cascade.pipelines.sampling import (
    Prompted,
    Start,
    sample_stage_b,
    sample_stage_c,
    walk_of,
)
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.tiles import TILE_CELLS, decode_pixels
from cascade.rng import PictureNoise
from cascade.text.encoder import TextEncoder, TextFeatures
from cascade.text.picture_encoder import PictureEncoder
from stages.controlnet import ControlNet, ControlNetConfig
from stages.int8 import unpacked_bytes
from stages.layers import AttnBlock, TimestepBlock
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC
from stages.stage_c_v2 import StageCV2

WHOLE_BLOCKS = ("StageABlock",)
"""Modules whose forward reads their children's weights: brought to the device as a whole."""
_DEPTHS = ("down_blocks", "up_blocks", "up_repeats", "num_blocks", "decoder_blocks")


@dataclass(frozen=True)
class PictureWork:
    """What is read of a picture before the stages run, and what of it they keep."""

    compressed: tuple[int, int] | None = None
    """Height and width of the pixels that the semantic compressor sees; None, here and below:
    it sees none."""
    embedded: tuple[int, int] | None = None
    """Height and width of the square that CLIP's picture tower sees, before it is resized."""
    encoded: tuple[int, int] | None = None
    """Height and width of the pixels that Stage A's encoder sees."""
    controlled: tuple[int, int] | None = None
    """Height and width of the pixels that a ControlNet's signal is made of."""
    control: ControlNetConfig | None = None
    """That ControlNet."""
    starts: frozenset[str] = frozenset()
    """Stages that start from the picture's latents: "stage_c", "stage_b"."""
    idle: frozenset[str] = frozenset()
    """Parts that do not run in this call, although they may be on the device."""


NO_PICTURE = PictureWork()
"""Of a prompt alone."""


@dataclass(frozen=True)
class Workload:
    """What the stages work on for one picture."""

    stage_c: StageSampling
    """Sampling of Stage C; guidance doubles its batch."""
    stage_b: StageSampling
    """Sampling of Stage B."""
    stage_c_size: tuple[int, int]
    """Height and width of Stage C's latents."""
    latent_shape: tuple[int, int, int]
    """Channels, height and width of Stage B's latents."""
    text_length: int = 77
    """Tokens of a prompt's states, over all its windows."""
    picture: PictureWork = NO_PICTURE
    """What is read of a picture."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one part takes on the device."""

    weights: int
    """All of its weights."""
    layer: int
    """The most of them that are there at once when they come layer by layer."""
    working: int
    """What one picture needs besides."""
    tiled: Mapping[int, int] | None = None
    """The same by side of a tile in latent cells, largest first; autoencoders alone have it."""
    tiles_differ: bool = False
    """Whether tiles make another picture than the whole: they are then the last resort."""
    of: str | None = None
    """The part whose weights these are: Stage A's encoder runs with Stage A's. None: its own."""
    idle: bool = False
    """It does not run: only its weights count, and only where it stays."""


def footprints(
    stage_c: StageC | StageCV2,
    stage_b: StageB | StageBV2,
    stage_a: StageA,
    encoders: Mapping[str, TextEncoder],
    dtypes: Dtypes,
    workload: Workload,
    readers: Mapping[str, nn.Module] | None = None,
) -> dict[str, Footprint]:
    """Compute what each part takes, in bytes; takes seconds, and no memory to speak of.

    Args:
        stage_c: Stage C; its weights are only counted.
        stage_b: Stage B.
        stage_a: Stage A.
        encoders: Text encoders, each under the name of its part.
        dtypes: Number formats.
        workload: The picture.
        readers: The "compressor" and the "image_encoder", where the workload has use for them.
    """
    _, height, width = workload.latent_shape
    tiles = [side for side in TILE_CELLS if side < max(height, width)]
    twin_a = _twin(stage_a, dtypes.stage_a)

    def decode(tile: int | None) -> int:
        return _decoding(twin_a, dtypes.stage_a, workload, tile)

    sizes = {
        name: Footprint(*weight_bytes(encoder.model), encoding_bytes(encoder, workload.text_length))
        for name, encoder in encoders.items()
    }
    text = encoders["text"]
    text_b = encoders.get("text_b", text)
    twin_c, twin_b = _twin(stage_c, dtypes.stage_c), _twin(stage_b, dtypes.stage_b)
    tables = _tables(stage_c, twin_c, workload.stage_c, workload.text_length)
    sizes["stage_c"] = Footprint(
        *weight_bytes(stage_c),
        _drawing_c(twin_c, text, workload) + tables + unpacked_bytes(stage_c),
    )
    tables = _tables(stage_b, twin_b, workload.stage_b, workload.text_length)
    sizes["stage_b"] = Footprint(
        *weight_bytes(stage_b),
        _drawing_b(twin_b, text_b, workload) + tables + unpacked_bytes(stage_b),
    )
    sizes["stage_a"] = Footprint(
        *weight_bytes(stage_a), decode(None), {tile: decode(tile) for tile in tiles}
    )
    if workload.picture == NO_PICTURE:
        return sizes
    kept = _control_bytes(workload, dtypes.stage_c)
    for name, copies in (("stage_c", 3), ("stage_b", 1), ("stage_a", 1)):
        sizes[name] = _more(sizes[name], copies * kept)  # Stage C joins those of both halves
    for name in workload.picture.idle & sizes.keys():
        sizes[name] = replace(sizes[name], idle=True)
    return sizes | _reading(readers or {}, stage_a, dtypes, workload)


def _drawing_c(twin: Any, text: TextEncoder, workload: Workload) -> int:
    """Bytes of Stage C's sampling."""
    channels = twin.config.latent_channels
    in_a_step = peak_bytes(
        lambda: sample_stage_c(
            twin,
            _one_step(workload.stage_c),
            _prompted(text, workload),
            PictureNoise([0]),
            workload.stage_c_size,
            start=_start(workload, "stage_c", (channels, *workload.stage_c_size)),
        )
    )
    return in_a_step + kept_between_steps((channels, *workload.stage_c_size))


def _drawing_b(twin: Any, text: TextEncoder, workload: Workload) -> int:
    """Bytes of Stage B's sampling."""
    channels = twin.config.compressed_channels
    in_a_step = peak_bytes(
        lambda: sample_stage_b(
            twin,
            _one_step(workload.stage_b),
            torch.empty(1, channels, *workload.stage_c_size, device="meta"),
            _prompted(text, workload),
            PictureNoise([0]),
            workload.latent_shape,
            start=_start(workload, "stage_b", workload.latent_shape),
        )
    )
    return in_a_step + kept_between_steps(workload.latent_shape)


def _tables(network: Any, twin: Any, sampling: StageSampling, text_length: int) -> int:
    """Bytes that a network prepares for all steps and its twin does not: it has fewer blocks."""
    config = network.config
    told = 2 if sampling.is_guided_by_passes else 1
    told += told == 2 and sampling.guidance_interval != (0.0, 1.0)  # the prompt's alone as well
    rows = told if "cfg" in getattr(config, "time_conds", ()) else 1
    tokens = text_length  # and, at most, those of the pooled text and of a picture
    tokens += 2 * getattr(config, "pooled_tokens", 0)

    def count(one: nn.Module, steps: int) -> int:
        numbers = 0
        for module in one.modules():
            if isinstance(module, AttnBlock):
                numbers += 2 * module.norm.channels * tokens * told
            elif isinstance(module, TimestepBlock):
                numbers += module.mapper.out_features * steps * rows
        return numbers

    itemsize = next(twin.parameters()).element_size()
    return (count(network, len(walk_of(sampling).times) - 1) - count(twin, 1)) * itemsize


def _start(workload: Workload, stage: str, shape: tuple[int, ...]) -> Start | None:
    if stage not in workload.picture.starts:
        return None
    latents = torch.empty(1, *shape, device="meta")
    return Start(latents, 0.5, kept=torch.empty(1, 1, *shape[1:], device="meta"))


def _one_step(sampling: StageSampling) -> StageSampling:
    # Every sampler evaluates the network alike; "ddpm" does not look at values, of which there
    # are none.
    return replace(sampling, steps=1, times=(), sampler="ddpm", guidance_interval=(0.0, 1.0))


def kept_between_steps(latent_shape: tuple[int, int, int]) -> int:
    """Bytes that a sampler keeps from the steps before: x, x0, noise, a mean; float32."""
    return 4 * 4 * math.prod(latent_shape)


def _decoding(twin: Any, dtype: torch.dtype, workload: Workload, tile: int | None) -> int:
    """Bytes of Stage A's decoding; the picture that tiles are put together in is on the CPU."""
    channels, height, width = workload.latent_shape
    if tile is None:
        latents = (1, channels, height, width)
        return peak_bytes(lambda: decode_pixels(twin, torch.empty(latents, device="meta"), dtype))
    side = tile + 2 * twin.config.decoder_reach
    window = (1, channels, min(side, height), min(side, width))
    of_tile = peak_bytes(
        lambda: twin.decode(torch.empty(window, device="meta", dtype=dtype)).float()
    )
    whole_latents = (4 + dtype.itemsize) * channels * height * width
    return whole_latents + of_tile


def encoding_bytes(encoder: TextEncoder, length: int) -> int:
    """Bytes of encoding one prompt of so many tokens, from above: all states at once.

    A CLIP keeps the hidden states of every layer; a layer works on its input, queries, keys,
    values, the attention's scores and, twice, the wide middle of its MLP.
    """
    config: Any = encoder.model.config
    width = int(config.hidden_size)
    states = (config.num_hidden_layers + 8) * length * width
    middle = 2 * length * config.intermediate_size
    scores = 2 * config.num_attention_heads * length * min(length, encoder.window)
    weight = next(encoder.model.parameters())
    return int(states + middle + scores) * max(weight.element_size(), 4)


# Pictures as input


def _reading(
    readers: Mapping[str, nn.Module], stage_a: StageA, dtypes: Dtypes, workload: Workload
) -> dict[str, Footprint]:
    """Footprints of what reads a picture, one at a time, before the stages run."""
    work = workload.picture
    sizes: dict[str, Footprint] = {}
    if work.embedded is not None:
        encoder: Any = readers["image_encoder"]
        sizes["image_encoder"] = Footprint(
            *weight_bytes(encoder), _embedding(encoder, work.embedded)
        )
    if work.compressed is not None:
        network, seen = readers["compressor"], work.compressed
        twin: Any = _twin(network, dtypes.of("compressor"))
        working = peak_bytes(lambda: twin.encode(_pixels(seen)).float())
        sizes["compressor"] = Footprint(*weight_bytes(network), working)
    if work.control is not None and work.controlled is not None:
        with torch.device("meta"):
            control = ControlNet(work.control).to(dtypes.stage_c).eval()
        sizes["controlnet"] = Footprint(
            *weight_bytes(control), _controlling(control, work.controlled, workload.stage_c_size)
        )
    if work.encoded is not None:
        twin_a, dtype, whole = _twin(stage_a, dtypes.stage_a), dtypes.stage_a, work.encoded
        cells = max(whole) // stage_a.downscale
        sizes["stage_a_encoder"] = Footprint(
            *weight_bytes(stage_a),
            _encoding_pixels(twin_a, dtype, whole, None),
            {
                tile: _encoding_pixels(twin_a, dtype, whole, tile)
                for tile in TILE_CELLS
                if tile < cells
            },
            of="stage_a",
        )
    return sizes


def _pixels(size: tuple[int, int], channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(1, channels, *size, device="meta", dtype=dtype)


def _embedding(encoder: PictureEncoder, size: tuple[int, int]) -> int:
    """Bytes of CLIP's picture tower; its layers work on the same sizes, and two of them tell."""
    model: Any = encoder.model
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = min(config.num_hidden_layers, 2)
    with torch.device("meta"):
        tower = type(model)(config).to(next(model.parameters()).dtype).eval()
    twin = PictureEncoder(tower, encoder.preprocessing)
    return peak_bytes(lambda: twin(_pixels(size)))


def _controlling(network: ControlNet, size: tuple[int, int], latent_size: tuple[int, int]) -> int:
    """Bytes of a ControlNet and of its signal."""
    config, dtype = network.config, next(network.parameters()).dtype

    def encode(pixels: Tensor) -> Tensor:  # a step of its own, the compressor's
        cells = tuple(-(-side // 2) for side in latent_size)
        return torch.empty(1, config.in_channels, *cells, device="meta")

    def run() -> None:
        pixels, mask = _pixels(size), _pixels(size, 1)
        signal = control_signal(config, pixels, latent_size, mask=mask, encode=encode)
        control_maps(network, signal.to(dtype))

    return peak_bytes(run)


def _encoding_pixels(twin: Any, dtype: torch.dtype, size: tuple[int, int], tile: int | None) -> int:
    """Bytes of Stage A's encoder; with tiles, the pixels of the whole are not on the device."""
    if tile is None:
        return peak_bytes(lambda: twin.encode(_pixels(size, dtype=dtype)).float())
    scale = twin.downscale
    side = (tile + 2 * twin.config.encoder_reach) * scale
    window = (min(side, size[0]), min(side, size[1]))
    of_tile = peak_bytes(lambda: twin.encode(_pixels(window, dtype=dtype)).float())
    cells = math.prod(one // scale for one in size)
    return 4 * twin.config.latent_channels * cells + of_tile


def _control_bytes(workload: Workload, dtype: torch.dtype) -> int:
    """Bytes of a ControlNet's maps, which are there until the pictures are made."""
    control = workload.picture.control
    if control is None:
        return 0
    return sum(control.out_channels) * math.prod(workload.stage_c_size) * dtype.itemsize


def _more(size: Footprint, extra: int) -> Footprint:
    """Return a footprint that works on so many bytes more."""
    tiled = None if size.tiled is None else {key: one + extra for key, one in size.tiled.items()}
    return replace(size, working=size.working + extra, tiled=tiled)


# Twins, and weights


def _prompted(encoder: TextEncoder, workload: Workload) -> Prompted:
    def states() -> TextFeatures:
        hidden = torch.empty(1, workload.text_length, encoder.hidden_channels, device="meta")
        return TextFeatures(hidden, torch.empty(1, encoder.pooled_channels, device="meta"))

    return Prompted(states(), states())


def _twin(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Build a network of the same widths on the meta device, with two blocks a level.

    The blocks of a level all work on the same sizes, and so do a level's repetitions: from the
    third on nothing more is alive.
    """
    config: Any = network.config
    depths: dict[str, Any] = {}
    for field in fields(config):
        if field.name in _DEPTHS:
            value = getattr(config, field.name)
            few = tuple(min(one, 2) for one in value) if isinstance(value, tuple) else min(value, 2)
            depths[field.name] = few
    with torch.device("meta"):
        return type(network)(replace(config, **depths)).to(dtype).eval()


def weight_bytes(network: nn.Module) -> tuple[int, int]:
    """Return the bytes of all weights, and of the most that are there at once layer by layer.

    Layer by layer, a module's own weights are there while it runs, its children's included.
    """
    total = sum(_own_bytes(module) for module in network.modules())
    return total, _most_at_once(network)


def _own_bytes(module: nn.Module) -> int:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _most_at_once(module: nn.Module) -> int:
    if type(module).__name__ in WHOLE_BLOCKS:
        return sum(_own_bytes(one) for one in module.modules())
    deepest = max((_most_at_once(child) for child in module.children()), default=0)
    return _own_bytes(module) + deepest
