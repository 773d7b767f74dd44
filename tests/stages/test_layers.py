from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stages.layers import (
    Attention,
    AttnBlock,
    GlobalResponseNorm,
    LayerNorm2d,
    ResBlock,
    TimestepBlock,
    init_weights,
    scale_residual_outputs,
)


def randomise(module: nn.Module) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)


def test_layer_norm_is_over_channels_at_each_place():
    x = torch.randn(2, 6, 3, 5) * 4 + 1
    y = LayerNorm2d(6)(x)
    assert y.shape == x.shape
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    torch.testing.assert_close(y, (x - mean) / (variance + 1e-6).sqrt())


# Global response norm


def formula(norm: GlobalResponseNorm, x: Tensor) -> Tensor:
    energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return norm.gamma * x * (energy / (energy.mean(-1, keepdim=True) + 1e-6)) + norm.beta + x


def test_a_new_response_norm_is_the_identity():
    x = torch.randn(2, 4, 5, 8)
    assert torch.equal(GlobalResponseNorm(8)(x), x)


@pytest.mark.parametrize("shape", [(2, 4, 5, 8), (1, 1, 1, 8), (3, 7, 2, 8)])
def test_the_response_norm_and_its_gradients_are_those_of_its_formula(shape):
    norm = GlobalResponseNorm(8)
    randomise(norm)
    x = torch.randn(shape, requires_grad=True)
    inputs = (x, norm.gamma, norm.beta)
    upstream = torch.randn(shape)
    torch.testing.assert_close(norm(x), formula(norm, x))
    actual = torch.autograd.grad(norm(x), inputs, upstream)
    expected = torch.autograd.grad(formula(norm, x), inputs, upstream)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("upstream_scale", [1.0, 1e4])
def test_a_silent_channel_does_not_break_the_gradient(upstream_scale):
    norm = GlobalResponseNorm(4)
    randomise(norm)
    x = torch.randn(2, 3, 3, 4)
    x[..., 1] = 0  # what GELU makes of very negative inputs
    x.requires_grad_()
    upstream = upstream_scale * torch.randn(2, 3, 3, 4)
    (gradient,) = torch.autograd.grad(norm(x), x, upstream)
    (expected,) = torch.autograd.grad(formula(norm, x), x, upstream)
    torch.testing.assert_close(gradient, expected, atol=1e-5 * upstream_scale, rtol=1e-4)


def test_a_picture_of_zeros_has_a_finite_gradient():
    norm = GlobalResponseNorm(4)
    randomise(norm)
    x = torch.zeros(1, 2, 2, 4, requires_grad=True)
    (1e4 * norm(x)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_the_response_norm_in_bfloat16_is_close():
    norm = GlobalResponseNorm(64)
    randomise(norm)
    x = torch.randn(2, 16, 16, 64).bfloat16()
    expected = norm(x.float())
    actual = norm.bfloat16()(x)
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.02 * expected.abs().max()


# Residual block


def test_a_residual_block_computes_what_its_formula_says():
    block = ResBlock(6, skip_channels=3, kernel_size=5)
    randomise(block)
    x, skip = torch.randn(2, 6, 7, 4), torch.randn(2, 3, 7, 4)
    h = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=2, groups=6)
    h = F.layer_norm(h.movedim(1, -1), (6,), eps=1e-6)
    h = torch.cat([h, skip.movedim(1, -1)], dim=-1)
    h = block.project(block.response_norm(F.gelu(block.expand(h)))).movedim(-1, 1)
    torch.testing.assert_close(block(x, skip), x + h)


# Attention


@pytest.mark.parametrize("num_context", [0, 5])
def test_attention_equals_torch_multi_head_attention(num_context):
    ours = Attention(12, 3)
    randomise(ours)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    theirs.out_proj = ours.out
    tokens = torch.randn(2, 4, 12)
    context = torch.randn(2, num_context, 12) if num_context else None
    asked = tokens if context is None else torch.cat([tokens, context], dim=1)
    expected = theirs(tokens, asked, asked, need_weights=False)[0]
    torch.testing.assert_close(ours(tokens, context), expected)


def test_normed_queries_and_keys_bound_the_logits_whatever_the_weights():
    plain, normed = Attention(12, 3), Attention(12, 3, qk_norm=True)
    assert {"query_norm.weight", "key_norm.weight"} == set(normed.state_dict()) - set(
        plain.state_dict()
    )
    tokens, context = torch.randn(2, 4, 12), torch.randn(2, 5, 12)
    with torch.no_grad():
        for attention in (plain, normed):
            attention.query.bias.zero_()
        before = [attention(tokens, context) for attention in (plain, normed)]
        for attention in (plain, normed):
            attention.query.weight.mul_(50)
        after = [attention(tokens, context) for attention in (plain, normed)]
    torch.testing.assert_close(after[1], before[1], atol=1e-4, rtol=1e-3)
    assert (after[0] - before[0]).abs().max() > 0.01
    assert normed(tokens.bfloat16().float(), context).dtype == torch.float32


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 does not divide channels=12"):
        Attention(12, 5)


def test_an_attention_block_reads_the_condition_and_every_place():
    block = AttnBlock(8, 6, 2)
    randomise(block)
    x, tokens = torch.randn(1, 8, 3, 5), torch.randn(1, 4, 6)
    before = block(x, tokens)
    assert before.shape == x.shape
    assert not torch.allclose(block(x, tokens + 0.5), before)
    moved = x.clone()
    moved[:, 0, 2, 4] += 1  # the far corner, seen from the first place
    assert not torch.allclose(block(moved, tokens)[..., 0, 0], before[..., 0, 0])


def test_attention_in_bfloat16_is_close():
    block = AttnBlock(16, 6, 2)
    nn.init.normal_(block.attention.out.bias)
    x, tokens = torch.randn(2, 16, 4, 4), torch.randn(2, 3, 6)
    expected = block(x, tokens)
    actual = block.bfloat16()(x.bfloat16(), tokens.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).std() < 0.02 * expected.std()


# Time modulation


def test_modulation_sums_what_all_scalars_say():
    block = TimestepBlock(5, 8, extra=("sca", "crp"))
    randomise(block)
    x, embeddings = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 8)
    mappers = [block.mapper, block.extra_mappers["sca"], block.extra_mappers["crp"]]
    total = sum(mapper(embeddings[:, i]) for i, mapper in enumerate(mappers))
    scale, shift = total[:, :5, None, None], total[:, 5:, None, None]
    torch.testing.assert_close(block(x, embeddings), x * (1 + scale) + shift)


# Initialisation


def test_new_weights_are_as_published():
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {
            "residual": ResBlock(32),
            "modulation": TimestepBlock(32, 8, extra=("sca",)),
            "attention": AttnBlock(32, 16, 4),
        }
    )
    init_weights(module)
    project = module["residual"].project
    bound = (6 / (128 + 32)) ** 0.5  # Xavier
    assert 0.9 * bound < project.weight.abs().max() <= bound
    assert not project.bias.any()
    assert not any(parameter.any() for parameter in module["modulation"].parameters())
    before = project.weight.clone()
    scale_residual_outputs(module, 4)
    assert torch.equal(project.weight, before / 2)
