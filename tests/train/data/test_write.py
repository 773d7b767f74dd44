from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade.errors import UserError
from train.data.__main__ import main
from train.data.shards import Sample, ShardReader
from train.data.write import BACKGROUNDS, WriteOptions, square, write_shards


def rows_of(source: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]


def put_rows(source: Path, rows: list[object]) -> None:
    (source / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def written(out: Path, **options: object) -> list[Sample]:
    write_shards(WriteOptions(out=out, name="x", **options))
    return list(ShardReader(f"{out}/*.tar"))


def test_a_folder_becomes_shards_with_all_captions(source, tmp_path):
    report = write_shards(WriteOptions(source=source, out=tmp_path / "out", shard_size=5))
    assert (report.written, report.shards, report.broken) == (12, 3, ())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"source-{number:06d}.{kind}" for number in range(3) for kind in ("index.npz", "tar")
    ]
    samples = list(ShardReader(f"{tmp_path}/out/source-{{000000..000002}}.tar"))
    assert [sample.key for sample in samples] == [f"{number:02d}" for number in range(12)]
    assert samples[1].captions == ("a green fish", "one fish, green")
    assert samples[0].pixels.shape == (3, 32, 32)
    assert samples[0].pixels[:, 5, 5].tolist() == [255, 0, 0]
    assert samples[0].metadata["original_width"] == 32


