"""How many operations a computation takes, attention included on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_ON_CPU = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


class FlopCounter(TorchDispatchMode):
    """Counts the operations of what runs inside it, and changes nothing of it.

    The formulas are torch's own; its ``FlopCounterMode`` leaves out attention on a CPU, and takes
    apart what it has no formula for, so that the step's values differ in their last bits.
    Forward-mode derivatives are an exception: under any dispatch mode torch computes that of its
    layer norm, for one, in another order (``stages.layers`` writes its own for that reason).
    """

    def __init__(self, *, take_apart: bool = False, where: Callable[[], str] | None = None) -> None:
        """Start at zero.

        Args:
            take_apart: Count inside of operations without a formula as well, which inference mode
                leaves whole; values may then differ in their last bits.
            where: Names the place that runs, for ``by_place``.
        """
        super().__init__()
        self.total = 0.0
        self.by_place: dict[str, float] = {}
        self._take_apart = take_apart
        self._where = where

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and add its count."""
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if self._take_apart and kind not in flop_registry and kind not in _ON_CPU:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        before = self.total
        if kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(one.shape for one in args[:3]))
        elif kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(one.shape for one in args[:4]))
        elif kind in flop_registry:
            self.total += flop_registry[kind](*args, **kwargs, out_val=out)
        if self._where is not None and self.total > before:
            place = self._where()
            self.by_place[place] = self.by_place.get(place, 0.0) + self.total - before
        return out
