"""Linear layers by oneDNN: the same results, wherever values alone are asked for, and nowhere else.

Which CPUs are faster so is asked of the processor; here it is told.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import stages.linear
from stages.layers import AttnBlock, ResBlock, init_weights
from stages.linear import Linear, linear
from stages.stage_a import StageABlock
from stages.unet.attention import FeedForward

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def asked(monkeypatch):
    """Tell that oneDNN is faster; return the rows of what it is asked for."""
    monkeypatch.setattr(stages.linear, "_formats_of_onednn", lambda: {torch.float32})
    rows: list[int] = []
    known = stages.linear._is_plain

    def note(x, weight, bias):
        found = known(x, weight, bias)
        if found:
            rows.append(x.numel() // x.shape[-1])
        return found

    monkeypatch.setattr(stages.linear, "_is_plain", note)
    return rows


def inputs(bias: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 48, 192), torch.randn(384, 192)
    return x, weight, torch.randn(384) if bias else None


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_is_asked_and_says_the_same(asked, bias):
    x, weight, offset = inputs(bias)
    found = linear(x, weight, offset)
    assert asked == [96]
    torch.testing.assert_close(found, F.linear(x, weight, offset), rtol=1e-5, atol=1e-4)


@needs_onednn
@pytest.mark.parametrize(
    "block",
    [
        lambda: (ResBlock(96), (torch.randn(2, 96, 12, 12),)),
        lambda: (AttnBlock(128, 64, 4), (torch.randn(2, 128, 8, 8), torch.randn(2, 30, 64))),
        lambda: (StageABlock(64, 4), (torch.randn(1, 64, 16, 16),)),
        lambda: (FeedForward(64), (torch.randn(2, 64, 64),)),
    ],
    ids=["ResBlock", "AttnBlock", "StageABlock", "FeedForward"],
)
def test_blocks_differ_by_rounding_alone(asked, block, monkeypatch):
    torch.manual_seed(0)
    module, given = block()
    init_weights(module)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.inference_mode():
        found = module(*given)
        assert asked
        monkeypatch.setattr(stages.linear, "_formats_of_onednn", frozenset)
        plain = module(*given)
    assert float((found - plain).abs().max() / plain.abs().max()) < 1e-5


@needs_onednn
def test_gradients_tangents_casts_and_counts_are_torchs(asked):
    x, weight, bias = inputs()
    layer = Linear(192, 384)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), forward_ad.dual_level():
        tangent = torch.randn_like(x)
        dual = linear(forward_ad.make_dual(x, tangent), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, F.linear(tangent, weight))
    with torch.no_grad():
        _, pushed = torch.func.jvp(lambda one: linear(one, weight, bias), (x,), (tangent,))
        torch.testing.assert_close(pushed, F.linear(tangent, weight))
        torch.vmap(lambda one: linear(one, weight, bias))(x)
        several = torch.stack([weight, -weight])  # an ensemble: weights are batched, x is not
        both = torch.vmap(lambda one: linear(x, one))(several)
        torch.testing.assert_close(both[1], -both[0])
        with forward_ad.dual_level():
            learned = forward_ad.make_dual(weight, torch.ones_like(weight))
            assert forward_ad.unpack_dual(linear(x, learned)).tangent is not None
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert linear(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 96 * 192 * 384
    with torch.no_grad():
        whole = torch.compile(linear, backend="eager", fullgraph=True)
        torch.testing.assert_close(whole(x, weight, bias), F.linear(x, weight, bias))
    assert linear(x.to("meta"), weight.to("meta"), None).is_meta
    assert asked == []
    with torch.no_grad():
        layer(x)
    assert asked == [96]


@needs_onednn
@pytest.mark.parametrize("rows, columns", [(1, 384), (8, 384), (32, 8)])
def test_small_products_and_parts_of_weights_are_torchs(asked, rows, columns):
    x, weight, _ = inputs()
    with torch.no_grad():
        linear(x.flatten(0, 1)[:rows], weight[:columns])
        linear(x[..., :100], weight[:, :100])
        linear(x.double(), weight.double())
        with pytest.raises(RuntimeError, match="dtype"):
            linear(x, weight.double())
    assert asked == []


def test_the_processor_decides_and_a_checkpoint_sees_no_difference(monkeypatch):
    choose = stages.linear._formats_of_onednn.__wrapped__
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(stages.linear, "_is_amd", lambda: True)
    assert choose() == frozenset()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert (torch.float32 in choose()) == torch.backends.mkldnn.is_available()
    monkeypatch.setattr(stages.linear, "_is_amd", lambda: False)
    assert choose() == frozenset()
    assert list(Linear(2, 3).state_dict()) == ["weight", "bias"]
    assert isinstance(Linear(2, 3), torch.nn.Linear)
