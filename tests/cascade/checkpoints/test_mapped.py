from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cascade.checkpoints import mapped
from cascade.checkpoints.mapped import MappedFile, Stored, StoredTensors, open_safetensors
from cascade.checkpoints.readers import open_weights
from cascade.errors import UserError
from cascade.evaluate.process_memory import is_measurable, measure

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def write_raw(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)
    return path


def test_every_number_format_and_shape_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = {str(dtype): (torch.arange(6) % 2).view(2, 3).to(dtype) for dtype in DTYPES}
    state |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "byte": torch.ones(1) > 0}
    save_file(state, path, metadata={"a": "b"})
    opened = open_safetensors(path)
    assert opened.metadata == {"a": "b"}
    assert set(opened.tensors) == set(state) == set(load_file(path))
    for key, value in state.items():
        found = opened.tensors[key]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.tolist() == value.tolist()
        assert opened.tensors.stored[key].num_bytes == value.numel() * value.element_size()


def test_numbers_that_begin_at_an_odd_byte_are_read_too(tmp_path: Path) -> None:
    header = '{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += " " * (1 - len(header) % 4 + 4)
    path = write_raw(tmp_path / "x.safetensors", header, struct.pack("<ff", 1.5, -2.0))
    assert (8 + len(header)) % 4
    assert open_safetensors(path).tensors["w"].tolist() == [1.5, -2.0]


def test_a_name_that_is_there_twice_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    one = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = "{" + one + "," + one.replace("[2]", "[1,2]") + "}"
    path = write_raw(tmp_path / "x.safetensors", header, bytes(8))
    with safe_open(path, framework="pt") as file:
        expected = file.get_tensor("w").shape
    assert open_safetensors(path).tensors["w"].shape == expected


def test_a_number_format_that_torch_has_none_for_is_one_line(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}})
    path = write_raw(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(UserError, match=r"x\.safetensors: w is in F8_E8M0"):
        open_safetensors(path)


def test_moving_is_to_a_number_format_of_fractions_alone() -> None:
    state = {"a": torch.ones(2, 3), "count": torch.tensor(7)}
    stored = StoredTensors(
        {key: Stored(v.shape, v.dtype, lambda v=v: v) for key, v in state.items()}  # type: ignore[misc]
    )
    moved = stored.moved("cpu", torch.bfloat16)
    assert {key: value.dtype for key, value in moved.items()} == {
        "a": torch.bfloat16,
        "count": torch.int64,
    }
    assert {key: one.dtype for key, one in moved.stored.items()} == {
        key: value.dtype for key, value in moved.items()
    }
    kept = stored.moved("cpu", None)
    assert kept["a"] is state["a"]


def test_asking_for_a_name_reads_nothing() -> None:
    def read() -> Tensor:
        raise AssertionError("read")

    stored = StoredTensors({"a": Stored(torch.Size([2]), torch.float32, read)})
    assert "a" in stored and "b" not in stored
    assert list(stored) == ["a"] and len(stored) == 1
    assert "a" in stored.moved("cpu", torch.float16)


def test_joined_tensors_are_those_of_cat(tmp_path: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.randn(4, 3), "c": torch.randn(4, 2)}
    save_file(state | {"scalar": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    tensors = open_safetensors(tmp_path / "x.safetensors").tensors
    assert torch.equal(tensors.joined(["a", "b"]), torch.cat([state["a"], state["b"]]))
    half = tensors.moved("cpu", torch.float16).joined(["b", "a"])
    assert torch.equal(half, torch.cat([state["b"], state["a"]]).half())
    for names in (["a", "c"], ["scalar", "scalar"]):
        with pytest.raises(ValueError, match="do not fit together"):
            tensors.joined(names)


def test_what_is_changed_in_place_stays_so_and_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1 << 16)}, path)
    tensors = open_safetensors(path).tensors
    kept = tensors["w"]
    kept.add_(1)
    tensors["w"].sum()  # another one on the same pages, which goes at once
    gc.collect()
    assert bool((kept == 1).all())
    assert not load_file(path)["w"].any()


