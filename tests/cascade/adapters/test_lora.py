"""Low-rank updates of layers: attached, trained, merged and taken out again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from cascade.adapters.lora import (
    TEXT_TARGETS,
    UNET_TARGETS,
    LoraConfig,
    LowRank,
    adapter_of,
    adapters_of,
    attach_lora,
    attach_updates,
    lora_state,
    merge_lora,
)
from stages.unet.attention import TransformerBlock
from stages.unet.unet import UNet, UNetCondition
from tests.lora_toys import EVERYTHING, updates_of
from tests.reference.unet_toys import SD, SDXL, spread


@pytest.fixture(params=[SD, SDXL], ids=["sd", "sdxl"])
def unet(request: pytest.FixtureRequest) -> Iterator[UNet]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield spread(UNet(request.param))


def inputs(unet: UNet) -> tuple[torch.Tensor, torch.Tensor, UNetCondition]:
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    text = torch.randn(2, 5, config.text_channels, generator=generator)
    cond = UNetCondition(text)
    if config.text_pooled_channels is not None:
        pooled = torch.randn(2, config.text_pooled_channels, generator=generator)
        cond = UNetCondition(text, pooled, torch.full((2, 6), 64))
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([900, 10]), cond


def test_a_new_adapter_changes_nothing_and_freezes_the_rest(unet: UNet) -> None:
    x, t, cond = inputs(unet)
    names = set(unet.state_dict())
    with torch.no_grad():
        before = unet(x, t, cond)
        adapter = attach_lora(unet, LoraConfig(rank=4, alpha=8))
        assert torch.equal(unet(x, t, cond), before)
    assert names < set(unet.state_dict())
    assert all(".lora.default." in name for name in set(unet.state_dict()) - names)
    trained = [one for one in unet.parameters() if one.requires_grad]
    assert {id(one) for one in trained} == {id(one) for one in adapter.parameters()}
    blocks = sum(isinstance(one, TransformerBlock) for one in unet.modules())
    assert len(adapter.layers) == 8 * blocks and blocks > 1


def test_the_start_is_torchs_own_and_repeats_by_seed(unet: UNet) -> None:
    states = []
    for seed in (3, 3, 4):
        generator = torch.Generator().manual_seed(seed)
        adapter = attach_lora(unet, LoraConfig(rank=2, targets=("to_q",)), generator=generator)
        states.append(lora_state(unet))
        for layer in adapter.layers.values():
            bound = 1 / math.sqrt(layer.down.shape[1])
            assert 0.5 * bound < layer.down.abs().max() <= bound and not layer.up.any()
        adapter.detach()
    first = next(key for key in states[0] if key.endswith("attn1.to_q.lora_A.weight"))
    assert torch.equal(states[0][first], states[1][first])
    assert not torch.equal(states[0][first], states[2][first])


@pytest.mark.parametrize("ends", [UNET_TARGETS, EVERYTHING], ids=["attention", "everything"])
def test_attached_and_merged_give_the_same(unet: UNet, ends: tuple[str, ...]) -> None:
    x, t, cond = inputs(unet)
    scale = 0.2 if ends == UNET_TARGETS else 0.02
    one, two = (updates_of(unet, ends, seed=seed, scale=scale) for seed in (0, 1))
    with torch.no_grad():
        plain = unet(x, t, cond)
        attach_updates(unet, one, name="one").set_strength(0.5)
        attach_updates(unet, two, name="two").set_strength(-0.25)
        attached = unet(x, t, cond)
        for adapter in adapters_of(unet):
            adapter.detach()
        assert torch.equal(unet(x, t, cond), plain)
        merge_lora(unet, [(one, 0.5), (two, -0.25)])
        merged = unet(x, t, cond)
    assert not torch.allclose(merged, plain, atol=1e-2)
    torch.testing.assert_close(merged, attached, atol=1e-5, rtol=1e-5)


def test_a_merge_is_the_published_formula_on_linear_layers_and_convolutions() -> None:
    linear, conv = nn.Linear(6, 8), nn.Conv2d(4, 8, 3, stride=2, padding=1)
    network = nn.ModuleDict({"linear": linear, "conv": conv})
    updates = updates_of(network, EVERYTHING, rank=2, alpha=5)
    expected = linear.weight + 0.7 * 5 / 2 * updates["linear"].up @ updates["linear"].down
    down, up = updates["conv"].down, updates["conv"].up
    kernel = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    wanted = conv.weight + 0.7 * 5 / 2 * kernel
    merge_lora(network, [(updates, 0.7)])
    torch.testing.assert_close(linear.weight, expected)
    torch.testing.assert_close(conv.weight, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_undoing_a_merge_gives_every_bit_back(unet: UNet, dtype: torch.dtype) -> None:
    unet.to(dtype)
    before = copy.deepcopy(unet.state_dict())
    first = merge_lora(unet, [(updates_of(unet), 0.3)])
    second = merge_lora(unet, [(updates_of(unet, ("to_q",)), 1.0)])
    after = unet.state_dict()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed and all("attn" in key for key in changed)
    with pytest.raises(ValueError, match="undo the later merge first"):
        first.undo()
    second.undo()
    first.undo()
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())


def test_a_sum_of_several_updates_is_rounded_once() -> None:
    network = nn.ModuleDict({"layer": nn.Linear(64, 64, bias=False)})
    total = network["layer"].weight.detach().clone()
    updates = [(updates_of(network, EVERYTHING, seed=seed), 0.4) for seed in range(3)]
    for one, strength in updates:  # in the order of the merge: float32 rounds sums as well
        total = total + strength * one["layer"].delta()
    merge_lora(network, updates, dtype=torch.bfloat16)
    assert torch.equal(network["layer"].weight, total.bfloat16())


def test_only_the_adapter_learns_also_recomputed_and_compiled(unet: UNet) -> None:
    x, t, cond = inputs(unet)
    adapter = attach_lora(unet, LoraConfig(rank=2, targets=(*UNET_TARGETS, "conv1", "proj_in")))
    for layer in adapter.layers.values():
        nn.init.normal_(layer.up, std=0.1)
    unet.train()

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad(set_to_none=True)
        unet(x, t, cond).square().mean().backward()
        for name, parameter in unet.named_parameters():
            assert (parameter.grad is not None) == (".lora." in name), name
        return [one.grad.clone() for one in adapter.parameters()]  # type: ignore[union-attr]

    plain = gradients()
    assert all(one.any() for one in plain)
    unet.set_recompute()
    for kept, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(again, kept)
    unet.set_recompute([])
    for block in [one for one in unet.modules() if isinstance(one, TransformerBlock)]:
        block.compile(fullgraph=True, backend="aot_eager")
    for kept, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(again, kept, atol=1e-5, rtol=1e-4)


def test_under_autocast_and_on_weights_of_few_bits_the_adapter_stays_float32(unet: UNet) -> None:
    x, t, cond = inputs(unet)
    updates = updates_of(unet, (*UNET_TARGETS, "conv1"))
    with torch.no_grad():
        merged = merge_lora(unet, [(updates, 1.0)])
        exact = unet(x, t, cond)
        merged.undo()
        adapter = attach_updates(unet, updates)
        with torch.autocast("cpu", torch.bfloat16):
            near = unet(x, t, cond)
        assert near.dtype == torch.bfloat16
        torch.testing.assert_close(near.float(), exact, atol=0.1, rtol=0.1)
        for name, parameter in unet.named_parameters():
            if ".lora." not in name:
                parameter.data = parameter.data.bfloat16()
        assert all(one.dtype == torch.float32 for one in adapter.parameters())
        near = unet(x.bfloat16(), t, cond)
        assert near.dtype == torch.bfloat16
        torch.testing.assert_close(near.float(), exact, atol=0.1, rtol=0.1)


def test_a_few_steps_lower_a_loss_that_only_the_adapter_can_lower(unet: UNet) -> None:
    x, t, cond = inputs(unet)
    adapter = attach_lora(unet, LoraConfig(rank=4, alpha=8))
    with torch.no_grad():
        target = unet(x, t, cond) + 0.1 * x
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (unet(x, t, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_text_encoders_adapter_is_found_by_its_own_targets() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        vocab_size=50,
        projection_dim=8,
        bos_token_id=48,
        eos_token_id=49,
        pad_token_id=49,
    )
    model = CLIPTextModelWithProjection(config).eval()
    tokens = torch.tensor([[48, 3, 4, 49]])
    updates = updates_of(model, (*TEXT_TARGETS, "fc1", "text_projection"))
    with torch.no_grad():
        plain = model(tokens).text_embeds
        adapter = attach_updates(model, updates)
        attached = model(tokens).text_embeds
        adapter.detach()
        merge_lora(model, [(updates, 1.0)])
        merged = model(tokens).text_embeds
    assert not torch.allclose(attached, plain, atol=1e-3)
    torch.testing.assert_close(merged, attached, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_network_has_adapters_of_its_own(unet: UNet) -> None:
    x, t, cond = inputs(unet)
    attach_updates(unet, updates_of(unet))
    copied = copy.deepcopy(unet)
    with torch.no_grad():
        before = unet(x, t, cond)
        adapter_of(copied).set_strength(0)
        assert torch.equal(unet(x, t, cond), before)
        assert not torch.equal(copied(x, t, cond), before)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("to_x",), r"no layer's path ends with 'to_x'; .*to_q"),
        (("attn1",), r"attn1 is a Attention, no linear layer"),
        (("q",), "no layer's path ends with 'q'"),
    ],
)
def test_a_target_that_is_no_layer_is_told(targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach_lora(UNet(SD), LoraConfig(targets=targets))


def test_slips_are_told(unet: UNet) -> None:
    attach_lora(unet, LoraConfig())
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        attach_lora(unet, LoraConfig())
    with pytest.raises(ValueError, match="no adapter 'other' is attached; there is default"):
        lora_state(unet, "other")
    path = next(iter(adapter_of(unet).layers))
    with pytest.raises(ValueError, match=r"but .* fit"):
        merge_lora(unet, [({path: LowRank(torch.ones(2, 5), torch.ones(7, 2), 1.0)}, 1.0)])
    with pytest.raises(ValueError, match="no linear layer or convolution of this network"):
        merge_lora(unet, [({"conv_norm_out": LowRank(torch.ones(2, 5), torch.ones(7, 2), 1)}, 1.0)])
    for config in (dict(rank=0), dict(alpha=0.0), dict(alpha=math.nan), dict(targets=())):
        with pytest.raises(ValueError, match=next(iter(config))):
            LoraConfig(**config)  # type: ignore[arg-type]
