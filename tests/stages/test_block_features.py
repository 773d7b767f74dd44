"""Outputs of blocks that are asked for: what they are, and that asking changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stages.stage_b import StageB, StageBCondition, StageBConfig
from stages.stage_c import StageC, StageCCondition, StageCConfig

C = StageCConfig(
    cond_channels=16,
    hidden_channels=(16, 32),
    num_heads=(2, 2),
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    text_channels=8,
    text_pooled_channels=6,
    image_channels=None,
    dropout=0.0,
    time_conds=(),
)
B = StageBConfig(
    cond_channels=16,
    hidden_channels=(8, 16),
    num_heads=(0, 2),
    down_blocks=(1, 2),
    up_blocks=(2, 1),
    up_repeats=(2, 1),
    text_pooled_channels=6,
    pixel_condition=False,
    dropout=(0.0, 0.0),
    time_conds=(),
)
NAMES = ["down_blocks.0.0", "down_blocks.1.0", "down_blocks.1.1", "up_blocks.0.0", "up_blocks.0.1"]


def made(kind: str):
    torch.manual_seed(0)
    t = torch.tensor([0.3, 0.7])
    if kind == "c":
        network = StageC(C)
        inputs = (
            torch.randn(2, 16, 4, 4),
            t,
            StageCCondition(torch.randn(2, 5, 8), torch.randn(2, 6)),
        )
    else:
        network = StageB(B)
        inputs = (
            torch.randn(2, 4, 8, 8),
            t,
            StageBCondition(torch.randn(2, 16, 2, 2), torch.randn(2, 6)),
        )
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network, inputs


@pytest.mark.parametrize("kind", ["c", "b"])
def test_the_outputs_are_those_of_the_blocks_and_the_prediction_stays(kind):
    network, inputs = made(kind)
    seen: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in NAMES
    ]
    output = network(*inputs, features=NAMES)
    for handle in handles:
        handle.remove()
    assert torch.equal(output.prediction, network(*inputs))
    assert list(output.features) == NAMES == list(network.config.sites)[: len(NAMES)]
    for name, value in output.features.items():
        assert torch.equal(value, seen[name])
        assert value.shape[1] == network.config.sites[name].channels


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["c", "b"])
def test_a_feature_has_a_gradient_also_when_blocks_are_recomputed(kind, recompute):
    network, inputs = made(kind)
    network.recompute = recompute
    for name in NAMES:
        network.zero_grad()
        network(*inputs, features=[name]).features[name].square().sum().backward()
        grads = [p.grad for p in network.get_submodule(name).residual.parameters()]
        assert all(grad is not None and bool(grad.any()) for grad in grads), name


def test_a_name_that_is_no_block_is_refused_with_the_nearest_one():
    network, inputs = made("c")
    with pytest.raises(ValueError, match=r"'down_blocks.1.2' is no block.*'down_blocks.1.1'"):
        network(*inputs, features=["down_blocks.1.2"])


def test_published_sizes_have_a_block_for_every_module():
    for config in (StageCConfig.full(), StageBConfig.lite()):
        count = sum(config.down_blocks) + sum(config.up_blocks)
        assert len(config.sites) == count
    assert replace(C, down_blocks=(3, 1)).sites["down_blocks.1.0"].channels == 32


@pytest.mark.parametrize("kind", ["c", "b"])
def test_features_stay_what_they_were_where_blocks_write_over_tensors(kind):
    network, inputs = made(kind)
    found = network.eval()(*inputs, features=NAMES).features
    with torch.no_grad():  # a teacher's
        again = network(*inputs, features=NAMES).features
    assert all(torch.equal(again[name], found[name]) for name in NAMES)
