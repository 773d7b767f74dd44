"""What a sampling step does, counted: figures that depend on no machine.

On the meta device a value can't be asked for: whatever runs there waits for no device. What is
counted of a step is the difference between a walk and one that is a step longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cascade.pipelines.memory_peak import peak_bytes
from cascade.pipelines.sampling import Prompted, sample_stage_b, sample_stage_c
from cascade.pipelines.spec import StageSampling
from cascade.pipelines.unet_sampling import UNetPrompted, sample_unet
from cascade.pipelines.unet_spec import UNetSampling
from cascade.rng import PictureNoise
from cascade.text.encoder import TextFeatures
from stages.stage_b import StageB, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Config
from stages.stage_c import StageC, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Config
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet, UNetCondition

COPIES = ("aten.to", "aten._to_copy", "aten.copy_")
PRODUCTS = ("aten.addmm", "aten.mm", "aten.bmm", "aten.baddbmm", "aten.linear")

C = StageCConfig(
    cond_channels=16,
    hidden_channels=(16,),
    num_heads=(2,),
    down_blocks=(1,),
    up_blocks=(1,),
    text_channels=10,
    text_pooled_channels=12,
)
B = StageBConfig(
    cond_channels=16,
    hidden_channels=(8, 16),
    num_heads=(0, 2),
    down_blocks=(1, 1),
    up_blocks=(1, 1),
    up_repeats=(1, 1),
    dropout=(0.0, 0.0),
    text_pooled_channels=12,
)
C_V2 = StageCV2Config(hidden_channels=16, num_blocks=1, num_heads=2, text_channels=10)
B_V2 = StageBV2Config(
    cond_channels=16,
    hidden_channels=(8, 16),
    num_heads=(0, 2),
    num_blocks=(1, 1),
    reads_compressed=(False, True),
    dropout=(0.0, 0.0),
    text_channels=10,
)
SDXL = UNetConfig(
    channels=(8, 16),
    num_heads=(1, 2),
    down_depths=((0,), (1,)),
    mid_depth=1,
    up_depths=((1, 1), (0, 0)),
    text_channels=10,
    text_pooled_channels=12,
    size_channels=4,
    norm_groups=4,
)


class Calls(TorchDispatchMode):
    """Counts operators, and what is copied from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.from_host = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = (
            {one.device.type for one in tree_iter(tree) if isinstance(one, Tensor)}
            for tree in ((args, kwargs), result)
        )
        if "meta" in made:
            self.operators[str(func.overloadpacket)] += not self._is_view(func)
            self.from_host += str(func.overloadpacket) in COPIES and "cpu" in given
        return result

    @staticmethod
    def _is_view(func: Any) -> bool:
        """Whether an operator touches no values."""
        return any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)


def on_meta(network: Callable[[Any], nn.Module], config: Any) -> Any:
    with torch.device("meta"):
        return network(config).eval()


def states() -> TextFeatures:
    return TextFeatures(torch.empty(1, 7, 10, device="meta"), torch.empty(1, 12, device="meta"))


def draw(network: Any, sampling: Any) -> None:
    """Sample with a network on meta."""
    if isinstance(network, UNet):
        sizes = torch.empty(1, 6, device="meta")
        cond = UNetCondition(states().hidden, states().pooled, sizes)
        sample_unet(network, sampling, UNetPrompted(cond, cond), PictureNoise([0]), (4, 8, 8))
        return
    prompted, noise = Prompted(states(), states()), PictureNoise([0])
    if isinstance(network, (StageC, StageCV2)):
        sample_stage_c(network, sampling, prompted, noise, (6, 6))
        return
    latents = torch.empty(1, 16, 6, 6, device="meta")
    sample_stage_b(network, sampling, latents, prompted, noise, (4, 16, 16))


def calls(network: Any, sampling: Any) -> Calls:
    with torch.inference_mode(), Calls() as seen:
        draw(network, sampling)
    return seen


def of_a_step(network: Any, sampling: Any) -> tuple[Counter[str], int]:
    """Operators of one step more, and copies from the host."""
    few, more = (calls(network, replace(sampling, steps=steps)) for steps in (4, 5))
    extra = Counter(more.operators)
    extra.subtract(few.operators)
    return Counter({name: count for name, count in extra.items() if count}), (
        more.from_host - few.from_host
    )


