"""Shards from a folder of texts, from jsonl and from parquet equal those of captions.jsonl."""

from __future__ import annotations

import json

import pytest

from cascade.errors import UserError
from train.data.__main__ import main
from train.data.shards import ShardReader


def written(source, out) -> dict[str, tuple[tuple[str, ...], list[int]]]:
    assert main(["write", "--from", str(source), "--out", str(out), "--name", "x"]) == 0
    return {
        sample.key: (sample.captions, sample.pixels[:, 3, 3].tolist())
        for sample in ShardReader(f"{out}/*.tar")
    }


@pytest.fixture
def expected(source, tmp_path):
    return written(source, tmp_path / "expected")


def rows_of(source) -> list[dict]:
    return [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]


def test_a_folder_of_pictures_with_texts(source, expected, tmp_path):
    for row in rows_of(source):
        text = "\n".join(row["captions"])
        (source / row["file"]).with_suffix(".txt").write_text(f"{text}\n\n")
    (source / "captions.jsonl").unlink()
    (source / "._00.png").write_bytes(b"what macOS leaves behind")
    (source / "._00.txt").write_bytes(b"\xff")
    assert written(source, tmp_path / "out") == expected


def test_a_jsonl_file_anywhere_beside_its_pictures(source, expected, tmp_path):
    (source / "captions.jsonl").rename(source / "other.jsonl")
    assert written(source / "other.jsonl", tmp_path / "out") == expected


def test_the_names_that_hugging_face_gives(source, tmp_path):
    rows = [{"file_name": row["file"], "text": row["captions"][0]} for row in rows_of(source)]
    path = source / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = written(path, tmp_path / "out")
    assert found["03"][0] == (rows[3]["text"],)
    assert len(found) == 12


def test_a_parquet_file_of_names_of_bytes_and_of_hugging_face_s_structs(source, expected, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="reads parquet files; an extra")
    from pyarrow import parquet

    rows = rows_of(source)
    captions = [row["captions"] for row in rows]
    names = [row["file"] for row in rows]
    data = [(source / name).read_bytes() for name in names]
    parquet.write_table(arrow.table({"file": names, "captions": captions}), source / "a.parquet")
    assert written(source / "a.parquet", tmp_path / "a") == expected
    structs = [{"bytes": d, "path": n} for d, n in zip(data, names, strict=True)]
    table = arrow.table({"image": structs, "captions": captions})
    parquet.write_table(table, tmp_path / "b.parquet")
    assert written(tmp_path / "b.parquet", tmp_path / "b") == expected
    table = arrow.table({"image": data, "caption": [c[0] for c in captions]})
    parquet.write_table(table, tmp_path / "c.parquet")
    found = written(tmp_path / "c.parquet", tmp_path / "c")
    assert sorted(found) == [f"{n:09d}" for n in range(12)]
    assert found["000000005"][0] == (captions[5][0],)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:200])
    with pytest.raises(UserError, match=r"d\.parquet: not a whole parquet file"):
        written(tmp_path / "d.parquet", tmp_path / "d")


def test_what_is_no_source_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in {
        "none": "no such folder or file; check --from",
        "empty": r"no captions\.jsonl in it, and no picture with a \.txt",
    }.items():
        with pytest.raises(UserError, match=message):
            written(tmp_path / name, tmp_path / "out")
