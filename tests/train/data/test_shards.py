from __future__ import annotations

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from cascade.errors import UserError
from train.data.cached import load_pictures
from train.data.shards import ShardReader
from train.data.sources import expand_shards


def picture(kind: str = "png", color: str = "red", side: int = 16, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    Image.new(mode, (side, side), color).save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples_of(path: Path, members: dict[str, bytes]) -> tuple[list, ShardReader]:
    reader = ShardReader(str(write_tar(path, members)))
    return list(reader), reader


@pytest.mark.parametrize("kind", ["png", "jpg", "jpeg", "webp"])
def test_every_picture_format_is_read(kind, tmp_path):
    data = picture("jpeg" if kind.startswith("j") else kind)
    [sample], _ = samples_of(tmp_path / "a.tar", {f"k.{kind}": data, "k.txt": b" a cat \n"})
    assert sample.pixels.dtype == torch.uint8
    assert sample.pixels.shape == (3, 16, 16)
    assert (sample.pixels[:, 0, 0] - torch.tensor([255, 0, 0])).abs().max() < 5
    assert (sample.key, sample.captions) == ("k", ("a cat",))


def test_the_metadata_s_captions_come_before_the_text_file(tmp_path):
    metadata = json.dumps({"captions": ["one", "two", " "], "source": "x"}).encode()
    members = {"k.png": picture(), "k.txt": b"three", "k.json": metadata}
    [sample], _ = samples_of(tmp_path / "a.tar", members)
    assert sample.captions == ("one", "two")
    assert sample.metadata["source"] == "x"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "I;16"])
def test_every_picture_mode_becomes_rgb(mode, tmp_path):
    image = Image.new("RGB", (16, 16), "white")
    buffer = io.BytesIO()
    image = Image.new(mode, (16, 16), 65535) if mode == "I;16" else image.convert(mode)
    kind = "tiff" if mode == "CMYK" else "png"
    image.save(buffer, format=kind)
    [sample], _ = samples_of(tmp_path / "a.tar", {"k.png": buffer.getvalue(), "k.txt": b"a"})
    assert sample.pixels.min() == 255


def test_bad_samples_are_skipped_counted_and_reported(tmp_path, caplog):
    whole = picture()
    members = {
        "a.png": whole,
        "a.txt": b"good",
        "b.png": whole[: len(whole) // 2],
        "b.txt": b"cut",
        "c.png": b"no picture at all",
        "c.txt": b"x",
        "d.png": whole,
        "d.txt": b"  ",
        "e.txt": b"no picture",
        "f.png": whole,
        "f.json": b"[1]",
        "g.png": whole,
        "g.txt": b"\xff\xfe",
        "h.png": whole,
        "h.json": json.dumps({"captions": "one text"}).encode(),
    }
    with caplog.at_level(logging.INFO):
        samples, reader = samples_of(tmp_path / "a.tar", members)
    assert [sample.key for sample in samples] == ["a"]
    assert reader.report.read == 1
    assert reader.report.corrupt == ["b", "c", "f", "g", "h"]
    assert reader.report.without_caption == ["d"]
    assert reader.report.without_picture == ["e"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "1 pictures read; 5 skipped (corrupt: b, c, f...)" in record.getMessage()


def test_a_shard_cut_anywhere_stops_the_pass_and_names_the_file(tmp_path):
    members = {f"{n}.{kind}": data for n in range(3) for kind, data in
               (("png", picture(side=64)), ("txt", b"a"))}  # fmt: skip
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = len(data.rstrip(b"\0"))
    for size in (0, 100, 512, 700, 1024 + 300, 2 * 1024, end - 200, end, end + 600):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.tar: not a whole tar file \(.*\); write or"):
            list(ShardReader(str(tmp_path / "cut.tar")))


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 3000 + b"\0" * 1024)
    with pytest.raises(UserError, match=r"a\.tar: not a whole tar file"):
        list(ShardReader(str(tmp_path / "a.tar")))


def test_two_pictures_of_one_key_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("k.png")
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
    with pytest.raises(UserError, match=r"a\.tar: .*write it again with distinct keys"):
        list(ShardReader(str(path)))


def test_patterns_expand_in_order(tmp_path):
    for number in range(12):
        (tmp_path / f"x-{number:02d}.tar").touch()
    names = [Path(name).name for name in expand_shards(f"{tmp_path}/x-{{08..10}}.tar")]
    assert names == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert len(expand_shards(f"{tmp_path}/*.tar")) == 12
    with pytest.raises(UserError, match=r"nothing.*no shard matches") as caught:
        expand_shards(f"{tmp_path}/nothing-*.tar")
    assert "\n" not in str(caught.value)


def test_a_data_set_in_memory_needs_one_size_and_at_least_one_picture(tmp_path):
    members = {"a.png": picture(), "a.txt": b"a", "b.png": picture(side=8), "b.txt": b"b"}
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match="pictures of 2 sizes"):
        load_pictures(str(path))
    path = write_tar(tmp_path / "b.tar", {"a.txt": b"a"})
    with pytest.raises(UserError, match="no readable picture with a caption"):
        load_pictures(str(path))
