"""A set with everything wrong: each fault is counted and named, and training goes on."""

from __future__ import annotations

import io
import itertools
import json
import logging
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade.errors import UserError, run_main
from train.data.__main__ import main
from train.data.archive import DamagedTarError, entries_of, members_of, split_name
from train.data.config import DataConfig
from train.data.index import index_of, load_index, save_index
from train.data.open import open_data
from train.data.pictures import fit_picture, read_head

from .conftest import colored, encoded, gradient, write_members

SCRIPTS = [
    "ein Käse",
    "кошка на ковре",
    "猫が寝ている",
    "قطة صغيرة",
    "แมวน้อย",
    "🐈‍⬛ cat",
    "a\ncat",
]


class Bomb:
    """Unpickling it would be seen."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("a pickle was opened",))


def png_bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 1, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def members() -> list[tuple[str, bytes]]:
    """Good samples and bad ones; the keys say which."""
    whole = encoded(gradient(60, 40))
    moving = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    frames[0].save(moving, format="webp", save_all=True, append_images=frames[1:])
    good: list[tuple[str, bytes]] = []
    for number, words in enumerate(SCRIPTS):
        good += [(f"script{number}.png", whole), (f"script{number}.txt", words.encode())]
    sixteen = Image.fromarray(np.full((40, 40), 30000, np.uint16))
    cmyk = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    return [
        *good,
        ("cmyk.jpg", encoded(cmyk, "jpeg")),
        ("cmyk.txt", b"four inks"),
        ("sixteen.png", encoded(sixteen)),
        ("sixteen.txt", b"sixteen bits"),
        ("alpha.webp", encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "webp", lossless=True)),
        ("alpha.txt", b"nothing to see"),
        ("misnamed.jpg", whole),
        ("misnamed.txt", b"a png in truth"),
        ("._hidden.jpg", b"what macOS leaves behind"),
        ("zero.png", b""),
        ("zero.txt", b"no bytes"),
        ("text.png", b"this is no picture"),
        ("text.txt", b"text"),
        ("cutbody.png", whole[: len(whole) // 2]),
        ("cutbody.txt", b"its head is whole"),
        ("moving.webp", moving.getvalue()),
        ("moving.txt", b"it moves"),
        ("long.png", encoded(Image.new("RGB", (20000, 10)))),
        ("long.txt", b"a thread"),
        ("bomb.png", png_bomb()),
        ("bomb.txt", b"boom"),
        ("mute.png", whole),
        ("blank.png", whole),
        ("blank.txt", b"  \n"),
        ("latin.png", whole),
        ("latin.txt", "Käse".encode("latin-1")),
        ("nojson.png", whole),
        ("nojson.txt", b"x"),
        ("nojson.json", b"{"),
        ("twice.png", whole),
        ("twice.png", whole),
        ("twice.txt", b"two pictures"),
        ("script0.png", whole),
        ("script0.txt", b"a key that came before"),
        ("nopicture.txt", b"alone"),
        ("pickle.pkl", pickle.dumps(Bomb())),
        ("pickle.txt", b"a trap"),
        ("trap.png", whole),
        ("trap.pyd", pickle.dumps(Bomb())),
        ("trap.txt", b"a good picture beside a trap"),
    ]


GOOD = {f"script{n}" for n in range(len(SCRIPTS))} | {
    "cmyk", "sixteen", "alpha", "misnamed", "trap"
}  # fmt: skip


@pytest.fixture
def corrupt(tmp_path: Path) -> str:
    write_members(tmp_path / "bad-0.tar", members())
    whole = write_members(
        tmp_path / "bad-1.tar",
        [(f"{n}.{k}", d) for n in range(9) for k, d in
         (("png", encoded(colored(n, (40, 40)))), ("txt", b"fine"))],
    ).read_bytes()  # fmt: skip
    (tmp_path / "bad-1.tar").write_bytes(whole[: len(whole) // 2])
    return f"{tmp_path}/bad-*.tar"


def check(capsys, *arguments: str) -> tuple[int, str, str]:
    code = run_main(lambda: main(["check", *arguments]))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_names_every_fault_in_one_table(corrupt, capsys):
    code, table, _ = check(capsys, corrupt, "--size", "32", "--filters.max_aspect", "3")
    assert code == 0
    for reason, key in {
        "an empty picture": "zero",
        "a picture that can't be read": "text",
        "an animated picture": "moving",
        "a picture of too many pixels": "bomb",
        "a caption that is not UTF-8": "latin",
        "json that can't be read": "nojson",
        "two members of one kind": "twice",
        "a key that came before": "script0",
        "filter: max_aspect 3": "long",
        "no picture": "nopicture",
        "no caption": "mute",
    }.items():
        [line] = [line for line in table.splitlines() if f"  {reason}: " in line]
        assert f"/{key}" in line, line
    assert "2  a picture that can't be read: bad-0/text, bad-0/cutbody" in table
    assert "1  pictures of another format than their name's" in table
    assert "1  pkl members, never opened" in table and "1  pyd members" in table
    assert "1  members without a key" in table
    assert "bad-1: not a whole tar file: it ends within" in table


@pytest.mark.parametrize("mode", ["exact", "resampled"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_on_with_the_rest(corrupt, mode, workers, caplog):
    config = DataConfig(
        shards=corrupt, batch_size=3, mode=mode, size=32, workers=workers, max_broken_share=1.0
    )
    with caplog.at_level(logging.INFO):
        data = open_data(config)
        batches = list(itertools.islice(data.loader_from(0, 0, 1), 20))
    seen = {key.split("/")[1] for batch in batches for key in batch.keys}
    others = {"long", *"01234"}  # 20000x10 is a picture; the cut shard's first ones are whole
    assert GOOD <= seen <= GOOD | others
    assert {c for b in batches for c in b.captions} >= {s.strip() for s in SCRIPTS}
    for batch in batches:
        assert batch.pixels.shape == (len(batch), 3, 32, 32)
        assert torch.isfinite(batch.pixels).all()
    # Its head is whole, so only decoding finds it out; the report names it.
    assert "bad-0/cutbody: " in caplog.text
    if mode == "exact":
        assert "1 left out (an animated picture: bad-0/moving)" in caplog.text
        assert "bad-1: not a whole tar file" in caplog.text


def test_a_sample_that_breaks_late_is_replaced_in_the_same_way_on_every_pass(corrupt):
    config = DataConfig(shards=corrupt, batch_size=3, mode="exact", size=32, max_broken_share=1.0)
    first, second = (
        [b.keys for b in itertools.islice(open_data(config).loader_from(0, 0, 1), 12)]
        for _ in range(2)
    )
    assert first == second
    assert {len(keys) for keys in first} == {1, 3}  # 19 samples: the last step is smaller


def test_too_many_broken_samples_stop_the_run(tmp_path, monkeypatch):
    whole = encoded(gradient(40, 40))
    rows = []
    for number in range(20):
        data = whole[: len(whole) // 2] if number % 4 == 0 else whole
        rows += [(f"{number}.png", data), (f"{number}.txt", b"x")]
    write_members(tmp_path / "a.tar", rows)
    monkeypatch.setattr("train.data.loader._JUDGED_FROM", 20)
    config = DataConfig(shards=f"{tmp_path}/a.tar", batch_size=4, mode="exact", size=32)
    loader = open_data(config).loader_from(0, 0, 1)
    with pytest.raises(UserError, match=r"of \d+ samples can't be used, more than data\.max_brok"):
        list(itertools.islice(loader, 30))
    assert loader.broken > 2


def test_a_set_of_broken_pictures_alone_is_refused_in_one_line(tmp_path):
    whole = encoded(gradient(40, 40))[:-40]
    rows = [(f"{n}.{k}", d) for n in range(8) for k, d in (("png", whole), ("txt", b"x"))]
    write_members(tmp_path / "a.tar", rows)
    config = DataConfig(shards=f"{tmp_path}/a.tar", batch_size=4, mode="exact", size=32)
    with pytest.raises(UserError, match=r"samples of one batch can't be read, the last is a/\d"):
        next(iter(open_data(config).loader_from(0, 0, 1)))


def test_colours_survive_every_mode():
    cmyk = fit_picture(encoded(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "jpeg"), (8, 8))
    assert (cmyk.pixels[:, 4, 4].int() - torch.tensor([254, 0, 0])).abs().max() < 25
    sixteen = Image.fromarray(np.full((40, 40), 30000, np.uint16))
    assert fit_picture(encoded(sixteen), (8, 8)).pixels.unique().tolist() == [30000 >> 8]
    clear = encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)))
    assert fit_picture(clear, (8, 8)).pixels.unique().tolist() == [255]


def test_a_picture_held_sideways_is_upright_in_its_size_and_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(gradient(64, 32), "jpeg", exif=exif, quality=95)
    head = read_head(data, "jpg")
    assert (head.width, head.height, head.expected_name) == (32, 64, True)
    fitted = fit_picture(data, (32, 16))
    assert fitted.original_size == (64, 32)
    assert fitted.pixels[0, 0].float().mean() < 10 < 245 < fitted.pixels[0, -1].float().mean()


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 16), (70, 70)])
def test_a_crop_keeps_the_middle_and_says_where(size):
    fitted = fit_picture(encoded(gradient(64, 32)), size)
    assert fitted.pixels.shape == (3, *size)
    scale = max(size[0] / 32, size[1] / 64)
    left = (round(64 * scale) - size[1]) // 2
    assert fitted.crop[1] == left
    expected = (left + size[1] / 2) / (64 * scale) * 255
    assert abs(float(fitted.pixels[0, 3, size[1] // 2]) - expected) < 6


def test_random_crops_reach_both_edges():
    generator = torch.Generator().manual_seed(0)
    lefts = {
        fit_picture(encoded(gradient(64, 32)), (32, 32), generator).crop[1] for _ in range(300)
    }
    assert min(lefts) == 0 and max(lefts) == 32


# The reader of tar files


def test_members_are_found_where_python_writes_them(tmp_path):
    long = "folder/" * 30 + "key.png"
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / "a.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name, data in (("a.txt", b"abc"), (long if kind else "b.png", b"x" * 700),
                               ("ключ.txt", b"")):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            tar.addfile(tarfile.TarInfo("folder"), None)
        whole = path.read_bytes()
        with open(path, "rb") as file, tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
            found = list(members_of(file))
            assert [(m.name, m.offset, m.size) for m in found] == expected
            for member in found:
                assert member.read() == whole[member.offset : member.offset + member.size]


class Stream(io.RawIOBase):
    """Bytes that can only be read forward."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self.data.readinto(buffer)


