"""Checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from cascade.errors import UserError
from train.callbacks.checkpoints import (
    RunCheckpoints,
    checkpoint_path,
    checkpoints_in,
    find_damage,
    newest_checkpoint,
)

KILLS = 100


def save(out: Path, step: int, keep: int = 2, **content: object) -> None:
    RunCheckpoints(keep).save_checkpoint(
        {"global_step": step, **content}, checkpoint_path(out, step)
    )


def test_no_damage_to_the_archive_itself_is_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    torch.save({"global_step": 3, "values": [torch.arange(5.0), torch.ones(2, 2)]}, path)
    content = path.read_bytes()
    assert find_damage(path) is None
    found = 0
    for place in range(content.index(b"PK\x01\x02"), len(content)):  # its directory
        for bit in (1, 0x40):
            damaged = bytearray(content)
            damaged[place] ^= bit
            path.write_bytes(damaged)
            if find_damage(path) is None:
                torch.load(path, weights_only=True)
            else:
                found += 1
    assert found > 300


def test_what_a_package_that_is_not_there_wrote_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    torch.save({"states": collections.UserDict(a=1)}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert find_damage(path) is None


def test_a_disk_that_does_not_read_says_nothing_of_a_checkpoint(tmp_path, monkeypatch) -> None:
    path = tmp_path / "whole.ckpt"
    torch.save({"global_step": 3}, path)

    def broken(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch, "load", broken)
    with pytest.raises(OSError, match="Input/output"):
        find_damage(path)


def test_only_the_newest_are_kept_by_their_numbers(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step)
    kept = list(checkpoints_in(tmp_path / "checkpoints"))
    assert [path.name for path in kept] == ["step=11.ckpt", "step=10.ckpt"]
    assert newest_checkpoint(tmp_path) == kept[0]


def test_one_that_can_t_be_written_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"step=2\.ckpt: can't be written: the disk is full"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=1.ckpt"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**8, 10**8))
    save(tmp_path, 1, weights=torch.zeros(1000, 1000))
    weights = torch.zeros(4000, 4000)
    with pytest.raises(
        UserError,
        match=r"131 MB must be free \(1 checkpoint\(s\), and 67 MB for .*disk has 100",
    ):
        save(tmp_path, 2, weights=weights, again=weights.view(-1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=1.ckpt"]


def test_what_reads_back_otherwise_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.save

    def faulty(content: object, path: Path) -> None:
        whole(content, path)
        with open(path, "r+b") as file:
            file.seek(os.path.getsize(path) // 2)
            file.write(b"faulty disk")

    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(torch, "save", faulty)
    with pytest.raises(UserError, match="reads back otherwise"):
        save(tmp_path, 2, keep=1, weights=torch.zeros(1000))
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL")
def test_a_hundred_kills_during_saves_leave_a_whole_checkpoint_each_time(tmp_path: Path) -> None:
    weights = torch.arange(300_000, dtype=torch.float32)
    draws = random.Random(0)
    step, interrupted = 1, 0
    save(tmp_path, step, weights=weights)
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:  # saves without end, and is killed in the middle of it
            torch.set_num_threads(1)  # the parent's other threads are not here
            while True:
                step += 1
                save(tmp_path, step, weights=weights + step)
        time.sleep(draws.uniform(0.002, 0.03))
        while kill % 2 and not any((tmp_path / "checkpoints").glob(".step=*.tmp")):
            time.sleep(0.0005)  # every other one surely hits a save
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = list((tmp_path / "checkpoints").glob(".step=*.tmp"))
        interrupted += bool(left)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None and find_damage(newest) is None
        content = torch.load(newest, weights_only=True)
        found = int(content["global_step"])
        assert found >= step, "an older one than there was"
        step = found
        if step > 1:
            assert torch.equal(content["weights"], weights + step)
        names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
        assert len(names) <= 3 and not any(name.endswith((".tmp", ".damaged")) for name in names)
    assert interrupted > KILLS // 4, "the kills must hit saves, or nothing was tested"
