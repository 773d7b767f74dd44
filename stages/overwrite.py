"""Element-wise steps that write over a tensor of their own, where only its values are asked for.

A block's wide tensors are its largest; what is activated, normed or added where it lies is not
there twice. The results have the same bits. With gradients, tangents or a compiler, which plans
memory itself, nothing is written over.

Whoever calls these gives away the first tensor: it was made for the call, and nobody else has it.
A forward hook that keeps what a layer within a block returned must clone it, as with torch's own
``inplace=True``; what blocks themselves return is never written over.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F


def may_overwrite(own: Tensor) -> bool:
    """Return whether nothing will ask for the values that a tensor has now."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return unpack_dual(own).tangent is None


def gelu(own: Tensor) -> Tensor:
    """Return the exact GELU of a tensor that is given away."""
    return torch.ops.aten.gelu_(own) if may_overwrite(own) else F.gelu(own)


def silu(own: Tensor) -> Tensor:
    """Return the SiLU of a tensor that is given away."""
    return F.silu(own, inplace=may_overwrite(own))


def add(own: Tensor, other: Tensor) -> Tensor:
    """Return the sum of a tensor that is given away and another, which may be smaller."""
    if may_overwrite(own) and may_overwrite(other) and _fits(own, other):
        return own.add_(other)
    return own + other


def multiply(own: Tensor, other: Tensor) -> Tensor:
    """Return the product of a tensor that is given away and another, which may be smaller."""
    if may_overwrite(own) and may_overwrite(other) and _fits(own, other):
        return own.mul_(other)
    return own * other


def _fits(own: Tensor, other: Tensor) -> bool:
    """Return whether what both come to lies where the first is."""
    alike = own.dtype == other.dtype
    return alike and torch.broadcast_shapes(own.shape, other.shape) == own.shape
