"""Files made to do harm, or cut off: refused with one line, nothing run, little memory taken."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascade.checkpoints.readers import open_weights, read_json, weights_in
from cascade.errors import UserError


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def refuse(path: Path, match: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=match) as caught:
            open_weights(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 100e6


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt", "x.pth"])
def test_a_pickle_with_a_payload_runs_nothing(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "pwned")}, tmp_path / name)
    refuse(tmp_path / name, "could run code")
    assert not (tmp_path / "pwned").exists()


def test_a_bare_pickle_is_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Payload(tmp_path / "pwned")))
    refuse(tmp_path / "x.pt", "not a PyTorch file of 2020 or later")
    assert not (tmp_path / "pwned").exists()


def test_a_payload_named_safetensors_runs_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": Payload(tmp_path / "pwned")}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "a pickle. by the name of safetensors")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("claim", [2**60, 2**63, 200 << 20, 17])
def test_a_header_that_claims_more_than_the_file_is_refused(claim: int, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", claim) + b"{}")
    refuse(tmp_path / "x.safetensors", "claims a header")


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1000)}, tmp_path / "x.safetensors")
    whole = (tmp_path / "x.safetensors").read_bytes()
    for size in (0, 7, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:size])
        refuse(tmp_path / "x.safetensors", "not a whole safetensors file")


def test_a_tensor_that_lies_about_its_place_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    data = struct.pack("<Q", len(header)) + header.encode()
    (tmp_path / "x.safetensors").write_bytes(data)
    refuse(tmp_path / "x.safetensors", "not a whole safetensors file")


def test_a_zip_bomb_is_refused_unopened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    refuse(tmp_path / "x.pt", "unpacks to more than it holds")


def test_a_cut_off_pytorch_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "x.pt", "cut off")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"weight": torch.zeros(2)}, tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": name}}))
    refuse(index, "outside its own folder")


def test_an_index_names_what_its_shards_lack(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "a.safetensors", "b": "a.safetensors"}}))
    refuse(index, "1 tensors in no shard: b")
    index.write_text(json.dumps({"weight_map": {"weight": "gone.safetensors"}}))
    refuse(index, r"gone\.safetensors, which is not there")
    index.write_text("{}")
    refuse(index, "no weight_map")


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", "no tensor at all")


def test_json_that_is_broken_or_nested_without_end_is_refused(tmp_path: Path) -> None:
    for content in ("[1, 2]", "{", "[" * 200_000, "\ud800".encode("utf-16", "surrogatepass")):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(data)
        with pytest.raises(UserError, match=r"config\.json"):
            read_json(tmp_path / "config.json")


def test_the_unmarked_variant_wins_and_safetensors_win(tmp_path: Path) -> None:
    for name in ("m.bin", "m.bf16.safetensors", "m.safetensors"):
        (tmp_path / name).touch()
    assert weights_in(tmp_path).name == "m.safetensors"
    (tmp_path / "m.safetensors").unlink()
    assert weights_in(tmp_path).name == "m.bf16.safetensors"
    (tmp_path / "m.bf16.safetensors").unlink()
    assert weights_in(tmp_path).name == "m.bin"
    (tmp_path / "m.bin").unlink()
    with pytest.raises(UserError, match="no weights in it"):
        weights_in(tmp_path)
