from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from cascade.errors import UserError
from cascade.images import save_png
from cascade.pipelines.outputs import Outputs
from cascade.pipelines.plan import Request

TWO = [Request("a hat", 1), Request("Ein grüner Hut!", 2)]


def test_names_say_number_prompt_and_seed(tmp_path: Path) -> None:
    outputs = Outputs.prepare(tmp_path / "new" / "folder", TWO, grid=True)
    names = [path.name for path in outputs.paths if path]
    assert names == ["0001-a-hat-seed1.png", "0002-ein-grüner-hut-seed2.png"]
    assert outputs.grid is not None and outputs.grid.name == "0003-grid.png"
    assert (tmp_path / "new" / "folder").is_dir()


def test_numbers_go_on_where_the_folder_ends(tmp_path: Path) -> None:
    for name in ("0007-x-seed1.png", "0008-grid.png", "holiday.png", "0009-notes.txt"):
        (tmp_path / name).touch()
    outputs = Outputs.prepare(tmp_path, TWO, grid=False)
    assert [path.name[:4] for path in outputs.paths if path] == ["0009", "0010"]


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a/b", "." * 9, "字" * 200, "\n"])
def test_no_prompt_leads_out_of_the_folder_or_to_a_name_too_long(
    tmp_path: Path, prompt: str
) -> None:
    [path] = Outputs.prepare(tmp_path, [Request(prompt, 1)], grid=False).paths
    assert path is not None and path.parent == tmp_path
    path.touch()
    assert path.resolve().parent == tmp_path.resolve()


def test_a_named_file_is_taken_as_it_is(tmp_path: Path) -> None:
    outputs = Outputs.prepare(tmp_path / "x.png", TWO[:1], grid=False)
    assert outputs == Outputs((tmp_path / "x.png",), None)


def test_a_named_file_takes_one_picture_or_the_grid(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one file for 2 pictures"):
        Outputs.prepare(tmp_path / "x.png", TWO, grid=False)
    outputs = Outputs.prepare(tmp_path / "x.png", TWO, grid=True)
    assert outputs == Outputs((None, None), tmp_path / "x.png")


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"written as PNG; name .*x\.png"):
        Outputs.prepare(tmp_path / "x.JPG", TWO[:1], grid=False)


@pytest.mark.parametrize("out", ["file", "file/below", "file/below/x.png", "/proc/nothing/here"])
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        Outputs.prepare(tmp_path / out, TWO[:1], grid=False)
    assert "\n" not in str(caught.value)


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    with pytest.raises(UserError, match="can't be written to: permission denied"):
        Outputs.prepare(tmp_path, TWO, grid=False)


@pytest.mark.parametrize("name", ["link", "link.png/x.png"])
def test_a_link_to_nowhere_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    for link in ("link", "link.png"):
        (tmp_path / link).symlink_to(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match="can't be written to: something else of that name"):
        Outputs.prepare(tmp_path / name, TWO[:1], grid=False)


def test_a_name_as_long_as_the_file_system_takes_is_written(tmp_path: Path) -> None:
    [path] = Outputs.prepare(tmp_path / f"{'x' * 251}.png", TWO[:1], grid=False).paths
    assert path is not None
    save_png(Image.new("RGB", (1, 1)), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_longer_name_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises((UserError, OSError)) as caught:
        Outputs.prepare(tmp_path / f"{'x' * 252}.png", TWO[:1], grid=False)
    assert "too long" in str(caught.value)


def test_a_prompt_of_a_megabyte_costs_no_time(tmp_path: Path) -> None:
    started_s = time.perf_counter()
    Outputs.prepare(tmp_path, [Request("word " * 200_000, 1)], grid=False)
    assert time.perf_counter() - started_s < 1
