"""Linear layers, computed on CPUs by the library that is faster there.

torch has MKL multiply float32 matrices, which leaves half of an AMD processor with AVX-512 unused:
288 tokens, 1,536 -> 6,144 channels took 58.7 ms, and 25.7 ms by oneDNN, which torch has as well (2
cores of an EPYC, torch 2.13; results differ by 5e-6). In bfloat16 both are oneDNN's; asked directly
it took 3 to 18 % less time, with the same bits. On an AMD processor without AVX-512 oneDNN is 5 to
10 % slower in float32, and on others nothing was measured: there torch chooses.
"""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

_MIN_ROWS = 16
_MIN_PRODUCTS = 2**19
"""Below either, the call takes longer than the product."""


class Linear(nn.Linear):
    """A linear layer that computes as ``linear`` does; a checkpoint sees no difference."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - as torch's
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)``.

    Returns:
        ``(..., out)``.
    """
    if torch.compiler.is_compiling():  # which chooses by itself, and can't follow the questions
        return F.linear(x, weight, bias)
    if x.dtype in _formats_of_onednn() and _is_plain(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def dense(layer: nn.Module) -> Tensor:
    """Return a linear layer's weight ``(out, in)``, of one in int8 multiplied out."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.dense
    assert isinstance(weight, Tensor)
    return weight


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether only the values of a product are asked for, and it is a large one.

    oneDNN's operator has no derivative, and whoever traces, counts or casts operators does not know
    it.
    """
    rows = x.numel() // max(1, x.shape[-1])
    if rows < _MIN_ROWS or rows * weight.numel() < _MIN_PRODUCTS:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    given = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(one.requires_grad for one in given):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return (
        all(one.device.type == "cpu" and one.dtype == x.dtype for one in given)
        and all(type(one) in (Tensor, nn.Parameter) for one in given)
        and torch._C._len_torch_dispatch_stack() == 0
        and not any(wrapped(one) for one in given)
        and all(unpack_dual(one).tangent is None for one in given)
        and weight.is_contiguous()  # a part of a weight would be copied
    )


@functools.cache
def _formats_of_onednn() -> frozenset[torch.dtype]:
    """Return the number formats in which oneDNN is to be asked directly on this CPU.

    The processor alone decides, no clock does: the same machine draws the same pictures.
    """
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_amd()
    if not fast or not torch.backends.mkldnn.is_available():
        return frozenset()
    formats = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        formats.add(torch.bfloat16)
    return frozenset(formats)


def _is_amd() -> bool:
    """Return whether the processor is AMD's."""
    if sys.platform != "linux":
        return "AuthenticAMD" in platform.processor()  # as Windows tells it
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
