"""Which GPUs an energy meter reads; NVML itself is not here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from cascade.evaluate.energy import EnergyMeter, gpus_of

UUIDS = ["aaaa", "bbbb", "cccc"]
"""Of the machine's GPUs in the order of NVML."""
VISIBLE = [2, 0]
"""What CUDA_VISIBLE_DEVICES=2,0 leaves for torch."""


@pytest.fixture
def spent_mj(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What each GPU has spent, by its name in NVML."""
    spent = {f"GPU-{uuid}": 1000 * number for number, uuid in enumerate(UUIDS, 1)}

    def handle(name: str) -> str:
        if name not in spent:
            raise ValueError("not found")
        return name

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetTotalEnergyConsumption=spent.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda gpu: SimpleNamespace(uuid=UUIDS[VISIBLE[gpu]]),
    )
    return spent


def test_gpus_are_those_that_torch_sees(spent_mj: dict[str, int]) -> None:
    first, both = EnergyMeter([0]), EnergyMeter([0, 1])
    spent_mj["GPU-cccc"] += 7000
    spent_mj["GPU-bbbb"] += 100_000  # another run's
    spent_mj["GPU-aaaa"] += 500
    assert (first.spent_j(), both.spent_j()) == (7.0, 7.5)
    assert first.spent_j() == 0.0


def test_nothing_is_told_of_no_gpu_and_of_one_that_nvml_does_not_know(
    spent_mj: dict[str, int],
) -> None:
    del spent_mj["GPU-aaaa"]
    assert EnergyMeter().spent_j() is None
    assert EnergyMeter([1]).spent_j() is None
    assert EnergyMeter([0]).spent_j() == 0.0


def test_a_device_names_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    found = [gpus_of(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")]
    assert found == [[], [3], [1]]
