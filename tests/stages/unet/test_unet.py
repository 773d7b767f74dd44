from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.checkpoints.files import load_network, save_network
from stages.unet.config import UNetConfig
from stages.unet.unet import UNet, UNetCondition, UNetOutput

COUNTS = {
    "sdxl": (2_567_463_684, 1680, 70),
    "bk_sdxl_base": (1_717_277_764, 1110, 46),
    "koala_1b": (1_161_184_324, 790, 30),
    "koala_700m": (782_822_724, 584, 21),
    "ssd_1b": (1_331_334_404, 944, 34),
    "vega": (745_225_604, 564, 15),
    "sd15": (859_520_964, 686, 16),
    "bk_base": (579_384_964, 442, 10),
    "bk_small": (482_346_884, 396, 9),
    "bk_tiny": (323_384_964, 358, 9),
    "sd_small": (579_384_964, 442, 10),
    "sd_tiny": (323_384_964, 358, 9),
    "sd21": (865_910_724, 686, 16),
    "bk_v2_base": (583_480_964, 442, 10),
    "bk_v2_small": (485_787_524, 396, 9),
    "bk_v2_tiny": (326_825_604, 358, 9),
}
"""Parameters, tensors, transformer blocks: the facts, section 1.3."""


@pytest.fixture
def network(small: UNetConfig, randomise: Callable[[nn.Module], None]) -> UNet:
    network = UNet(small)
    randomise(network)
    return network


@pytest.fixture
def level(small: UNetConfig) -> UNetConfig:
    """One level and a middle: for what takes long."""
    return dataclasses.replace(
        small, channels=(8,), num_heads=(2,), down_depths=((1,),), up_depths=((1, 0),)
    )


@pytest.fixture
def inputs(small: UNetConfig, condition: Callable[..., Any]) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 6, 8, generator=generator)
    return x, torch.tensor([999.0, 3.5]), condition(small)


@pytest.mark.parametrize("name", COUNTS)
def test_published_networks_have_the_published_counts(name):
    config = getattr(UNetConfig, name)()
    with torch.device("meta"):
        network = UNet(config)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    found = (num_parameters, len(network.state_dict()), config.num_transformer_blocks)
    assert found == COUNTS[name]


def test_parts_of_sdxl_have_the_published_counts():
    with torch.device("meta"):
        network = UNet(UNetConfig.sdxl())
    parts = [*network.down_blocks, network.mid_block, *network.up_blocks]
    millions = [round(sum(p.numel() for p in part.parameters()) / 1e6, 1) for part in parts]
    assert millions == [5.4, 60.1, 757.4, 413.1, 1206.6, 106.3, 11.2]


# Configuration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": (2,)}, r"num_heads=\(2,\) and channels=\(8, 16\)"),
        ({"down_depths": ((0,),)}, r"down_depths=\(\(0,\),\)"),
        ({"up_depths": ((1, 0), (2, 0))}, "level 0 has 2 resnets .* so 3 on the way up, not 2"),
        ({"down_depths": ((0, 1), ())}, "level 1 has 0 resnets"),
        ({"down_depths": ((0, -1), (2,))}, "must not be negative"),
        ({"mid_depth": -1}, "must not be negative"),
        ({"num_heads": (3, 2)}, r"num_heads=\(3, 2\) does not divide"),
        ({"norm_groups": 3}, "norm_groups=3 does not divide"),
        ({"size_channels": None}, "give both"),
        ({"size_channels": 3}, "must be even"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(small, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(small, **change)


# What it is told


def test_a_network_of_text_alone_refuses_sizes_and_pooled_text(small):
    network = UNet(dataclasses.replace(small, text_pooled_channels=None, size_channels=None))
    text, pooled, sizes = torch.randn(1, 3, 6), torch.randn(1, 5), torch.zeros(1, 6)
    assert network.prepare(UNetCondition(text)).added is None
    for told in (UNetCondition(text, pooled), UNetCondition(text, sizes=sizes)):
        with pytest.raises(ValueError, match="hidden states alone"):
            network.prepare(told)


def test_an_incomplete_or_misshapen_condition_is_refused(network):
    text, pooled, sizes = torch.randn(1, 3, 6), torch.randn(1, 5), torch.zeros(1, 6)
    for told in (
        UNetCondition(text),
        UNetCondition(text, pooled),
        UNetCondition(text, None, sizes),
    ):
        with pytest.raises(ValueError, match="give both"):
            network.prepare(told)
    with pytest.raises(ValueError, match="text_hidden is 7 wide"):
        network.prepare(UNetCondition(torch.randn(1, 3, 7), pooled, sizes))
    with pytest.raises(ValueError, match=r"expected \(B, 5\) and \(B, 6\)"):
        network.prepare(UNetCondition(text, pooled, torch.zeros(1, 5)))


def test_a_prepared_condition_gives_the_same(network, inputs):
    x, timesteps, cond = inputs
    expected = network(x, timesteps, cond)
    assert torch.equal(network(x, timesteps, network.prepare(cond)), expected)


def test_each_input_is_heard(network, inputs):
    x, timesteps, cond = inputs
    expected = network(x, timesteps, cond)
    changes = [
        (x + 1, timesteps, cond),
        (x, timesteps + 1, cond),
        (x, timesteps, dataclasses.replace(cond, text_hidden=cond.text_hidden.flip(1) + 1)),
        (x, timesteps, dataclasses.replace(cond, text_pooled=cond.text_pooled + 1)),
        (x, timesteps, dataclasses.replace(cond, sizes=cond.sizes + 1)),
    ]
    for changed in changes:
        assert (network(*changed) - expected).abs().max() > 1e-4


def test_rounded_times_and_sizes_are_refused(network, inputs):
    x, timesteps, cond = inputs
    with pytest.raises(ValueError, match="bfloat16; pass float32"):
        network(x, timesteps.bfloat16(), cond)
    with pytest.raises(ValueError, match="float16; pass float32"):
        network(x, timesteps, dataclasses.replace(cond, sizes=cond.sizes.half()))


# What it predicts


def test_a_new_network_predicts_zero(small, inputs):
    assert not UNet(small)(*inputs).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 3), (7, 12)])
