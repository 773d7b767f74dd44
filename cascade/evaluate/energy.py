"""Energy that GPUs have taken, where NVIDIA's management library tells it."""

from __future__ import annotations

from typing import Any


class EnergyMeter:
    """Joules of GPUs of this machine since the last reading."""

    def __init__(self, num_gpus: int = 0, first: int = 0) -> None:
        """Take how many GPUs this machine's part of the run uses; 0 measures nothing.

        Args:
            num_gpus: How many.
            first: Number of the first of them.
        """
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._last_j = 0.0
        if num_gpus == 0:
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            gpus = range(first, first + num_gpus)
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(gpu) for gpu in gpus]
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
