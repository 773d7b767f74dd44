"""What check prints, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cascade.errors import UserError, run_main
from train.data.__main__ import main
from train.data.config import DataConfig, FilterConfig
from train.data.open import open_data

from .conftest import colored, encoded, write_members, write_set


def check(capsys, *arguments: object) -> tuple[int, str, str]:
    code = run_main(lambda: main(["check", *map(str, arguments)]))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_table_says_what_a_run_would_get(several_shapes, capsys):
    words = ["--size", 32, "--buckets.step", 8, "--samples", 0, "--filters.min_size", 24]
    code, table, error = check(capsys, several_shapes, *words, "--batch_size", 4, "--ranks", 2)
    assert (code, error) == (0, "")
    lines = {" ".join(line.split()) for line in table.splitlines()}
    assert lines >= {
        "shards 5",
        "samples 51 to train on, 10 left out",
        "heights 24 / 32 / 48 px (least / middle / most)",
        "captions 102, 2.0 a sample; 8 / 12 / 16 characters",
        "10 filter: min_size 24: 00000/000005, 00000/000011, 00001/000017...",
        "21 32x32 (41.2 %)",
        "10 24x48 (19.6 %)",
        "10 pictures are smaller than their shape and are enlarged",
    }
    assert "7 steps an epoch; 11 samples fill no step of their shape" in table


def test_a_sample_of_every_shard_is_a_sample_of_every_shard(several_shapes, capsys):
    _, table, _ = check(capsys, several_shapes, "--samples", 3)
    assert "5, the first 3 samples of each" in table
    assert "only the first 3 samples of each shard were read" in table
    assert "13 to train on, 0 left out" in table  # one shard holds a single picture


def test_many_readers_on_few_shards_are_fine_and_said_to_be(several_shapes, capsys):
    words = ["--ranks", 2, "--workers", 8, "--batch_size", 4, "--size", 32, "--samples", 0]
    code, table, _ = check(capsys, several_shapes, *words)
    assert code == 0
    assert "16 readers on 5 shards: samples are dealt out, not shards" in table


def test_what_could_not_work_is_one_line_and_exit_2(several_shapes, tmp_path, capsys):
    # StableCascade#25: captions without pictures, and the bar stays at zero for ever.
    mute = write_members(tmp_path / "mute.tar", [(f"{n}.txt", b"x") for n in range(5)])
    whole = Path(several_shapes.replace("*", "00000")).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:100])
    for words, message in (
        ([mute], "nothing to train on: 5 samples in 1 shards, all left out (5 no picture)"),
        ([tmp_path / "cut.tar"], "the shards are empty; cut: not a whole tar file"),
        ([several_shapes, "--filters.min_size", 99, "--samples", 0], "61 filter: min_size 99"),
        ([several_shapes, "--batch_size", 62, "--samples", 0], "61 samples, fewer than one step"),
        ([f"{several_shapes}::http://127.0.0.1:9/a.tar"], "127.0.0.1:9"),
        (["/none/*.tar"], "/none/*.tar: no shard matches"),
        ([several_shapes, "--filtres.min_size", 1], "did you mean 'filters'"),
        ([], "name the shards, or a --config"),
        (["--config", "/none.yaml"], "/none.yaml: no such configuration file"),
    ):
        code, _, error = check(capsys, *words)
        assert code == 2, words
        [line] = error.splitlines()
        assert message in line


def test_a_run_s_own_configuration_is_what_is_checked(several_shapes, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    data = {"shards": several_shapes, "batch_size": 40, "mode": "exact", "size": 32}
    path.write_text(yaml.safe_dump({"run": {"devices": 2}, "data": data}))
    code, _, error = check(capsys, "--config", path, "--samples", 0)
    assert code == 2 and "fewer than one step of 40 on 2 device(s)" in error
    assert check(capsys, "--config", path, "--samples", 0, "--batch_size", 20)[0] == 0
    data = {"shards": several_shapes, "batch_size": 4}
    path.write_text(yaml.safe_dump({"data": data}))
    code, _, error = check(capsys, "--config", path)
    assert code == 2 and "pictures of 6 sizes, but data.mode is memory" in error


def test_a_cache_of_another_size_than_the_run_s_is_refused(
    several_shapes, tiny_model, tmp_path, capsys
):
    cache = tmp_path / "cache"
    words = ["precompute", "--shards", several_shapes, "--shards-out", str(cache), "--size", "32"]
    words += ["--stage-a", str(tiny_model / "stage_a.safetensors"), "--buckets.step", "8"]
    assert main(words) == 0
    shards = str(cache / "*.tar")
    data = {"shards": shards, "batch_size": 4, "mode": "exact", "size": 32, "buckets": {"step": 8}}
    path = tmp_path / "run.yaml"
    for changes, message in (
        ({}, ""),
        ({"size": 40}, "size is 40 here and 32 there"),
        ({"buckets": None}, "buckets is None here and"),
        ({"crop": "random"}, "crop is random here and center there"),
    ):
        path.write_text(yaml.safe_dump({"data": {**data, **changes}}))
        code, _, error = check(capsys, "--config", path)
        assert (code, len(error.splitlines())) == ((2, 1) if message else (0, 0)), changes
        assert message in error
    assert "of size 32" in check(capsys, shards)[1]  # nobody said a size: the cache's own


def test_a_run_without_a_size_is_refused_as_the_run_would_be(several_shapes, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    data = {"shards": several_shapes, "batch_size": 4, "mode": "exact"}
    path.write_text(yaml.safe_dump({"data": data}))
    code, _, error = check(capsys, "--config", path)
    assert code == 2 and "size" in error


def test_the_demonstration_s_way_passes(tmp_path, capsys):
    shards = write_set(tmp_path, [6, 6], sizes=[(32, 32)])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {"shards": shards, "batch_size": 4, "folder": "x"}}))
    assert check(capsys, "--config", path)[0] == 0


@pytest.mark.parametrize("words", [["--help"], ["check", "--help"], ["write", "--help"],
                                   ["precompute", "--help"]])  # fmt: skip
def test_help_says_what_each_tool_does(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_a_picture_that_only_decoding_shows_to_be_broken_is_found(tmp_path, capsys):
    whole = encoded(colored(3, (60, 60)))
    rows = [("a.png", whole), ("a.txt", b"x"), ("b.png", whole[:-30]), ("b.txt", b"x")]
    path = write_members(tmp_path / "a.tar", rows)
    code, table, _ = check(capsys, path, "--size", 32)
    assert code == 0 and "1  a picture that can't be read: a/b" in table


@pytest.mark.parametrize("run", ["{devices: auto}", "[1]", "{devices: true}"])
def test_a_run_section_that_is_none_is_one_line(run, several_shapes, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(f"run: {run}\ndata: {{shards: '{several_shapes}', batch_size: 1}}\n")
    code, _, error = check(capsys, "--config", path)
    assert code == 2 and "devices, a whole number, is needed" in error
    assert error.count("\n") == 1


def test_a_shard_that_was_cut_off_is_refused_for_a_set_in_memory_alone(tmp_path, capsys):
    rows = [(f"{n}.{kind}", encoded(colored(3, (60, 60))) if kind == "png" else b"x")
            for n in range(4) for kind in ("png", "txt")]  # fmt: skip
    path = write_members(tmp_path / "a.tar", rows)
    path.write_bytes(path.read_bytes()[:5820])
    code, table, _ = check(capsys, path)
    assert code == 0 and "damaged shards (streams leave out their ends" in table
    (tmp_path / "run.yaml").write_text(f"data: {{shards: {path}, batch_size: 1}}\n")
    code, _, line = check(capsys, "--config", tmp_path / "run.yaml")
    assert code == 2 and "not a whole tar file" in line and "use data.mode exact" in line


def many(folder: Path, rows: list[tuple[str, str]], name: str = "a") -> Path:
    """A shard of pictures: sides in pixels, and captions (none: no member)."""
    members: list[tuple[str, bytes]] = []
    for number, (side, caption) in enumerate(rows):
        picture = encoded(colored(number, (int(side), int(side))))
        members += [(f"{name}{number:03d}.png", picture)]
        members += [(f"{name}{number:03d}.txt", caption.encode())] if caption else []
    folder.mkdir(exist_ok=True)
    return write_members(folder / f"{name}.tar", members)


def test_what_a_sample_can_t_tell_is_a_warning_and_all_tells_it(tmp_path, capsys):
    """Small pictures come first: a run would train on those behind them."""
    small, large = [("16", "x")] * 3, [("40", "x")] * 3
    path = many(tmp_path, small + large)
    words = [path, "--size", 32, "--filters.min_size", 32, "--batch_size", 2]
    code, table, error = check(capsys, *words, "--samples", 3)
    assert (code, error) == (0, "")
    assert "warning: nothing of this sample is left (3 filter: min_size 32)" in table
    assert "--all reads every one" in table
    code, table, _ = check(capsys, *words, "--all")
    assert code == 0 and "warning" not in table and "3 to train on, 3 left out" in table
    # Left of the sample: 1; of all: 3. The sample can't refuse a step of 3, nor promise one of 4.
    words[-1] = 3
    code, table, _ = check(capsys, *words, "--samples", 4)
    assert code == 0 and "warning: 1 samples of those read are left, fewer than one step" in table
    assert check(capsys, *words, "--all")[0] == 0
    words[-1] = 4
    assert check(capsys, *words, "--samples", 4)[0] == 0
    code, _, error = check(capsys, *words, "--all")
    assert code == 2 and "3 samples, fewer than one step of 4" in error
    code, _, error = check(capsys, *words, "--all", "--samples", 4)
    assert code == 2 and "--samples: not allowed with argument --all" in error


def test_captions_missing_beyond_the_sample_are_found_by_all(tmp_path, capsys):
    path = many(tmp_path, [("32", "x")] * 20 + [("32", "")] * 80)
    words = [path, "--size", 32]
    code, table, _ = check(capsys, *words, "--samples", 20)
    assert code == 0 and "only the first 20 samples of each shard were read" in table
    code, _, error = check(capsys, *words, "--all")
    assert code == 2 and "80 of 100 samples can't be used (80: no caption)" in error
    code, table, _ = check(capsys, *words, "--all", "--max_broken_share", 0.9)
    assert code == 0 and "warning" not in table


def test_a_sample_of_broken_pictures_is_a_warning(tmp_path, capsys):
    path = many(tmp_path, [("32", "")] * 100 + [("32", "x")] * 2000)
    code, table, _ = check(capsys, path, "--size", 32, "--samples", 120)
    assert code == 0 and "warning: a run may stop" in table
    assert "100 of 120 samples can't be used" in table


def run_begins(shards: str, **values: object) -> bool:
    config = DataConfig(shards=shards, batch_size=2, mode="resampled", size=32, **values)
    try:
        next(iter(open_data(config).loader_from(0, 0, 1)))
    except UserError:
        return False
    return True


@pytest.mark.parametrize(("lost", "begins"), [(0, False), (1, True), (2, False)])
def test_a_resampled_run_is_refused_for_the_shards_that_it_begins_with(
    lost, begins, tmp_path, capsys
):
    """It looks at the first and the middle shard; of the others some may be gone."""
    paths = [many(tmp_path, [("40", "x")] * 4, name) for name in "abcd"]
    paths[lost].unlink()
    paths[lost].mkdir()
    shards = "::".join(map(str, paths))
    code, table, error = check(
        capsys, shards, "--size", 32, "--mode", "resampled", "--batch_size", 2
    )
    assert (code == 0) is begins is run_begins(shards)
    assert f"{paths[lost]}: " in (table if begins else error)
    if begins:
        assert "warning: left out by resampled mode" in table
        # Exact mode indexes every shard.
        assert check(capsys, shards, "--size", 32, "--mode", "exact")[0] == 2


def test_a_resampled_run_of_which_the_first_shards_hold_nothing_is_refused(tmp_path, capsys):
    paths = [many(tmp_path, [(side, "x")] * 4, name) for name, side in
             zip("abcd", ("16", "40", "16", "40"), strict=True)]  # fmt: skip
    shards, least = "::".join(map(str, paths)), FilterConfig(min_size=32)
    words = [shards, "--size", 32, "--filters.min_size", 32, "--mode", "resampled"]
    code, _, error = check(capsys, *words, "--all")
    assert code == 2 and "nothing is left of shard 1 and 3" in error
    assert not run_begins(shards, filters=least)
    other = "::".join(map(str, [paths[1], paths[0], paths[2], paths[3]]))
    assert check(capsys, other, *words[1:], "--all")[0] == 0
    assert run_begins(other, filters=least)


def test_readers_that_outnumber_shards_draw_from_all_of_them(several_shapes, capsys):
    words = ["--mode", "resampled", "--ranks", 4, "--workers", 4, "--size", 32, "--all"]
    code, table, _ = check(capsys, several_shapes, *words)
    assert code == 0 and "16 readers on 5 shards: each draws from all of them" in table
