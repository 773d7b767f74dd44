"""How much the machine could compute: the other half of model FLOPs utilization (MFU)."""

from __future__ import annotations

import time

import torch

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