GUIDED = StageSampling(steps=1, guidance=4.0, rescale=0.7)
NETWORKS = {
    "stage_c": (StageC, C, GUIDED),
    "stage_b": (StageB, B, GUIDED),
    "stage_c_v2": (StageCV2, C_V2, GUIDED),
    "stage_b_v2": (StageBV2, B_V2, GUIDED),
    "unet": (UNet, SDXL, UNetSampling(steps=1, guidance=5.0, sampler="euler")),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


@every_network
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "lcm"])
def test_a_step_waits_for_nothing_and_brings_nothing_but_fresh_noise(
    name: str, sampler: Any
) -> None:
    build, config, sampling = NETWORKS[name]
    if name == "unet" and sampler == "ddpm":
        sampler = "euler_ancestral"
    # lcm of a cascade is for networks that guidance is distilled into, and fresh noise as well.
    sampling = replace(sampling, sampler=sampler)
    operators, from_host = of_a_step(on_meta(build, config), sampling)
    assert from_host == (sampler in ("ddpm", "euler_ancestral", "lcm"))
    assert not any(name.startswith("aten._local_scalar_dense") for name in operators)


PRODUCTS_OF_A_STEP = {
    # A block: expand, project, query, keys and values, out. Neither the text nor the time.
    "stage_c": 2 * 5,
    # Of four blocks two attend.
    "stage_b": 4 * 2 + 2 * 3,
    "stage_c_v2": 5,
    "stage_b_v2": 4 * 2 + 2 * 3,
    # A transformer block: q, k, v, out; q, out; twice in the feed-forward. It stands between two
    # projections. There are four.
    "unet": 4 * (4 + 2 + 2 + 2),
}


@every_network
def test_a_step_computes_nothing_that_all_steps_share(name: str) -> None:
    build, config, sampling = NETWORKS[name]
    operators, _ = of_a_step(on_meta(build, config), sampling)
    products = sum(count for one, count in operators.items() if one in PRODUCTS)
    assert products == PRODUCTS_OF_A_STEP[name]


OPERATORS_OF_A_BLOCK = {"stage_c": 24, "stage_c_v2": 24}


@pytest.mark.parametrize("name", OPERATORS_OF_A_BLOCK)
def test_a_block_calls_no_more_operators_than_it_did(name: str) -> None:
    build, config, sampling = NETWORKS[name]
    deeper = (
        replace(config, num_blocks=2) if name == "stage_c_v2" else replace(config, up_blocks=(2,))
    )
    few, more = (
        sum(of_a_step(on_meta(build, one), sampling)[0].values()) for one in (config, deeper)
    )
    assert more - few <= OPERATORS_OF_A_BLOCK[name]


@every_network
def test_more_steps_take_no_more_memory_but_for_their_tables(name: str) -> None:
    build, config, sampling = NETWORKS[name]
    network = on_meta(build, config)
    few, more = (
        peak_bytes(lambda steps=steps: draw(network, replace(sampling, steps=steps)))
        for steps in (4, 24)
    )
    assert more - few < 0.35 * few


def test_without_guidance_a_step_is_one_pass_of_the_pictures_alone() -> None:
    network = on_meta(StageC, C)
    batches: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    draw(network, replace(GUIDED, steps=3, guidance=1.0))
    draw(network, replace(GUIDED, steps=2))
    assert batches == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("stage_c", [1, 2, 2, 1]), ("unet", [2, 2, 1, 1])],  # at 1, 0.75 ...; at 0.752, 0.502 ...
)
def test_a_step_outside_the_interval_of_guidance_is_one_pass(
    name: str, expected: list[int]
) -> None:
    build, config, sampling = NETWORKS[name]
    network = on_meta(build, config)
    batches: list[int] = []
    network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    inside = replace(sampling, steps=4, guidance_interval=(0.3, 0.8))
    draw(network, inside)
    assert batches == expected
    few, _ = of_a_step(network, replace(sampling, guidance_interval=(0.0, 0.1)))
    assert sum(few[one] for one in PRODUCTS) == PRODUCTS_OF_A_STEP[name]