def test_a_stream_gives_the_same_index_as_its_file(corrupt):
    for name in ("bad-0.tar", "bad-1.tar"):
        path = Path(corrupt).parent / name
        with open(path, "rb") as file:
            ours = index_of(file)
        theirs = index_of(io.BufferedReader(Stream(path.read_bytes())))  # type: ignore[arg-type]
        assert (ours.keys, ours.problems, ours.remarks) == (
            theirs.keys, theirs.problems, theirs.remarks
        )  # fmt: skip
        assert (ours.offsets == theirs.offsets).all()


def test_a_cut_anywhere_is_told_and_what_came_before_is_kept(tmp_path):
    rows = [(f"{n}.{k}", encoded(colored(n, (40, 40))) if k == "png" else b"x")
            for n in range(3) for k in ("png", "txt")]  # fmt: skip
    data = write_members(tmp_path / "a.tar", rows).read_bytes()
    end = len(data.rstrip(b"\0"))
    whole_before = 0
    for size in (0, 100, 512, 700, 1324, 2048, end - 600, end):
        found = []
        stream = io.BytesIO(data[:size])
        with pytest.raises(DamagedTarError):
            found.extend(e for e in entries_of(stream, lambda _: True) if len(e.members) == 2)
        del found
        kept = [key for key, problem in zip(*_looked(data[:size]), strict=True) if not problem]
        assert len(kept) >= whole_before
        whole_before = len(kept)
    assert whole_before == 3
    with pytest.raises(DamagedTarError, match="it is no tar file"):
        list(members_of(io.BytesIO(b"x" * 3000)))


