from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade.errors import UserError
from cascade.pipelines import placement
from cascade.pipelines.placement import (
    Dtypes,
    computes_bfloat16,
    pick_device,
    pick_dtype,
    pick_dtypes,
    refuse_overflow,
)
from cascade.pipelines.spec import CascadeSpec

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


def test_one_number_format_is_that_of_all_stages() -> None:
    dtypes = pick_dtypes("bfloat16", GPU)
    assert dtypes == Dtypes.same(torch.bfloat16)
    assert str(dtypes) == "bfloat16"
    assert pick_dtypes("bfloat16", CPU).text == torch.float32


def test_each_stage_can_have_its_own_and_the_rest_is_auto() -> None:
    dtypes = pick_dtypes("stage_c=bfloat16, stage_b=float16", CPU)
    assert (dtypes.stage_c, dtypes.stage_b) == (torch.bfloat16, torch.float16)
    assert dtypes.stage_a == torch.float32
    assert (dtypes.of("compressor"), dtypes.of("previewer")) == (torch.bfloat16, torch.bfloat16)
    assert str(dtypes) == "stage_c=bfloat16,stage_b=float16,stage_a=float32"
    assert pick_dtypes(str(dtypes), CPU) == dtypes
    assert pick_dtypes({"stage_c": torch.bfloat16, "stage_b": "float16"}, CPU) == dtypes


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("stage_d=float32", "did you mean 'stage_"),
        ("stage_c=float33", "dtype 'float33'"),
        ("stage_c=bfloat16,float32", "no stage for 'float32'"),
        ("stage_c=bfloat16,stage_c=float32", "stage_c comes twice"),
        ("stage_c=", "no format for 'stage_c'"),
    ],
)
def test_a_wrong_number_format_by_stage_is_refused(choice: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pick_dtypes(choice, CPU)


def test_float16_is_refused_for_the_stage_c_that_overflows_alone(tmp_path: Path) -> None:
    stable = CascadeSpec(name="stable-cascade", image_size=1024, pixels_per_stage_c_cell=42.67)
    with pytest.raises(UserError, match=r"Stage C overflows in float16.*black"):
        refuse_overflow(stable, Dtypes.same(torch.float16), tmp_path)
    by_stage = pick_dtypes("stage_c=bfloat16,stage_b=float16,stage_a=float16", CPU)
    refuse_overflow(stable, by_stage, tmp_path)
    refuse_overflow(replace(stable, name="mine"), Dtypes.same(torch.float16), tmp_path)


def test_a_format_without_instructions_is_known(monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda a=answer: a)
        assert computes_bfloat16(CPU) == (answer and torch.backends.mkldnn.is_available())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including, a=answer: a)
        assert computes_bfloat16(GPU) == answer
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not computes_bfloat16(CPU)


def test_a_format_without_instructions_is_told_once(monkeypatch, caplog):
    placement._tell_of_software.cache_clear()
    monkeypatch.setattr(placement, "computes_bfloat16", lambda device: False)
    pick_dtype("float32", CPU)
    assert not caplog.records
    for _ in range(2):
        pick_dtype("bfloat16", CPU)
    assert [one.getMessage() for one in caplog.records] == [
        "this CPU has no instructions for bfloat16 and computes it in software, many times slower "
        "than float32"
    ]
    placement._tell_of_software.cache_clear()
