from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.checkpoints import written_tensors
from cascade.checkpoints.files import (
    assign_strictly,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    build_on_meta,
    file_hash,
    load_network,
    on_meta,
    read_metadata,
    read_tensors,
    save_network,
    strip_prefixes,
)
from cascade.errors import UserError


@dataclass(frozen=True)
class ToyConfig:
    channels: int = 3
    depth: int = 1


class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            nn.Linear(config.channels, config.channels) for _ in range(config.depth)
        )
        self.register_buffer("count", torch.tensor(7))


class Other(Toy):
    pass


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_network(path, Toy(ToyConfig(channels=4, depth=2)), metadata={"train_steps": "12"})
    return path


def _one_line(caught: pytest.ExceptionInfo[UserError], path: Path) -> None:
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_is_written_whole_with_the_rights_of_a_plain_one(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.txt", "Würstchen\n")
    atomic_write_bytes(tmp_path / "b.bin", b"\x00\xff")
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "Würstchen\n"
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff"
    rights = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.txt", "plain")}
    assert rights["a.txt"] == rights["plain"]
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.bin", "plain"]


@pytest.mark.parametrize("error", [RuntimeError("a slip"), KeyboardInterrupt()])
def test_failing_halfway_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path, "a rename is atomic within one folder alone"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with open(path, encoding="utf-8") as reader:
        atomic_write_text(path, "new")
        assert reader.read() == "old", "the new file takes the name, not the place, of the old one"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/some/file"), "disk quota is used up"),
        (OSError(errno.EFBIG, "File too large"), "too large"),
        (SafetensorError("I/O error: No space left on device"), "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_the_old_weights(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    before = saved.read_bytes()

    def half(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(written_tensors, "save_file", half)
    with pytest.raises(UserError, match=message) as caught:
        save_network(saved, Toy(ToyConfig()))
    _one_line(caught, saved)
    assert "can't be written" in str(caught.value)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_full_disk_under_a_text_file_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(UserError, match=r"a\.json: can't be written: the disk is full"):
        atomic_write_text(tmp_path / "a.json", "{}")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_only_when_the_data_reach_it_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="the disk is full"):
        atomic_write_text(tmp_path / "a.json", "{}")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a.txt", tmp_path / "file" / "a.txt"):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="can't be written") as caught:
            atomic_write_text(path, "x")
        _one_line(caught, path)


def test_an_error_that_no_disk_caused_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), atomic_path(tmp_path / "a"):
        raise ConnectionResetError(errno.ECONNRESET, "reset")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    for read in (read_metadata, read_tensors, lambda p: load_network(p, expect=Toy)):
        with pytest.raises(UserError, match="a pickle can run code") as caught:
            read(path)
        _one_line(caught, path)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_another_name_is_not_opened_either(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="a PyTorch file"):
        read_tensors(path)


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_a_truncated_file_is_one_line(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    for read in (read_metadata, read_tensors, lambda p: load_network(p, expect=Toy)):
        with pytest.raises(UserError, match="not a whole safetensors file") as caught:
            read(saved)
        _one_line(caught, saved)


def test_a_missing_file_or_a_folder_is_one_line(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none.safetensors", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match="no such weights file"):
            read_tensors(path)
        with pytest.raises(UserError, match=what):
            file_hash(path)


def test_the_hash_is_the_beginning_of_sha_256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * (3 << 20))
    assert file_hash(path) == hashlib.sha256(b"x" * (3 << 20)).hexdigest()[:12]


def test_a_file_carries_its_networks_class_and_configuration(saved: Path) -> None:
    metadata = read_metadata(saved)
    assert metadata["cascade_class"] == "Toy"
    assert json.loads(metadata["cascade_config"]) == {"channels": 4, "depth": 2}
    assert metadata["train_steps"] == "12"


def test_a_network_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    network, path = Toy(ToyConfig(channels=5, depth=2)), tmp_path / "toy.safetensors"
    save_network(path, network)
    loaded = load_network(path, expect=Toy)
    assert loaded.config == network.config and not loaded.training
    assert loaded.state_dict().keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
        assert loaded.state_dict()[key].device.type == "cpu"


def test_a_number_format_is_that_of_the_floating_point_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_network(path, Toy(ToyConfig()), dtype=torch.bfloat16)
    dtypes = {key: value.dtype for key, value in read_tensors(path).items()}
    assert dtypes["layers.0.weight"] == torch.bfloat16 and dtypes["count"] == torch.int64
    loaded = load_network(path, expect=Toy, dtype=torch.float32)
    assert loaded.layers[0].weight.dtype == torch.float32
    assert loaded.count.dtype == torch.int64
    assert load_network(path, expect=Toy).layers[0].weight.dtype == torch.bfloat16


def test_a_network_that_is_loaded_while_pictures_are_made_can_be_trained(saved: Path) -> None:
    with torch.inference_mode():
        network = load_network(saved, expect=Toy, dtype=torch.bfloat16)
    network.layers[0](torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
    assert network.layers[0].weight.grad is not None


def test_another_networks_file_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a Toy, but a Other is needed"):
        load_network(saved, expect=Other)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(UserError, match="says nothing of its network"):
        load_network(foreign, expect=Toy)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no configuration"),
        ("{", "holds no configuration"),
        ("[1]", "expected a section of keys"),
        ('{"chanels": 4}', r"\(configuration\): chanels: unknown key; did you mean 'channels'"),
        ('{"channels": "4"}', "channels: expected int, got '4'"),
    ],
)
def test_a_configuration_that_is_spoilt_is_one_line(
    tmp_path: Path, config: str | None, message: str
) -> None:
    path = tmp_path / "toy.safetensors"
    metadata = {"cascade_class": "Toy", **({} if config is None else {"cascade_config": config})}
    save_file(Toy(ToyConfig()).state_dict(), path, metadata=metadata)
    with pytest.raises(UserError, match=message) as caught:
        load_network(path, expect=Toy)
    _one_line(caught, path)


def test_keys_that_do_not_fit_are_named_by_kind() -> None:
    state = dict(Toy(ToyConfig(depth=2)).state_dict())
    state["layers.0.weight"] = torch.zeros(2, 3)
    state["extra"] = state.pop("layers.1.bias")
    with pytest.raises(UserError) as caught:
        assign_strictly(Toy(ToyConfig(depth=2)), state, "x.safetensors")
    message = str(caught.value)
    assert message.startswith("x.safetensors: does not fit Toy: ")
    assert "1 missing: layers.1.bias" in message
    assert "1 unexpected: extra" in message
    assert "1 misshapen: layers.0.weight (2x3 in the file, 3x3 in the network)" in message


def test_whole_numbers_in_place_of_weights_are_refused() -> None:
    state = dict(Toy(ToyConfig()).state_dict())
    state["layers.0.weight"] = state["layers.0.weight"].to(torch.int32)
    with pytest.raises(
        UserError, match=r"1 of another kind of number: layers.0.weight \(torch.int32"
    ):
        assign_strictly(Toy(ToyConfig()), state, "x.safetensors")


@pytest.mark.parametrize("channels", [-1, 10**30])
def test_a_configuration_of_which_no_network_can_be_built_is_one_line(channels: int) -> None:
    with pytest.raises(UserError, match="no Toy can be built of its configuration") as caught:
        build_on_meta(Toy, ToyConfig(channels=channels), "toy.safetensors")
    assert "\n" not in str(caught.value)


def test_on_meta_nothing_is_drawn_and_afterwards_as_ever() -> None:
    before = torch.get_rng_state()
    with on_meta():
        layer = nn.Linear(3, 2)
        nn.init.normal_(layer.weight)
        nn.init.xavier_uniform_(layer.weight, gain=0.02)
        drawn = torch.randn(2, 3)
    assert layer.weight.is_meta and layer.bias.is_meta
    assert drawn.is_meta and drawn.shape == (2, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.Linear(3, 2).weight.any() and torch.randn(4).any()


def test_only_the_first_five_keys_of_a_kind_are_named() -> None:
    with pytest.raises(UserError, match=r"11 missing: .* and 6 more") as caught:
        assign_strictly(Toy(ToyConfig(depth=5)), Toy(ToyConfig(depth=1)).layers.state_dict(), "x")
    assert (
        "count, layers.0.weight, layers.0.bias, layers.1.weight, layers.1.bias and 6 more"
        in str(caught.value)
    )


def test_a_network_that_refuses_a_file_keeps_its_weights() -> None:
    network = Toy(ToyConfig())
    before = network.layers[0].weight.clone()
    with pytest.raises(UserError):
        assign_strictly(network, {"layers.0.weight": torch.zeros(3, 3)}, "x")
    assert torch.equal(network.layers[0].weight, before)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    metadata = {"cascade_class": "Toy", "cascade_config": "{}"}
    save_file({}, path, metadata=metadata)
    with pytest.raises(UserError, match="holds no tensor at all"):
        load_network(path, expect=Toy)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_prefixes_are_removed_where_all_keys_have_them(prefix: str) -> None:
    state = {f"{prefix}a": torch.zeros(1), f"{prefix}b": torch.ones(1)}
    assert strip_prefixes(state).keys() == {"a", "b"}
    mixed = {"module.a": torch.zeros(1), "b": torch.ones(1)}
    assert strip_prefixes(mixed).keys() == mixed.keys()
    assert strip_prefixes({}) == {}
