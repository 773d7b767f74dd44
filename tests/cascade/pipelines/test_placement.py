from __future__ import annotations

import pytest
import torch

from cascade.errors import UserError
from cascade.pipelines.placement import pick_device, pick_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_the_gpu_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for present, expected in ((True, GPU), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=present: here)
        assert pick_device("auto") == expected


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds none on this machine"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["cdua", "gpu", "cpu:x"])
def test_a_device_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"device '{name}'"):
        pick_device(name)


def test_auto_is_never_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_dtype("auto", CPU) == torch.float32
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda _, ok=supported: ok)
        assert pick_dtype("auto", GPU) == expected


def test_an_unknown_dtype_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        pick_dtype("bfloat", CPU)
    assert pick_dtype("float16", CPU) == torch.float16
    assert pick_dtype(torch.bfloat16, CPU) == torch.bfloat16


def test_the_one_cpu_may_be_numbered() -> None:
    assert pick_device("cpu:0") == CPU
    with pytest.raises(UserError, match="there is one cpu"):
        pick_device("cpu:1")
