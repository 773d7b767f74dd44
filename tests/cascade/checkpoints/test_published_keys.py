"""Every published network at full size, against key lists that none of our tables made.

Everything is on the meta device: names and shapes without a byte of weights.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.checkpoints.detect import detect
from cascade.checkpoints.files import assign_strictly, build_on_meta
from cascade.checkpoints.load import family_of
from stages.controlnet import ControlNetConfig
from stages.previewer import PreviewerConfig
from stages.semantic_compressor import CompressorConfig
from stages.stage_a import StageAConfig
from stages.stage_b import StageBConfig
from stages.stage_b_v2 import StageBV2Config
from stages.stage_c import StageCConfig
from stages.stage_c_v2 import StageCV2Config
from tests.cascade.checkpoints.keys import generate

KEYS = Path(generate.__file__).parent
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    config: Any
    kind: str
    generation: str | None
    parameters: int
    """Learned values, statistics of batch norms not counted."""
    tensors: dict[str, int]
    """Of the file, by layout."""


NETWORKS = {
    "stage_a": Network(
        StageAConfig(), "stage_a", None, 18_406_894, {"original": 122, "diffusers": 122}
    ),
    "stage_b_v2": Network(
        StageBV2Config(), "stage_b", "v2", 1_055_365_280, {"original": 814, "diffusers": 990}
    ),
    "stage_b_v3": Network(
        StageBConfig.full(), "stage_b", "v3", 1_562_941_136, {"original": 1454, "diffusers": 1726}
    ),
    "stage_b_v3_lite": Network(
        StageBConfig.lite(), "stage_b", "v3", 699_471_248, {"original": 826, "diffusers": 970}
    ),
    "stage_c_v2": Network(
        StageCV2Config(), "stage_c", "v2", 993_636_896, {"original": 520, "diffusers": 648}
    ),
    "stage_c_v3": Network(
        StageCConfig.full(), "stage_c", "v3", 3_589_103_632, {"original": 1294, "diffusers": 1550}
    ),
    "stage_c_v3_lite": Network(
        StageCConfig.lite(), "stage_c", "v3", 1_030_785_040, {"original": 654, "diffusers": 782}
    ),
    "compressor_v2": Network(
        CompressorConfig.v2(), "compressor", "v2", 20_198_000, {"original": 786}
    ),
    "compressor_v3": Network(
        CompressorConfig.v3(), "compressor", "v3", 20_197_968, {"original": 784}
    ),
    "previewer": Network(PreviewerConfig(), "previewer", "v3", 3_979_651, {"original": 58}),
    "controlnet_canny": Network(
        ControlNetConfig.canny(), "controlnet", "v3", 54_255_776, {"original": 796}
    ),
    "controlnet_inpainting": Network(
        ControlNetConfig.inpainting(), "controlnet", "v3", 54_256_424, {"original": 796}
    ),
    "controlnet_super_resolution": Network(
        ControlNetConfig.super_resolution(), "controlnet", "v3", 203_491_584, {"original": 86}
    ),
}
CASES = [(name, layout) for name, network in NETWORKS.items() for layout in network.tensors]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def read_list(name: str, layout: str) -> Shapes:
    text = gzip.decompress((KEYS / f"{name}.{layout}.txt.gz").read_bytes()).decode()
    comment, *lines = text.splitlines()
    assert comment.startswith(f"# {name}, {layout} layout; source: ")
    found: Shapes = {}
    for line in lines:
        key, sides = line.split(" ")
        assert key not in found
        found[key] = () if sides == "-" else tuple(int(side) for side in sides.split("x"))
    return found


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {
        key: torch.empty(
            shape,
            dtype=torch.int64 if key.endswith("num_batches_tracked") else torch.bfloat16,
            device="meta",
        )
        for key, shape in shapes.items()
    }


def test_there_is_a_list_of_every_network_and_of_nothing_else() -> None:
    wanted = {f"{name}.{layout}.txt.gz" for name, layout in CASES}
    assert {path.name for path in KEYS.glob("*.gz")} == wanted
    assert all(path.stat().st_size < 10_000 for path in KEYS.glob("*.gz"))


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_list_has_the_published_numbers_of_tensors_and_parameters(name: str, layout: str) -> None:
    shapes, network = read_list(name, layout), NETWORKS[name]
    assert len(shapes) == network.tensors[layout]
    learned = {key: shape for key, shape in shapes.items() if not key.endswith(_STATISTICS)}
    assert sum(math.prod(shape) for shape in learned.values()) == network.parameters


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_its_names_and_shapes_tell_which_network_it_is(name: str, layout: str) -> None:
    network = NETWORKS[name]
    found = detect(read_list(name, layout), name)
    assert (found.kind, found.generation or network.generation, found.layout) == (
        network.kind,
        network.generation,
        layout,
    )
    assert found.config == network.config


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_it_fills_our_network_and_comes_back_with_nothing_left_over(name: str, layout: str) -> None:
    shapes = read_list(name, layout)
    published = detect(shapes, name)
    family = family_of(published)
    network = build_on_meta(family.network, published.config, name)
    state = family.from_layout[layout](on_meta(shapes), published.config)
    assign_strictly(network, state, name)  # names what is missing, left over, or misshapen
    assert sum(p.numel() for p in network.parameters()) == NETWORKS[name].parameters
    back = family.to_layout[layout](network.state_dict(), published.config)
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_one_tensor_more_less_or_of_another_shape_is_noticed(
    name: str, layout: str, change: str
) -> None:
    shapes = read_list(name, layout)
    published = detect(shapes, name)
    family = family_of(published)
    key = list(shapes)[-1]
    if change == "missing":
        del shapes[key]
    elif change == "unexpected":
        shapes[f"{key}.more"] = (3,)
    else:
        shapes[key] = (*shapes[key], 7)
    with pytest.raises(ValueError, match=change):
        network = build_on_meta(family.network, published.config, name)
        state = family.from_layout[layout](on_meta(shapes), published.config)
        assign_strictly(network, state, name)


@pytest.mark.parametrize("name", sorted(generate.NETWORKS))
def test_the_two_layouts_differ_by_the_published_rules_alone(
    name: str, as_original: Callable[[Shapes], Shapes]
) -> None:
    """The rules are those of diffusers' own converters, followed backwards."""
    theirs = as_original(read_list(name, "diffusers"))
    if name.startswith("stage_b_v3"):
        theirs = {
            key.replace("clip_txt_pooled_mapper.", "clip_mapper."): shape
            for key, shape in theirs.items()
        }
    if name == "stage_a":
        theirs["vquantizer.codebook.weight"] = theirs.pop("vquantizer.embedding.weight")
    assert theirs == read_list(name, "original")


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(generate.NETWORKS))
def test_the_installed_diffusers_still_has_these_keys(name: str) -> None:
    assert generate.listed(name) == read_list(name, "diffusers")
