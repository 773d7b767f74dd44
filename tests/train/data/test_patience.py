"""A shard that does not come is named before the first batch and while a block is waited for."""

from __future__ import annotations

import threading
import time

import pytest

from train.data import exact, resampled
from train.data.config import DataConfig
from train.data.index_store import IndexStore
from train.data.open import open_data
from train.data.patience import Patience
from train.data.resampled import FetchedShard


class Impatience(Patience):
    def __init__(self) -> None:
        super().__init__(after_s=0.1)


def test_only_what_has_been_read_for_long_is_named():
    patience = Patience(after_s=0.05)
    assert patience.describe() is None
    with patience.reading("a.tar"):
        assert patience.describe() is None
        time.sleep(0.1)
        with patience.reading("b.tar"):
            line = patience.describe()
            assert line is not None and "a.tar for 0 s" in line and "b.tar" not in line
    assert patience.describe() is None


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_a_shard_that_does_not_come_is_named_before_training(mode, shards, monkeypatch, caplog):
    one = exact if mode == "exact" else resampled
    monkeypatch.setattr(one, "Patience", Impatience)
    owner, name = (IndexStore, "read") if mode == "exact" else (FetchedShard, "__init__")
    plain = getattr(owner, name)

    def slow(*arguments, **named):
        time.sleep(0.35)
        return plain(*arguments, **named)

    monkeypatch.setattr(owner, name, slow)
    open_data(DataConfig(shards=shards, batch_size=2, mode=mode, workers=0, size=32))
    told = [one.getMessage() for one in caplog.records if "no batch yet" in one.msg % one.args]
    assert 1 <= len(told) <= 3 * 5
    assert ".tar for 0 s" in told[0] and "reading " in told[0]


def test_a_block_on_its_way_is_waited_for_by_its_shard_s_name(shards, monkeypatch):
    config = DataConfig(
        shards=shards, batch_size=1, mode="resampled", workers=0, block_shards=1, size=32
    )
    gate, fetching = threading.Event(), threading.Event()

    class Held(FetchedShard):
        def __init__(self, address, *, allow_pipe):
            if threading.current_thread() is not threading.main_thread():
                fetching.set()
                gate.wait(30)
            super().__init__(address, allow_pipe=allow_pipe)

    monkeypatch.setattr(resampled, "FetchedShard", Held)
    loader = open_data(config).loader_from(0, 0, 1)
    source = loader._loader.dataset.source
    source.serve(0)  # the next block's shard is on its way, and held
    assert fetching.wait(30)
    assert "fetching" not in source.activity.lines()[0], "nobody waits for it yet"
    waiting = threading.Thread(target=source.serve, args=(source.block_steps,))
    waiting.start()
    deadline_s = time.monotonic() + 30
    while "fetching" not in source.activity.lines()[0] and time.monotonic() < deadline_s:
        time.sleep(0.01)
    line = source.activity.lines()[0]
    gate.set()
    waiting.join()
    assert ".tar" in line and "fetching" in line
