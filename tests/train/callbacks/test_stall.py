from __future__ import annotations

import threading
import time
import types

import pytest

from train.callbacks.stall import Stall


class Loader:
    """A loader whose next batch does not come."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.asked = threading.Event()

    def waiting_s(self) -> float:
        self.asked.set()
        return self.waited_s

    def describe_wait(self) -> str:
        return f"no batch for {self.waited_s:.0f} s; worker 0 reads a.tar"


def test_a_wait_is_told_once_a_minute_with_the_shard(caplog: pytest.LogCaptureFixture) -> None:
    loader, stall = Loader(), Stall(after_s=60, look_every_s=0.001)
    stall.on_train_start(types.SimpleNamespace(train_dataloader=loader), None)
    for waited_s in (10.0, 61.0, 62.0, 100.0, 122.0, 5.0, 63.0):
        loader.waited_s = waited_s
        for _ in range(3):  # asked with this value for sure
            loader.asked.clear()
            assert loader.asked.wait(5)
    stall.on_train_end(None, None)
    told = [message.split(";")[0] for message in caplog.messages]
    assert told == ["no batch for 61 s", "no batch for 122 s", "no batch for 63 s"]
    assert "a.tar" in caplog.text


def test_nobody_watches_a_loader_that_does_not_know_or_after_the_end() -> None:
    stall = Stall(look_every_s=0.001)
    stall.on_train_start(types.SimpleNamespace(train_dataloader=[1, 2]), None)
    stall.on_train_end(None, None)
    before = threading.active_count()
    stall.on_train_start(types.SimpleNamespace(train_dataloader=Loader()), None)
    assert threading.active_count() == before + 1
    stall.on_exception(None, None, RuntimeError())
    time.sleep(0.01)
    assert threading.active_count() == before