def ways_to_map(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Have files mapped as on this system, as without MAP_NORESERVE, or to be read alone."""
    if way == "accounted":
        monkeypatch.delattr(mmap, "MAP_NORESERVE", raising=False)
        monkeypatch.setattr(mapped, "_LINUX_NORESERVE", {})
    elif way == "read":

        def refuse(descriptor: int) -> mmap.mmap:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        monkeypatch.setattr(mapped, "_map_privately", refuse)


@pytest.mark.parametrize("way", ["here", "accounted", "read"])
def test_however_a_file_is_mapped_its_tensors_can_be_written_and_it_cannot(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways_to_map(monkeypatch, way)
    path = tmp_path / "x.safetensors"
    state = {"a": torch.arange(5000.0), "b": torch.arange(7).to(torch.uint8)}
    save_file(state, path)
    content = path.read_bytes()
    tensors = open_safetensors(path).tensors
    found = dict(tensors)
    for key, value in state.items():
        assert torch.equal(found[key], value)
        found[key].add_(1)
        assert torch.equal(found[key], value + 1)
    assert path.read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="reads how maps are accounted from /proc")
def test_a_map_sets_no_memory_aside(tmp_path: Path) -> None:
    """Linux accounts a writable private map whole, unless it is told not to ("ac", "nr")."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("under strict overcommit every writable map is accounted")
    path = tmp_path / "accounted.bin"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    file = MappedFile(path)
    maps = Path("/proc/self/smaps").read_text()
    flags = next(
        line.split()[1:]
        for line in maps[maps.index(str(path)) :].splitlines()
        if line.startswith("VmFlags")
    )
    assert "ac" not in flags and "nr" in flags and "wr" in flags
    assert file[0:3] == bytes(3)


def sparse(path: Path, num_bytes: int) -> None:
    """Write a file of zeros that takes no room on the disk, and a one at its end."""
    header = {
        "w": {"dtype": "U8", "shape": [num_bytes - 1], "data_offsets": [0, num_bytes - 1]},
        "last": {"dtype": "U8", "shape": [1], "data_offsets": [num_bytes - 1, num_bytes]},
    }
    write_raw(path, json.dumps(header), b"")
    with open(path, "ab") as file:
        file.truncate(file.tell() + num_bytes - 1)
    with open(path, "ab") as file:
        file.write(b"\x01")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems account maps in other ways")
def test_a_file_larger_than_all_memory_can_be_mapped(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    size = 4 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        sparse(path, size)
    except OSError as error:
        pytest.skip(f"this file system has no files of {size >> 30} GiB ({error})")
    tensors = open_safetensors(path).tensors
    assert tensors["last"].item() == 1
    assert tensors.stored["w"].num_bytes == size - 1


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_where_no_writable_map_is_granted_tensors_are_copies(tmp_path: Path) -> None:
    """A limit on data refuses private writable maps with the same error as strict overcommit."""
    path = tmp_path / "large.safetensors"
    sparse(path, 1 << 36)
    code = f"""
import resource
from pathlib import Path
from cascade.checkpoints.mapped import open_safetensors
resource.setrlimit(resource.RLIMIT_DATA, (1 << 35, 1 << 35))
last = open_safetensors(Path({str(path)!r})).tensors["last"]
last.add_(1)
print(last.item())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.stdout.strip(), run.returncode) == ("2", 0), run.stderr


@pytest.mark.skipif(not is_measurable(), reason="reads memory from Linux's /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_the_pages_of_a_tensor_go_with_it(kind: str, tmp_path: Path) -> None:
    state = {f"w{index}": torch.full((1 << 20,), float(index)) for index in range(16)}  # 64 MB
    path = tmp_path / f"x.{kind}"
    if kind == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    [opened] = open_weights(path)
    before = measure().mapped
    kept = opened.tensors["w3"]
    for index in range(16):
        assert opened.tensors[f"w{index}"].sum() == index << 20
    assert measure().mapped - before < 12e6
    assert bool((kept == 3).all())


def test_views_and_odd_orders_of_a_pytorch_file_come_back(tmp_path: Path) -> None:
    whole = torch.randn(30, 20)
    state: dict[str, Any] = {"turned": whole.t(), "part": whole[3:], "whole": whole}
    state |= {"scalar": torch.tensor(5), "empty": torch.empty(0, 3)}
    torch.save({"state_dict": state, "other": torch.ones(100)}, tmp_path / "x.pt")
    [opened] = open_weights(tmp_path / "x.pt")
    assert opened.tensors.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(opened.tensors[key], value)