def test_any_size_works(network, inputs, size):
    _, timesteps, cond = inputs
    x = torch.randn(2, 4, *size)
    output = network(x, timesteps, cond, features=network.sites)
    assert output.prediction.shape == x.shape
    assert list(output.features) == list(network.sites)
    for name, site in network.sites.items():
        height, width = site.size(*size)
        shape = (site.channels, height, width)
        if site.tokens:
            shape = (height * width, site.channels)
        assert output.features[name].shape == (2, *shape), name


def test_pictures_of_a_batch_do_not_mix(network, inputs):
    x, timesteps, cond = inputs
    alone = UNetCondition(cond.text_hidden[1:], cond.text_pooled[1:], cond.sizes[1:])
    single = network(x[1:], timesteps[1:], alone)
    torch.testing.assert_close(network(*inputs)[1:], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_close_to_float32(network, inputs, autocast):
    expected = network(*inputs)
    if autocast:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = network(*inputs)
    else:
        x, timesteps, cond = inputs
        actual = network.bfloat16()(x.bfloat16(), timesteps, cond)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.1 * expected.std()


def test_a_saved_network_is_the_same(network, inputs, tmp_path: Path):
    save_network(tmp_path / "unet.safetensors", network)
    loaded = load_network(tmp_path / "unet.safetensors", expect=UNet)
    assert loaded.config == network.config
    assert torch.equal(loaded(*inputs), network(*inputs))


def test_a_new_network_overfits_one_batch(level, inputs):
    torch.manual_seed(0)
    network, target = UNet(level), torch.randn(2, 4, 6, 8)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        losses.append((network(*inputs) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


# Features


def test_only_what_is_asked_for_is_returned(network, inputs):
    names = ("up_blocks.1.attentions.2.transformer_blocks.0.attn1", "down_blocks.0")
    output = network(*inputs, features=names)
    assert isinstance(output, UNetOutput) and set(output.features) == set(names)
    assert torch.equal(output.prediction, network(*inputs))
    assert network(*inputs, features=()).features == {}


def test_features_stay_what_they_were_where_blocks_write_over_tensors(network, inputs):
    network.eval()
    with torch.enable_grad():
        found = network(*inputs, features=network.sites).features
    with torch.no_grad():  # a teacher's
        again = network(*inputs, features=network.sites).features
    assert all(torch.equal(again[name], found[name]) for name in network.sites)


def test_layers_without_attention_have_no_site_for_it(network):
    names = set(network.sites)
    assert "up_blocks.1.attentions.2" in names and "up_blocks.1.attentions.1" not in names
    assert "up_blocks.1.attentions.0.transformer_blocks.1.attn1" in names


@pytest.mark.parametrize(
    ("name", "hint"),
    [("down_block.0", "did you mean 'down_blocks.0'"), ("conv_in", "no site of this U-Net")],
)
def test_an_unknown_site_is_refused(network, inputs, name, hint):
    with pytest.raises(ValueError, match=hint):
        network(*inputs, features=[name])


def gradients(network: UNet, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def feature_loss(network: UNet, inputs: Any, names: Any) -> Tensor:
    output = network(*inputs, features=names)
    features = sum((feature**2).mean() for feature in output.features.values())
    return output.prediction.square().mean() + features


def test_gradients_reach_every_parameter(network, inputs):
    found = gradients(network, network(*inputs).square().mean())
    for name, _ in network.named_parameters():
        assert found[name].abs().sum() > 0, name


@pytest.mark.parametrize("blocks", [None, ["down_blocks.0", "mid_block"], []])
def test_recomputing_changes_no_gradient(network, inputs, blocks):
    expected = gradients(network, feature_loss(network, inputs, network.sites))
    network.set_recompute(blocks)
    found = gradients(network, feature_loss(network, inputs, network.sites))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_recomputing_runs_the_layers_of_the_chosen_blocks_twice(network, inputs):
    runs: dict[str, int] = {}
    for name in network.sites:
        if ".transformer_blocks." in name or ".resnets." in name:
            module = network.get_submodule(name)
            # Recomputing stops as soon as it has what is needed: before the end of a module.
            module.register_forward_pre_hook(
                lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1})
            )
    network.set_recompute(["down_blocks.1"])
    gradients(network, network(*inputs).square().mean())
    for name, count in runs.items():
        assert count == (2 if name.startswith("down_blocks.1.") else 1), name


def test_every_feature_has_a_gradient_under_recomputing(network, inputs):
    """Hooks in reentrant checkpoints give none: the facts, section 7, point 2."""
    network.set_recompute()
    for name, site in network.sites.items():
        loss = network(*inputs, features=[name]).features[name].square().mean()
        first = "down_blocks.0.resnets.0.conv1.weight"
        assert gradients(network, loss)[first].abs().sum() > 0, site


def test_an_unknown_block_is_refused(network):
    with pytest.raises(ValueError, match=r"'down_blocks.7' is no block.*mid_block"):
        network.set_recompute(["down_blocks.7"])


@pytest.mark.slow
def test_it_compiles_to_one_graph_with_features_and_recomputing(level, inputs, randomise):
    network = UNet(level)
    randomise(network)
    names = ("mid_block", "down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    network.set_recompute(["down_blocks.0"])
    expected = gradients(network, feature_loss(network, inputs, names))
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
    found = gradients(network, feature_loss(compiled, inputs, names))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
