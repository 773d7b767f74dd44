"""How much device memory each part of a cascade takes: its weights, and what it works on.

Weights are counted. What a stage works on is computed, not guessed: the code that makes a picture
runs on the meta device, where tensors have a size and no content, and the bytes that are alive at
once are followed. Kernels' private workspaces and the allocator's rounding are not in it; plans
keep a reserve for them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cascade.pipelines.placement import Dtypes
from cascade.pipelines.sampling import Prompted, sample_stage_b, sample_stage_c
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.tiles import TILE_CELLS, decode_pixels
from cascade.rng import PictureNoise
from cascade.text.encoder import TextEncoder, TextFeatures
from stages.stage_a import StageA
from stages.stage_b import StageB
from stages.stage_b_v2 import StageBV2
from stages.stage_c import StageC
from stages.stage_c_v2 import StageCV2

WHOLE_BLOCKS = ("StageABlock",)
"""Modules whose forward reads their children's weights: brought to the device as a whole."""
_DEPTHS = ("down_blocks", "up_blocks", "up_repeats", "num_blocks", "decoder_blocks")


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
    """The same by side of a tile in latent cells, largest first; Stage A alone has it."""


def footprints(
    stage_c: StageC | StageCV2,
    stage_b: StageB | StageBV2,
    stage_a: StageA,
    encoders: Mapping[str, TextEncoder],
    dtypes: Dtypes,
    workload: Workload,
) -> dict[str, Footprint]:
    """Compute what each part takes, in bytes; takes seconds, and no memory to speak of.

    Args:
        stage_c: Stage C; its weights are only counted.
        stage_b: Stage B.
        stage_a: Stage A.
        encoders: Text encoders, each under the name of its part.
        dtypes: Number formats.
        workload: The picture.
    """
    _, height, width = workload.latent_shape
    tiles = [side for side in TILE_CELLS if side < max(height, width)]
    twin_a = _twin(stage_a, dtypes.stage_a)

    def decode(tile: int | None) -> int:
        return _decoding(twin_a, dtypes.stage_a, workload, tile)

    sizes = {
        name: Footprint(*_weights(encoder.model), _encoding(encoder, workload))
        for name, encoder in encoders.items()
    }
    text = encoders["text"]
    text_b = encoders.get("text_b", text)
    sizes["stage_c"] = Footprint(
        *_weights(stage_c), _drawing_c(_twin(stage_c, dtypes.stage_c), text, workload)
    )
    sizes["stage_b"] = Footprint(
        *_weights(stage_b), _drawing_b(_twin(stage_b, dtypes.stage_b), text_b, workload)
    )
    sizes["stage_a"] = Footprint(
        *_weights(stage_a), decode(None), {tile: decode(tile) for tile in tiles}
    )
    return sizes


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes of meta tensors that are alive at once while ``run`` runs."""
    live = _LiveBytes()
    with torch.inference_mode(), _FlashAttention(), live:
        run()
    return live.peak


def _drawing_c(twin: Any, text: TextEncoder, workload: Workload) -> int:
    """Bytes of Stage C's sampling."""
    in_a_step = peak_bytes(
        lambda: sample_stage_c(
            twin,
            _one_step(workload.stage_c),
            _prompted(text, workload),
            PictureNoise([0]),
            workload.stage_c_size,
        )
    )
    return in_a_step + _between_steps((twin.config.latent_channels, *workload.stage_c_size))


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
        )
    )
    return in_a_step + _between_steps(workload.latent_shape)


def _one_step(sampling: StageSampling) -> StageSampling:
    # Every sampler evaluates the network alike; "ddpm" does not look at values, of which there
    # are none.
    return replace(sampling, steps=1, times=(), sampler="ddpm")


def _between_steps(latent_shape: tuple[int, int, int]) -> int:
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


def _encoding(encoder: TextEncoder, workload: Workload) -> int:
    """Bytes of encoding one prompt, from above: all states at once.

    A CLIP keeps the hidden states of every layer; a layer works on its input, queries, keys,
    values, the attention's scores and, twice, the wide middle of its MLP.
    """
    config: Any = encoder.model.config
    length, width = workload.text_length, int(config.hidden_size)
    states = (config.num_hidden_layers + 8) * length * width
    middle = 2 * length * config.intermediate_size
    scores = 2 * config.num_attention_heads * length * min(length, encoder.window)
    weight = next(encoder.model.parameters())
    return int(states + middle + scores) * max(weight.element_size(), 4)


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


def _weights(network: nn.Module) -> tuple[int, int]:
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


class _LiveBytes(TorchDispatchMode):
    """Follows the storages of meta tensors from the operation that made them to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for value in tree_iter((args, kwargs)):  # not made here: weights, counted elsewhere
            if isinstance(value, Tensor) and value.is_meta:
                self._seen.add(value.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.is_meta:
                self._follow(value.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _FlashAttention(TorchFunctionMode):
    """Attention as GPUs compute it: the scores of all pairs are never in memory at once.

    Reference: Dao et al., 2022, FlashAttention, arXiv:2205.14135.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
