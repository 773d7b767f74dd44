"""Energy that GPUs have taken, where NVIDIA's management library tells it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def gpus_of(device: torch.device) -> list[int]:
    """Return the number of a device's GPU as torch counts them; nothing of other devices."""
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]


class EnergyMeter:
    """Joules of GPUs of this machine since the last reading."""

    def __init__(self, gpus: Sequence[int] = ()) -> None:
        """Take the GPUs that this machine's part of the run uses; none measures nothing.

        Args:
            gpus: Their numbers as torch counts them, which are not NVML's where
                ``CUDA_VISIBLE_DEVICES`` chooses some: the two meet by the GPU's UUID.
        """
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._last_j = 0.0
        if not gpus:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            names = [f"GPU-{torch.cuda.get_device_properties(gpu).uuid}" for gpu in gpus]
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
            self._nvml = pynvml
            self._last_j = self._read_j()
        except Exception:  # no library, no driver, or a GPU that does not tell: no figure
            self._nvml = None

    def spent_j(self) -> float | None:
        """Return the joules since the last call, or None where nothing tells them."""
        if self._nvml is None:
            return None
        now_j = self._read_j()
        spent_j, self._last_j = now_j - self._last_j, now_j
        return spent_j

    def _read_j(self) -> float:
        read_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption
        return float(sum(read_mj(handle) for handle in self._handles)) / 1000.0
