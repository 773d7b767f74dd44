"""What Stage B and Stage C of both generations have in common."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.conditions import concat
from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_b_v2 import StageBV2, StageBV2Condition, StageBV2Config
from stages.stage_c import StageC, StageCCondition, StageCConfig
from stages.stage_c_v2 import StageCV2, StageCV2Condition, StageCV2Config

TINY_C = StageCConfig(
    latent_channels=4,
    time_channels=16,
    cond_channels=24,
    hidden_channels=(16, 24),
    num_heads=(2, 3),
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    text_channels=10,
    text_pooled_channels=12,
    pooled_tokens=2,
    image_channels=14,
)
TINY_B = StageBConfig(
    latent_channels=4,
    time_channels=16,
    cond_channels=20,
    hidden_channels=(8, 12, 16),
    num_heads=(0, 0, 2),
    down_blocks=(1, 2, 1),
    up_blocks=(1, 2, 1),
    up_repeats=(2, 1, 2),
    compressed_channels=4,
    text_pooled_channels=12,
    pooled_tokens=2,
    dropout=(0.0, 0.0, 0.1),
)
TINY_C_V2 = StageCV2Config(
    latent_channels=4,
    time_channels=16,
    hidden_channels=24,
    num_blocks=3,
    num_heads=3,
    text_channels=10,
)
TINY_B_V2 = StageBV2Config(
    latent_channels=4,
    time_channels=16,
    cond_channels=20,
    hidden_channels=(8, 12, 16),
    num_heads=(0, 3, 2),
    num_blocks=(1, 2, 1),
    reads_compressed=(False, True, True),
    compressed_channels=4,
    text_channels=10,
    dropout=(0.1, 0.1, 0.1),
)


def cond_c(batch: int) -> StageCCondition:
    return StageCCondition(
        text_hidden=torch.randn(batch, 5, 10),
        text_pooled=torch.randn(batch, 12),
        image=torch.randn(batch, 1, 14),
        sca=torch.rand(batch),
        crp=torch.rand(batch),
        control=(None, torch.randn(batch, 24, 3, 5), None, torch.randn(batch, 24, 2, 4)),
    )


def cond_b(batch: int) -> StageBCondition:
    return StageBCondition(
        stage_c_latents=torch.randn(batch, 4, 3, 5),
        text_pooled=torch.randn(batch, 12),
        pixels=torch.randn(batch, 3, 6, 6),
        sca=torch.rand(batch),
    )


def cond_c_v2(batch: int) -> StageCV2Condition:
    return StageCV2Condition(torch.randn(batch, 5, 10))


def cond_b_v2(batch: int) -> StageBV2Condition:
    return StageBV2Condition(torch.randn(batch, 4, 3, 5), torch.randn(batch, 5, 10))


@dataclasses.dataclass(frozen=True)
class Case:
    network: Callable[[Any], nn.Module]
    config: Any
    cond: Callable[[int], Any]
    sizes: tuple[tuple[int, int], ...]

    def build(self) -> nn.Module:
        """A network without neutral weights: every path has a say."""
        torch.manual_seed(0)
        network = self.network(self.config).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.ndim == 1:
                    parameter.normal_(0, 0.1)
                elif "modulation" in name:
                    parameter.normal_(0, 0.1)
                elif "text_" in name or "mapper" in name:
                    parameter.normal_(0, 0.3)
                elif name == "out.weight":
                    parameter.normal_(0, 0.05)
        return network

    def inputs(self, batch: int, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor, Any]:
        torch.manual_seed(1)
        height, width = size or self.sizes[0]
        return torch.randn(batch, 4, height, width), torch.rand(batch), self.cond(batch)

    def prepare(self, network: nn.Module, x: Tensor, cond: Any) -> Any:
        if isinstance(network, (StageB, StageBV2)):
            return network.prepare(cond, tuple(x.shape[-2:]))
        return network.prepare(cond)


CASES = {
    "stage_c": Case(StageC, TINY_C, cond_c, ((5, 7), (1, 1), (6, 4))),
    "stage_b": Case(StageB, TINY_B, cond_b, ((18, 22), (8, 8), (32, 20))),
    "stage_c_v2": Case(StageCV2, TINY_C_V2, cond_c_v2, ((5, 7), (1, 1), (6, 4))),
    "stage_b_v2": Case(StageBV2, TINY_B_V2, cond_b_v2, ((24, 40), (8, 8), (32, 16))),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def part(cond: Any, chosen: slice) -> Any:
    values = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond)}
    return type(cond)(**{name: each(value, lambda x: x[chosen]) for name, value in values.items()})


def each_field(cond: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change all latents and states; scalars stay float32, as the network asks for."""
    values = {f.name: getattr(cond, f.name) for f in dataclasses.fields(cond)}
    scalars = ("sca", "crp", "cfg")
    return type(cond)(
        **{name: one if name in scalars else each(one, change) for name, one in values.items()}
    )


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or every tensor of a tuple."""
    if isinstance(value, tuple):
        return tuple(None if one is None else change(one) for one in value)
    return None if value is None else change(value)


@every_case
@torch.no_grad()
def test_the_prediction_has_the_shape_of_the_latents(case):
    network = case.build()
    for size in case.sizes:
        x, t, cond = case.inputs(2, size)
        predicted = network(x, t, cond)
        assert predicted.shape == x.shape
        assert torch.isfinite(predicted).all()


@every_case
@torch.no_grad()
def test_every_input_has_a_say(case):
    network = case.build()
    x, t, cond = case.inputs(1)
    before = network(x, t, cond)
    cases = {"x": (x + 0.1, t, cond), "t": (x, t - 0.01, cond)}
    for field in dataclasses.fields(cond):
        if getattr(cond, field.name) is None:  # a scalar that this network is not told
            continue
        changed = {field.name: each(getattr(cond, field.name), lambda x: x + 0.1)}
        cases[field.name] = x, t, dataclasses.replace(cond, **changed)
    for name, changed_case in cases.items():
        change = float((network(*changed_case) - before).abs().max() / before.std())
        assert change > 1e-4, f"{name} has no say"


@every_case
@torch.no_grad()
def test_what_is_prepared_for_all_steps_predicts_what_the_plain_network_does(case):
    network = case.build()
    x, _, cond = case.inputs(2)
    times = torch.tensor([0.9, 0.5, 0.1])
    prepared = case.prepare(network, x, cond)
    for t, at_time in zip(times, network.at_times(prepared, times), strict=True):
        plain = network(x, t.expand(2), cond)
        bound = 1e-5 * float(plain.std())
        assert float((network(x, t.expand(2), prepared) - plain).abs().max()) < bound
        # It does not look at the time that it is told: that is in what was prepared.
        fast = network(x, torch.full((2,), float("nan")), at_time)
        assert float((fast - plain).abs().max()) < bound
        assert fast.stride() == plain.stride()


@every_case
@torch.no_grad()
def test_in_bfloat16_what_is_prepared_is_as_near_to_the_truth_as_the_plain_network(case):
    network = case.build()
    x, t, cond = case.inputs(8)
    t = t[:1].expand(8)
    truth = copy.deepcopy(network).double()(x.double(), t, each_field(cond, torch.Tensor.double))
    narrow = network.bfloat16()
    given = each_field(cond, torch.Tensor.bfloat16)
    prepared = case.prepare(network, x, given)
    (at_time,) = network.at_times(prepared, t[:1])
    plain, fast = (narrow(x.bfloat16(), t, one).double() - truth for one in (given, at_time))
    assert fast.square().mean() < 1.1 * plain.square().mean()


@torch.no_grad()
def test_compressed_latents_enter_v2_in_their_own_few_channels():
    case = CASES["stage_b_v2"]
    network = case.build()
    x, _, cond = case.inputs(1)
    folded = case.prepare(network, x, cond).folded
    assert [None if one is None else one.source.shape[-1] for one in folded] == [
        *(None, 4, 4, 4),
        *(4, 4, 4, None),
    ]


@torch.no_grad()
def test_blocks_that_run_again_are_asked_once():
    case = CASES["stage_b"]
    network = case.build()
    x, _, cond = case.inputs(1)
    asked = case.prepare(network, x, cond).asked
    # The deepest level alone attends: one block down, and one up that runs twice.
    found = [one for one in asked if one is not None]
    assert len(found) == 3 and found[1] is found[2] and found[0] is not found[1]


@every_case
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(case):
    network = case.build()
    x, t, cond = case.inputs(3)
    together = network(x, t, cond)
    for i in range(3):
        one = slice(i, i + 1)
        alone = network(x[one], t[one], part(cond, one))
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-4)
    joined = concat([part(cond, slice(0, 1)), part(cond, slice(1, 3))])
    assert torch.equal(network(x, t, joined), together)


@every_case
def test_the_gradient_reaches_every_parameter(case):
    network = case.build().train()
    x, t, cond = case.inputs(2)
    (network(x, t, cond) * torch.randn_like(x)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name


@every_case
@torch.no_grad()
def test_bfloat16_is_close_to_float32_at_every_time(case):
    """Upstream rounds the time to the network's format, which moves the first step's furthest."""
    network = case.build()
    rounded = copy.deepcopy(network).bfloat16()
    x, _, cond = case.inputs(5)
    t = torch.tensor([1.0, 0.9936, 0.6, 0.31, 0.0023])
    expected = network(x, t, cond)
    actual = rounded(x.bfloat16(), t, cond)
    assert actual.dtype == torch.bfloat16
    for i in range(5):
        assert (actual[i].float() - expected[i]).std() < 0.03 * expected[i].std(), t[i]
    with pytest.raises(ValueError, match="float32"):
        rounded(x.bfloat16(), t.bfloat16(), cond)


@every_case
@torch.no_grad()
def test_the_time_is_not_rounded_inside_a_bfloat16_network(case):
    """0.6 and its nearest bfloat16 are two times, to a network in bfloat16 too."""
    network = case.build().bfloat16()
    x, _, cond = case.inputs(1)
    exact, rounded = torch.tensor([0.6]), torch.tensor([0.6]).bfloat16().float()
    x = x.bfloat16()
    change = network(x, exact, cond).float() - network(x, rounded, cond).float()
    assert change.std() > 1e-3


@every_case
def test_weights_survive_saving_and_loading(case, tmp_path):
    network = case.build()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    other = case.network(case.config).eval()
    other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    inputs = case.inputs(1)
    with torch.no_grad():
        assert torch.equal(other(*inputs), network(*inputs))


@every_case
def test_dropout_acts_in_training_only(case):
    network = case.build()
    inputs = case.inputs(1)
    with torch.no_grad():
        assert torch.equal(network(*inputs), network(*inputs))
        network.train()
        assert not torch.equal(network(*inputs), network(*inputs))


# At the published sizes

PUBLISHED = [
    (StageC, StageCConfig.full(), 3_589_103_632),
    (StageC, StageCConfig.lite(), 1_030_785_040),
    (StageB, StageBConfig.full(), 1_562_941_136),
    (StageB, StageBConfig.lite(), 699_471_248),
    (StageCV2, StageCV2Config.full(), 993_636_896),
    (StageBV2, StageBV2Config.full(), 1_055_365_280),
]


@pytest.mark.parametrize(("network", "config", "count"), PUBLISHED)
def test_published_sizes_have_the_published_counts(network, config, count):
    with torch.device("meta"):
        built = network(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == count
    assert not list(built.buffers())