def test_a_zip_file_gives_the_same_shards_as_its_folder(source, tmp_path):
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for path in source.iterdir():
            archive.write(path, path.name)
    main(["write", "--from", f"{tmp_path}/source.zip", "--out", f"{tmp_path}/a"])
    main(["write", "--from", str(source), "--out", f"{tmp_path}/b"])
    paths = [tmp_path / name / "source-000000.tar" for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_only_rows_of_the_split_are_taken(source, tmp_path):
    rows = rows_of(source)
    rows[3]["split"] = rows[7]["split"] = "test"
    put_rows(source, rows)
    samples = written(tmp_path / "out", source=source, split="test")
    assert [sample.key for sample in samples] == ["03", "07"]
    with pytest.raises(UserError, match="no row of split 'tset' in captions"):
        written(tmp_path / "other", source=source, split="tset")


@pytest.fixture
def with_alpha(source: Path) -> Path:
    """The source with half-transparent pictures: the left half is clear, with red beneath."""
    for path in source.glob("*.png"):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[..., 0] = 255
        pixels[:, 16:, 3] = 255
        Image.fromarray(pixels, "RGBA").save(path)
    return source


def test_alpha_shows_white_and_no_colour_bleeds_from_beneath(with_alpha, tmp_path):
    samples = written(tmp_path / "out", source=with_alpha, size=16)
    left = samples[0].pixels[:, :, 0].unique().tolist()
    assert left == [255]
    assert samples[0].pixels[:, 8, 15].tolist() == [255, 0, 0]


def test_background_variants_name_their_colour_and_depend_on_the_key_alone(with_alpha, tmp_path):
    options = {"source": with_alpha, "background_variants": 0.5, "seed": 1}
    samples = written(tmp_path / "a", **options)
    variants = {sample.key: sample for sample in samples if sample.key.endswith("_bg")}
    assert 1 <= len(variants) <= 11
    for sample in variants.values():
        words = sample.metadata["background"]
        assert sample.pixels[:, 3, 3].tolist() == list(BACKGROUNDS[words])
        assert all(caption.endswith(f" on a {words} background") for caption in sample.captions)
    put_rows(with_alpha, rows_of(with_alpha)[::-1][:9])
    fewer = {sample.key: sample for sample in written(tmp_path / "b", **options)}
    for key, sample in fewer.items():
        if key.endswith("_bg"):
            assert sample.metadata == variants[key].metadata
    assert {key for key in variants if key[:2] >= "03"} == {k for k in fewer if k.endswith("_bg")}


def test_pictures_without_alpha_get_no_variant(source, tmp_path):
    assert len(written(tmp_path / "out", source=source, background_variants=1.0)) == 12


def test_the_centre_square_is_cut_and_recorded(source, tmp_path):
    wide = Image.new("RGB", (64, 32), "red")
    wide.paste("blue", (16, 0, 48, 32))
    picture, box = square(wide, 8)
    assert (picture.size, box) == ((8, 8), (16, 0, 48, 32))
    assert np.asarray(picture)[4, 4].tolist() == [0, 0, 255]
    wide.save(source / "00.png")
    [sample, *_] = written(tmp_path / "out", source=source, size=8)
    assert sample.metadata["crop"] == [16, 0, 48, 32]
    assert sample.metadata["original_width"] == 64


def test_a_photo_that_was_held_sideways_is_turned_upright(source, tmp_path):
    picture = Image.new("RGB", (32, 16), "white")
    picture.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show: the left half becomes the top
    picture.save(source / "00.jpg", exif=exif)
    put_rows(source, [{"file": "00.jpg", "caption": "a page"}])
    [sample] = written(tmp_path / "out", source=source)
    assert sample.pixels.shape == (3, 32, 16)
    assert sample.pixels[:, :12].max() < 50 < 200 < sample.pixels[:, 20:].min()


def test_pictures_of_one_name_in_two_folders_stay_two(source, tmp_path):
    for folder in ("cats", "dogs"):
        (source / folder).mkdir()
        Image.new("RGB", (16, 16)).save(source / folder / "1.v2.png")
    rows = [{"file": f"{name}/1.v2.png", "caption": name} for name in ("cats", "dogs", "cats")]
    put_rows(source, rows)
    report = write_shards(WriteOptions(source=source, out=tmp_path / "out"))
    assert report.broken == ("cats/1.v2.png: listed twice",)
    samples = list(ShardReader(f"{tmp_path}/out/*.tar"))
    assert [sample.key for sample in samples] == ["1_v2", "dogs_1_v2"]


def test_broken_pictures_and_rows_are_skipped_and_named(source, tmp_path, caplog):
    rows = rows_of(source)
    data = (source / "00.png").read_bytes()
    (source / "00.png").write_bytes(data[: len(data) // 2])
    (source / "01.png").write_text("no picture")
    (source / "02.png").unlink()
    rows[3]["captions"] = "one text is no list"
    rows[4]["captions"] = [" "]
    put_rows(source, rows)
    report = write_shards(WriteOptions(source=source, out=tmp_path / "out"))
    assert report.written == 7
    assert [line.split(":")[0] for line in report.broken] == [f"0{n}.png" for n in range(5)]
    assert "skipped 01.png" in caplog.text


def test_a_member_that_a_zip_holds_broken_is_skipped(source, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(source / "05.png")
    path = tmp_path / "source.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for member in source.iterdir():
            archive.write(member, member.name)
        offset = archive.getinfo("05.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 1000] ^= 255
    path.write_bytes(data)
    report = write_shards(WriteOptions(source=path, out=tmp_path / "out"))
    assert report.written == 11
    assert "05.png" in report.broken[0]


def test_shards_are_replaced_only_with_force_and_only_the_set_s_own(source, tmp_path):
    write_shards(WriteOptions(source=source, out=tmp_path / "out", name="set", shard_size=4))
    write_shards(WriteOptions(source=source, out=tmp_path / "out", name="set-big"))
    with pytest.raises(UserError, match=r"set-000000\.tar: is there already; .* --force"):
        write_shards(WriteOptions(source=source, out=tmp_path / "out", name="set"))
    write_shards(WriteOptions(source=source, out=tmp_path / "out", name="set", force=True))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name for name in names if name.endswith(".tar")] == [
        "set-000000.tar", "set-big-000000.tar"
    ]  # fmt: skip
    assert len(names) == 4  # each with its index


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 4}, "--size 4"),
        ({"background_variants": 2.0}, "a share in"),
        ({"shard_size": 0}, "--shard-size 0"),
        ({"source": Path("/nowhere")}, "/nowhere: no such folder"),
    ],
)
def test_bad_options_are_refused(arguments, message, source, tmp_path):
    with pytest.raises(UserError, match=message):
        write_shards(WriteOptions(**{"source": source, "out": tmp_path / "out", **arguments}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file": "00.png",', "captions.jsonl line 1"),
        ("[1, 2]", "captions.jsonl line 1: an object with a 'file' is needed"),
        ('{"name": "00.png"}', "line 1: an object with a 'file'"),
        ('{"file": "none.png", "caption": "x"}', "not one picture could be read"),
    ],
)
def test_bad_captions_are_refused_with_their_line(content, message, source, tmp_path):
    (source / "captions.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        write_shards(WriteOptions(source=source, out=tmp_path / "out"))


def test_a_folder_without_captions_and_a_broken_zip_are_refused(source, tmp_path):
    (source / "captions.jsonl").unlink()
    with pytest.raises(UserError, match=r"no captions\.jsonl in it"):
        write_shards(WriteOptions(source=source, out=tmp_path / "out"))
    (tmp_path / "x.zip").write_bytes(io.BytesIO(b"PK nothing").getvalue())
    with pytest.raises(UserError, match="not a whole zip file"):
        write_shards(WriteOptions(source=tmp_path / "x.zip", out=tmp_path / "out"))


@pytest.mark.parametrize("content", ['{"file": "no.png", "caption": "a"}', None])
def test_a_write_that_fails_leaves_the_shards_that_were_there(content, source, tmp_path):
    out = tmp_path / "out"
    write_shards(WriteOptions(source=source, out=out, name="set"))
    before = {path: path.read_bytes() for path in out.iterdir()}
    listed = source / "captions.jsonl"
    listed.write_text(content if content is not None else listed.read_text() + "\n{broken")
    with pytest.raises(UserError):
        write_shards(WriteOptions(source=source, out=out, name="set", force=True))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_coloured_copy_takes_no_other_picture_s_key(with_alpha, tmp_path):
    rows = rows_of(with_alpha)
    first = rows[0]["file"]
    twin = f"{Path(first).stem}_bg.png"
    (with_alpha / twin).write_bytes((with_alpha / first).read_bytes())
    for order in ([*rows, {**rows[0], "file": twin}], [{**rows[0], "file": twin}, *rows]):
        put_rows(with_alpha, order)
        out = tmp_path / f"out{order[0]['file']}"
        samples = written(out, source=with_alpha, background_variants=1.0)
        assert len(samples) == len({one.key for one in samples}) == 2 * len(order)


def test_a_list_with_a_byte_order_mark_and_other_line_separators_is_read(source, tmp_path):
    rows = rows_of(source)
    rows[0]["captions"] = ["one\u2028wording"]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (source / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert len(written(tmp_path / "out", source=source)) == len(rows)
