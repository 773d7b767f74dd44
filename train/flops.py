"""How much a step computes, and how much the machine could: model FLOPs utilization (MFU)."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

# Dense bfloat16 FLOP/s of tensor cores by the makers' data sheets; the first name that fits counts.
_GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
}
_SIDE, _REPEATS = 1024, 5


class FlopCounter(TorchDispatchMode):
    """Counts the operations of what runs inside it; those of training it does not change.

    The formulas are torch's own; its ``FlopCounterMode`` leaves out attention on a CPU, and takes
    apart what it has no formula for, so that the step's values differ in their last bits.
    """

    def __init__(self, *, inference: bool = False) -> None:
        """Start at zero.

        Args:
            inference: Count under ``torch.inference_mode`` too, where layers arrive whole: what
                has no formula is taken apart, which may change last bits.
        """
        super().__init__()
        self.total = 0.0
        self.inference = inference

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and add its count."""
        kwargs = kwargs or {}
        kind = func.overloadpacket
        if self.inference and kind not in flop_registry:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(one.shape for one in args[:3]))
        elif kind is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(one.shape for one in args[:4]))
        elif kind in flop_registry:
            self.total += flop_registry[kind](*args, **kwargs, out_val=out)
        return out


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return what one device can do at most, in FLOP/s.

    Of known GPUs in 16 bits the data sheet's figure; of anything else the best of a few large
    matrix products, measured here and now, which other load on the machine makes smaller.
    """
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in _GPU_PEAKS.items():
            if known in name:
                return peak
    matrix = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    best_s = float("inf")
    for _ in range(_REPEATS):
        started_s = time.perf_counter()
        # Reading a number of the product waits for it.
        float((matrix @ matrix)[0, 0])
        best_s = min(best_s, time.perf_counter() - started_s)
    return float(2 * _SIDE**3 / best_s)
