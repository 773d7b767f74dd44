"""Indexes beside shards: what they save, when they are not trusted, and what checksums tell."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade.errors import run_main
from train.data.__main__ import main
from train.data.beside import index_path, trusted_beside, write_beside
from train.data.config import DataConfig
from train.data.index import index_of, load_index, save_index
from train.data.open import open_data
from train.data.write import WriteOptions, write_shards

from .conftest import colored, encoded, write_members


@pytest.fixture
def written(source: Path, tmp_path: Path) -> Path:
    """A folder of three shards of five, five and two pictures."""
    write_shards(WriteOptions(source=source, out=tmp_path / "set", name="x", shard_size=5))
    return tmp_path / "set"


def keys(folder: Path, indexes: Path) -> list[list[str]]:
    values = {"batch_size": 4, "mode": "exact", "size": 32, "index_folder": str(indexes)}
    loader = open_data(DataConfig(shards=f"{folder}/*.tar", **values)).loader_from(0, 0, 1)
    return [batch.keys for batch in itertools.islice(loader, 3)]


def test_a_first_run_on_written_shards_looks_through_none(written, tmp_path, monkeypatch):
    def scanned(*_: object, **__: object) -> None:
        raise AssertionError("a shard was looked through")

    with monkeypatch.context() as patch:
        patch.setattr("train.data.index_store.index_of", scanned)
        with_indexes = keys(written, tmp_path / "a")
    for path in written.glob("*.index.npz"):
        path.unlink()
    assert keys(written, tmp_path / "b") == with_indexes
    assert len(set(itertools.chain(*with_indexes))) == 12


def test_the_index_is_that_of_the_shard_and_says_what_it_is_of(written, source, tmp_path):
    shard = written / "x-000002.tar"
    facts: dict[str, object] = {}
    index = load_index(index_path(shard), facts=facts)
    save_index(index_of(io.BytesIO(shard.read_bytes())), tmp_path / "scanned.npz", facts)
    assert (tmp_path / "scanned.npz").read_bytes() == index_path(shard).read_bytes()
    assert index.keys == ["10", "11"]
    assert (facts["samples"], facts["bytes"]) == (2, shard.stat().st_size)
    write_shards(WriteOptions(source=source, out=written, name="x", force=True))
    names = sorted(path.name for path in written.iterdir())
    assert names == ["x-000000.index.npz", "x-000000.tar"]


def members(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        return [(one.name, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]


def larger(shard: Path) -> None:
    write_members(shard, [(name, data * 40) for name, data in members(shard)])


def another_order(shard: Path) -> None:
    rows = members(shard)
    write_members(shard, [*rows[-3:], *rows[:-3]])


def another_last(shard: Path) -> None:
    rows = members(shard)
    picture = encoded(colored(3, (30, 30)))
    write_members(shard, [*rows[:-3], (rows[-3][0], picture), *rows[-2:]])


def one_more(shard: Path) -> None:
    rows = [("more.png", encoded(colored(3, (8, 8)))), ("more.txt", b"x")]
    write_members(shard, members(shard) + rows)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (larger, "bytes, this one has"),
        (another_order, "sample 1 of the shard is not 10"),
        (another_last, "sample 2 of the shard is not 11"),
        (one_more, "the shard has more than its 2 samples"),
    ],
)
def test_an_index_of_another_file_is_not_trusted_and_said(
    change: Callable[[Path], None], reason, written, tmp_path, caplog
):
    shard = written / "x-000002.tar"
    before = shard.stat().st_size
    change(shard)
    assert (shard.stat().st_size == before) is (change is not larger), "the case is another"
    assert trusted_beside(str(shard)) is None
    [line] = caplog.messages
    assert line.startswith(f"{shard}: the index beside it is not trusted: ") and reason in line
    seen = set(itertools.chain(*keys(written, tmp_path / "index")))
    assert ("x-000002/more" in seen) is (change is one_more)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 nothing", None])
def test_an_index_that_can_t_be_read_is_made_again(data, written, tmp_path, caplog):
    path = index_path(written / "x-000000.tar")
    if data is None:  # whole, but of another version
        index = load_index(path)
        save_index(index, path, {"version": 0, "samples": 5, "bytes": 1, "sha256": ""})
    else:
        path.write_bytes(data)
    assert len(set(itertools.chain(*keys(written, tmp_path / "index")))) == 12
    assert [line for line in caplog.messages if line.startswith(f"{path}: not ")]


def test_names_that_a_header_does_not_hold_whole_are_no_mismatch(tmp_path):
    for number, key in enumerate(("k" * 200, "b\u00e4r")):
        rows = [(f"{key}.png", encoded(colored(1, (9, 9)))), (f"{key}.txt", b"x")]
        shard = write_members(tmp_path / f"{number}.tar", rows)
        write_beside(shard)
        assert trusted_beside(str(shard)).keys == [key]


def test_check_all_compares_checksums(written, capsys):
    words = ["check", f"{written}/*.tar", "--size", "32"]

    def run(*more: str) -> tuple[int, str, str]:
        code = run_main(lambda: main([*words, *more]))
        return (code, *capsys.readouterr())

    code, table, _ = run("--all")
    assert code == 0 and "sums      3 as written, 0 not" in table
    shard = written / "x-000001.tar"
    data = bytearray(shard.read_bytes())
    row = json.loads(members(shard)[2][1])
    place = data.index(b'"captions": ["') + len(b'"captions": ["')
    assert row["captions"]
    data[place] ^= 1  # a letter of a caption: every reader takes it
    shard.write_bytes(data)
    code, table, _ = run()
    assert code == 0 and "sums" not in table
    code, table, error = run("--all")
    assert code == 2 and "sums      2 as written, 1 not" in table
    [line] = error.splitlines()
    assert f"{shard}: its sha256 is " in line and "delete x-000001.index.npz" in line
    index_path(shard).unlink()
    code, table, _ = run("--all")
    assert code == 0 and "sums      2 as written, 0 not" in table
