"""What is written over: the same bits, the caller's tensors untouched, and less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cascade.pipelines.memory_peak import peak_bytes
from stages.layers import AttnBlock, ResBlock
from stages.overwrite import add, gelu, multiply, silu
from stages.stage_a import StageABlock
from stages.unet.attention import GatedGELU
from stages.unet.resnet import ResnetBlock

BLOCKS = {
    "ResBlock": lambda: (ResBlock(16, skip_channels=4), [(2, 16, 6, 6), (2, 4, 6, 6)]),
    "AttnBlock": lambda: (AttnBlock(16, 12, 2), [(2, 16, 6, 6), (2, 5, 12)]),
    "StageABlock": lambda: (StageABlock(16, 4), [(2, 16, 6, 6)]),
    "ResnetBlock": lambda: (ResnetBlock(16, 24, 4, time_channels=8), [(2, 16, 6, 6), (2, 8)]),
    "GatedGELU": lambda: (GatedGELU(16, 32), [(2, 7, 16)]),
}


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    block, shapes = BLOCKS[name]()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    given = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if given[0].ndim == 4:
        given[0] = given[0].contiguous(memory_format=torch.channels_last)
    return block.to(dtype).eval(), given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_says_the_same_to_the_bit_and_leaves_what_it_is_given(name, dtype):
    block, given = built(name, dtype)
    plain = block(*given).detach()
    before = [one.clone() for one in given]
    with torch.inference_mode():
        found = block(*given)
    assert torch.equal(found, plain) and found.dtype == dtype
    assert all(torch.equal(one, was) for one, was in zip(given, before, strict=True))


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2.1), (torch.bfloat16, 3.1)], ids=["float32", "bfloat16"]
)
def test_a_block_s_widest_tensor_lies_in_memory_once_and_once_more_in_float32(dtype, bound):
    block = ResBlock(16).to(device="meta", dtype=dtype)
    x = torch.empty(1, 16, 64, 64, device="meta", dtype=dtype)
    wide = 4 * x.numel() * x.element_size()
    assert peak_bytes(lambda: block(x)) <= bound * wide


def test_nothing_is_written_over_where_a_derivative_is_asked_for():
    x = torch.randn(3, 4)
    for step in (gelu, silu, lambda own: add(own, x), lambda own: multiply(own, x)):
        own = x.clone().requires_grad_()
        step(own).sum().backward()
        assert own.grad is not None and torch.equal(own.detach(), x)
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
            assert forward_ad.unpack_dual(step(dual)).tangent is not None
            assert torch.equal(forward_ad.unpack_dual(dual).primal, x)
        with torch.no_grad():
            again = x.clone()
            assert step(again) is again


def test_what_would_not_fit_is_made_anew():
    own, row = torch.randn(3, 1), torch.randn(3, 4)
    with torch.no_grad():
        assert add(own, row).shape == (3, 4) and own.shape == (3, 1)
        assert add(row.bfloat16(), row).dtype == torch.float32
        assert multiply(row.clone(), own).shape == (3, 4)
