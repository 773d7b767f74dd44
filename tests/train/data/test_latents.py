"""Shards of latents: what they hold, that they resume, and what is refused."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cascade.checkpoints.files import load_network, save_network
from cascade.errors import UserError
from stages.stage_a import StageA
from train.data.__main__ import main
from train.data.beside import trusted_beside
from train.data.config import BucketConfig, DataConfig, FilterConfig
from train.data.index import index_of
from train.data.members import array_bytes, read_array
from train.data.open import open_data
from train.encode import FrozenEncoders, FrozenPaths

from .conftest import colored, encoded, write_members, write_set

ROOT = Path(__file__).parents[3]
SIZES = [(32, 32), (48, 24), (24, 48)]


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    return write_set(tmp_path / "pictures", [9, 6, 8], sizes=SIZES)


@pytest.fixture
def paths(tiny_model: Path) -> FrozenPaths:
    return FrozenPaths(
        text=str(tiny_model / "text"),
        stage_a=str(tiny_model / "stage_a.safetensors"),
        compressor=str(tiny_model / "compressor.safetensors"),
    )


def arguments(pictures: str, out: Path, paths: FrozenPaths, *more: str) -> list[str]:
    words = ["precompute", "--shards", pictures, "--shards-out", str(out), "--size", "32"]
    words += ["--buckets.step", "8", "--batch-size", "4", *more]
    for option, path in (("--text", paths.text), ("--stage-a", paths.stage_a),
                         ("--compressor", paths.compressor)):  # fmt: skip
        words += [option, str(path)] if path is not None else []
    return words


def config(out: Path, **values: object) -> DataConfig:
    buckets = BucketConfig(step=8)
    plain = {"shards": f"{out}/*.tar", "batch_size": 4, "size": 32, "buckets": buckets}
    return DataConfig(**{**plain, "mode": "exact", **values})


def test_a_cache_holds_what_encoding_its_pictures_gives(pictures, paths, tmp_path):
    assert main(arguments(pictures, tmp_path / "out", paths)) == 0
    encoders = FrozenEncoders(paths)
    plain = config(tmp_path, shards=pictures, batch_size=1)
    by_key = {b.keys[0]: b for b in itertools.islice(open_data(plain).loader_from(0, 0, 1), 23)}
    data = open_data(config(tmp_path / "out"), paths, pixels=False)
    assert data.encode is None
    seen = []
    for batch in itertools.islice(data.loader_from(0, 0, 1), 8):
        assert batch.pixels is None
        texts = encoders.encode_captions(batch.captions)
        for row, key in enumerate(batch.keys):
            source = by_key[key]
            expected = encoders.encode_pixels(source.pixels)
            for name, tensor in expected.items():
                found = batch.require(name)[row]
                torch.testing.assert_close(found, tensor[0], rtol=2e-3, atol=2e-3, msg=name)
            for name, tensor in texts.items():
                found = batch.require(name)[row]
                torch.testing.assert_close(found, tensor[row], rtol=2e-3, atol=2e-3, msg=name)
            assert torch.equal(batch.crops[row], source.crops[0])
            assert torch.equal(batch.original_sizes[row], source.original_sizes[0])
        seen += batch.keys
    # Latents can't be cropped to a neighbour's shape: 8, 8 and 7 pictures make 2 steps each.
    assert sorted(set(seen)) == sorted(by_key)
    null = encoders.null_text()
    assert null is not None and data.null_text is not None
    torch.testing.assert_close(data.null_text[0], null[0])


def test_an_index_lies_beside_each_shard_and_is_its_own(pictures, paths, tmp_path):
    main(arguments(pictures, tmp_path / "out", paths))
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) == 3
    for shard in shards:
        beside = trusted_beside(str(shard))
        with shard.open("rb") as file:
            found = index_of(file)
        assert beside is not None and beside.keys == found.keys
        assert np.array_equal(beside.heights, found.heights)


@pytest.mark.parametrize("mode", ["exact", "resampled"])
def test_a_stream_of_latents_resumes_exactly(pictures, paths, tmp_path, mode):
    main(arguments(pictures, tmp_path / "out", paths))
    data = open_data(config(tmp_path / "out", mode=mode), paths, pixels=False)
    whole = list(itertools.islice(data.loader_from(0, 0, 1), 12))
    rest = list(itertools.islice(data.loader_from(7, 0, 1), 5))
    for one, other in zip(whole[7:], rest, strict=True):
        assert (one.keys, one.captions) == (other.keys, other.captions)
        assert torch.equal(one.stage_a_latents, other.stage_a_latents)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_as_if_it_had_not_been(pictures, paths, tmp_path):
    main(arguments(pictures, tmp_path / "whole", paths))
    command = [sys.executable, "-m", "train.data", *arguments(pictures, tmp_path / "out", paths)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    first = tmp_path / "out" / "00000.done.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert len(before) < 3, "it was killed too late to prove anything"
    (tmp_path / "out" / ".00002.tar.abc.tmp").write_bytes(b"what a kill leaves")
    assert main(arguments(pictures, tmp_path / "out", paths)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}
    assert after["00000.tar"] == before["00000.tar"]


def test_parts_make_together_what_one_process_makes(pictures, paths, tmp_path, capsys):
    main(arguments(pictures, tmp_path / "whole", paths))
    for part in ("1/2", "0/2"):
        assert main(arguments(pictures, tmp_path / "out", paths, "--part", part)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "23 samples in 3 shards" in capsys.readouterr().out
    main(arguments(pictures, tmp_path / "out", paths))
    assert "0 samples in 0 shards" in capsys.readouterr().out


def test_a_shard_whose_pictures_changed_is_made_again(pictures, paths, tmp_path):
    main(arguments(pictures, tmp_path / "out", paths))
    write_set(Path(pictures).parent, [3], sizes=SIZES)
    main(arguments(pictures, tmp_path / "out", paths))
    done = json.loads((tmp_path / "out" / "00000.done.json").read_text())
    assert done["samples"] == 3


def test_a_folder_of_another_cache_is_refused(pictures, paths, tmp_path):
    main(arguments(pictures, tmp_path / "out", paths))
    with pytest.raises(UserError, match="holds another cache: size is 40 here and 32 there"):
        main([*arguments(pictures, tmp_path / "out", paths), "--size", "40"])
    with pytest.raises(UserError, match="dtype is float32 here and float16 there"):
        main([*arguments(pictures, tmp_path / "out", paths), "--dtype", "float32"])
    with pytest.raises(UserError, match=r"holds shards but no cache\.json"):
        main(arguments(pictures, Path(pictures).parent, paths))


def test_a_cache_goes_on_with_its_own_filters_alone(pictures, paths, tmp_path, caplog):
    out, only_a = tmp_path / "out", FrozenPaths(stage_a=paths.stage_a)
    strict = ["--filters.min_size", "25", "--filters.min_scores", "{aesthetic: 2}"]
    main([*arguments(pictures, out, only_a, "--part", "0/2"), *strict])
    before = contents(out)
    for more, line in (
        ([], "filters.min_size is not set here and 25 there; filters.min_scores.aesthetic is not"),
        ([*strict, "--filters.min_size", "8"], "filters.min_size is 8 here and 25 there; choose"),
        ([*strict, "--filters.max_caption", "9"], "max_caption is 9 here and not set there"),
    ):
        with pytest.raises(UserError, match=f"holds another cache: .*{re.escape(line)}"):
            main([*arguments(pictures, out, only_a), *more])
    assert contents(out) == before
    assert main([*arguments(pictures, out, only_a), *strict]) == 0
    assert len(list(out.glob("*.tar"))) == 3

    def said(**filters: object) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            open_data(config(out, filters=FilterConfig(**filters)), only_a, pixels=False)
        lines = [one for one in caplog.messages if "are not there" in one]
        assert len(lines) <= 1
        return "".join(lines)

    assert "than data.filters (min_size 25, min_scores.aesthetic 2)" in said()
    assert "than data.filters (min_size 25)" in said(min_scores={"aesthetic": 3})
    # A cache of before says nothing of its filters, and neither does a run on it.
    described = json.loads((out / "cache.json").read_text())
    del described["filters"]
    (out / "cache.json").write_text(json.dumps(described))
    assert said() == ""
    assert main(arguments(pictures, out, only_a)) == 0
    assert "whether they were these can't be told" in caplog.text
    assert json.loads((out / "cache.json").read_text())["filters"] is None


def test_a_filter_is_weaker_by_each_of_its_bounds():
    made = FilterConfig(max_aspect=2.0, min_caption=5, max_caption=50, max_scores={"nsfw": 0.5})
    assert made.weaker_than(made) == [] == made.weaker_than(FilterConfig())
    assert FilterConfig().weaker_than(made) == [
        "max_aspect 2", "min_caption 5", "max_caption 50", "max_scores.nsfw 0.5",
    ]  # fmt: skip
    loose = FilterConfig(max_aspect=1.5, min_caption=6, max_caption=51, max_scores={"nsfw": 0.6})
    assert loose.weaker_than(made) == ["max_caption 50", "max_scores.nsfw 0.5"]


def test_a_cache_that_does_not_fit_the_run_is_refused(pictures, paths, tmp_path, tiny_model):
    out = tmp_path / "out"
    main(arguments(pictures, out, FrozenPaths(stage_a=paths.stage_a)))
    only_a = FrozenPaths(stage_a=paths.stage_a)

    def refused(frozen: FrozenPaths, match: str, **values: object) -> None:
        with pytest.raises(UserError, match=match):
            open_data(config(out, **values), frozen, pixels=False)

    refused(paths, "the cache holds stage_a, but this run needs text")
    refused(only_a, "size is 40 here and 32 there", size=40)
    refused(only_a, "buckets is None here and .* there", buckets=None)
    refused(only_a, "crop is random here and center there", crop="random")
    other = StageA(load_network(tiny_model / "stage_a.safetensors", expect=StageA).config)
    save_network(tmp_path / "other.safetensors", other)
    refused(FrozenPaths(stage_a=str(tmp_path / "other.safetensors")),
            "the cache's stage_a was made with weights .*, but this run has")  # fmt: skip
    with pytest.raises(UserError, match="shards of latents, but this run reads pixels"):
        open_data(config(out), only_a)
    with pytest.raises(UserError, match=r"has no cache\.json beside it, but other shards have one"):
        open_data(config(out, shards=f"{out}/*.tar::{pictures}"), only_a, pixels=False)


def test_a_cache_that_was_not_finished_is_said(pictures, paths, tmp_path, caplog):
    only_a = FrozenPaths(stage_a=paths.stage_a)
    main(arguments(pictures, tmp_path / "out", only_a, "--part", "0/2"))
    open_data(config(tmp_path / "out"), only_a, pixels=False)
    assert "2 of the cache's 3 shards" in caplog.text


def test_values_that_are_not_finite_are_never_written(pictures, paths, tmp_path, monkeypatch):
    encode = StageA.encode
    for factor, hint in ((float("nan"), ""), (1e6, "; try --dtype float32")):
        monkeypatch.setattr(StageA, "encode", lambda self, x, f=factor: encode(self, x) * f)
        with pytest.raises(UserError, match=rf"00000/\d+: stage_a_latents .*not written{hint}$"):
            main(arguments(pictures, tmp_path / "out", FrozenPaths(stage_a=paths.stage_a)))
        assert list((tmp_path / "out").glob("*.tar")) == []
        assert list((tmp_path / "out").glob(".*.tmp")) == []


def test_broken_latents_are_found_and_objects_are_never_loaded(paths, pictures, tmp_path, caplog):
    out = tmp_path / "out"
    only_a = FrozenPaths(stage_a=paths.stage_a)
    main(arguments(pictures, out, only_a))
    good = array_bytes(np.zeros((4, 8, 8), np.float16))
    nan = array_bytes(np.full((4, 8, 8), np.nan, np.float16))
    objects = io.BytesIO()
    np.save(objects, np.array([print], object), allow_pickle=True)
    row = json.dumps({"captions": ["x"], "shape": [32, 32]}).encode()
    rows = []
    for key, data in {"good": good, "nan": nan, "object": objects.getvalue(), "cut": good[:90],
                      "ints": array_bytes(np.zeros((4, 8, 8), int))}.items():  # fmt: skip
        rows += [(f"{key}.stage_a.npy", data), (f"{key}.json", row)]
    for old in out.glob("*.tar"):
        old.unlink()
    write_members(out / "a.tar", [*rows, ("wide.stage_a.npy", good), ("wide.json", b"{}")])
    data = open_data(config(out, batch_size=5, max_broken_share=1.0), only_a, pixels=False)
    [batch] = itertools.islice(data.loader_from(0, 0, 1), 1)
    assert set(batch.keys) == {"a/good"}
    for key, word in {"nan": "not finite", "object": "", "cut": "", "ints": "int64"}.items():
        assert any(f"a/{key}: " in line and word in line for line in caplog.text.splitlines())
    with pytest.raises(ValueError, match="allow_pickle"):
        read_array(objects.getvalue())


def test_what_can_t_be_a_cache_is_refused(pictures, paths, tmp_path):
    words = arguments(pictures, tmp_path / "out", FrozenPaths())
    with pytest.raises(
        UserError, match="name a network: --text, --image, --stage-a, --compressor, --autoenc"
    ):
        main(words)
    words = arguments(pictures, tmp_path / "out", paths)
    with pytest.raises(UserError, match="--part 2/2: parts are numbered from 0"):
        main([*words, "--part", "2/2"])
    words.remove("--size")
    words.remove("32")
    with pytest.raises(UserError, match="--size: missing"):
        main(words)
    with pytest.raises(UserError, match="did you mean 'buckets'"):
        main([*words, "--size", "32", "--bucket.step", "8"])
    one = encoded(colored(1, (40, 40)))
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_members(tmp_path / folder / "x.tar", [("k.png", one), ("k.txt", b"x")])
    both = f"{tmp_path}/a/*.tar::{tmp_path}/b/*.tar"
    with pytest.raises(UserError, match="another shard is called x too"):
        main(arguments(both, tmp_path / "out", paths))