def _looked(data: bytes) -> tuple[list[str], list[str]]:
    index = index_of(io.BytesIO(data))
    assert index.notes and "not a whole tar file" in index.notes[0]
    return index.keys, index.problems


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", ("a", "png")),
        ("./x/a.b.JPG", ("x/a", "b.jpg")),
        ("a.stage_a.npy", ("a", "stage_a.npy")),
        ("._1.jpg", None),
        ("README", None),
        ("__index__.json", None),
    ],
)
def test_names_split_at_the_first_dot_of_the_file(name, expected):
    assert split_name(name) == expected


def test_an_index_survives_being_kept(corrupt, tmp_path):
    with open(Path(corrupt).parent / "bad-0.tar", "rb") as file:
        index = index_of(file)
    save_index(index, tmp_path / "x.npz")
    again = load_index(tmp_path / "x.npz")
    assert again is not None
    for name, value in vars(index).items():
        other = getattr(again, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name
    (tmp_path / "x.npz").write_bytes(b"broken")
    assert load_index(tmp_path / "x.npz") is None


def test_scores_of_the_json_filter_and_their_lack_does_too(tmp_path, capsys):
    rows = []
    for key, row in {"a": {"s": 1}, "b": {"s": 9.5}, "c": {}, "d": {"s": "high"}}.items():
        rows += [(f"{key}.png", encoded(colored(1, (40, 40)))), (f"{key}.txt", b"x"),
                 (f"{key}.json", json.dumps(row).encode())]  # fmt: skip
    path = write_members(tmp_path / "a.tar", rows)
    code, table, _ = check(capsys, str(path), "--size", "32", "--filters.min_scores", "{s: 5}")
    assert code == 0 and "1 to train on, 3 left out" in table
    assert "3  filter: s below 5 or not there: a/a, a/c, a/d" in table
