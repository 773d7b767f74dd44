"""``python -m cascade.evaluate``, from the command line to the file of results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cascade.checkpoints.files import save_network
from cascade.errors import UserError, run_main
from cascade.evaluate.__main__ import main
from cascade.evaluate.drawn import Drawn, check_weights_kind, draw_pictures, maker_of
from cascade.evaluate.generate import Item, file_of
from cascade.evaluate.prompts import inline_prompts
from cascade.evaluate.protocol import Protocol, load_protocol
from cascade.evaluate.results import read_rows
from cascade.images import open_image, read_png_metadata
from cascade.launchers import Part
from stages.previewer import Previewer, PreviewerConfig

CONTENT = {
    "name": "tiny",
    "prompts": {"inline": ["a 3D render of a red apple", "a flat icon of a blue fish"]},
    "metrics": ["clip_score"],
    "generated_size": 32,
    "size": 32,
    "clip": {"kind": "clip", "name": "demo CLIP"},
    "features": {"kind": "clip", "name": "demo CLIP"},
    "cascade": {"steps_c": 2, "steps_b": 1},
    "unet": {"steps": 2},
}


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.yaml")


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


def run(*words: object) -> int:
    return run_main(lambda: main([str(word) for word in words]))


def test_a_model_is_drawn_measured_and_written_down(
    tmp_path: Path, protocol: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--protocol", protocol, "--model", tiny_model, "--out", out, "--device", "cpu")
    assert run(*words) == 0
    printed = capsys.readouterr().out
    assert "CLIP score, 100 x cosine (demo CLIP)" in printed
    (row,) = read_rows(out / "results.jsonl")
    assert row["num_pictures"] == 2 and row["model"].startswith("tiny ")
    assert row["commit"] and row["machine"] and row["yardstick_weights"]
    (folder,) = (out / "pictures").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png"]
    # The folder alone gives the same figure, and a second line of the same protocol.
    before = (folder / "00000.png").stat().st_mtime_ns
    assert run("--protocol", protocol, "--pictures", folder, "--out", out) == 0
    assert run(*words) == 0
    assert (folder / "00000.png").stat().st_mtime_ns == before  # not made again
    values = [row["value"] for row in read_rows(out / "results.jsonl")]
    assert values == [values[0]] * 3
    capsys.readouterr()
    assert run("table", out / "results.jsonl") == 0
    assert "| CLIP score" in capsys.readouterr().out


def test_a_pictures_seed_is_its_prompts_whatever_else_is_drawn(
    tmp_path: Path, protocol: Path, tiny_model: Path
) -> None:
    one = load_protocol(protocol)
    maker = maker_of(str(tiny_model), one, unet=None, device="cpu", dtype="auto")
    prompts = inline_prompts(["a red apple", "a blue fish", "a green hat"])
    whole = draw_pictures(maker, prompts, one, tmp_path / "a", Part())
    alone = draw_pictures(maker, prompts[2:], one, tmp_path / "b", Part())
    first, second = (drawn.folder / "00002.png" for drawn in (whole, alone))
    assert open_image(first).tobytes() == open_image(second).tobytes()
    assert read_png_metadata(first) == read_png_metadata(second)


def test_processes_share_the_pictures_and_the_first_measures(
    tmp_path: Path,
    protocol: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(out: str, rank: int, count: int) -> int:
        for name, value in {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        words = ("--protocol", protocol, "--model", tiny_model, "--device", "cpu")
        return run(*words, "--out", tmp_path / out)

    def pictures(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / out).rglob("*.png")}

    monkeypatch.setattr("cascade.evaluate.drawn.PATIENCE_S", 0.0)
    assert start("whole", 0, 1) == 0
    assert start("shared", 0, 2) == 2  # the other one does not come
    error = capsys.readouterr().err
    [line] = [one for one in error.splitlines() if one.startswith("error: ")]
    assert "1 of 2 pictures are missing, the first is '00001'" in line
    assert "the same command makes what is missing" in line
    assert list(pictures("shared")) == ["00000.png"]
    assert start("shared", 1, 2) == 0
    assert "process 1 of 2 made its share; process 0 measures" in capsys.readouterr().out
    assert not (tmp_path / "shared/results.jsonl").exists()
    monkeypatch.setattr("cascade.evaluate.generate.PictureMaker.load", None)  # nothing is loaded
    assert start("shared", 0, 3) == 0
    assert pictures("shared") == pictures("whole")
    rows = [read_rows(tmp_path / out / "results.jsonl")[0] for out in ("whole", "shared")]
    assert rows[0]["value"] == rows[1]["value"] and rows[0]["pictures"] == rows[1]["pictures"]


def test_the_first_process_waits_as_long_as_pictures_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tuple(Item(f"folder/{name}", "a hat", 0) for name in "abc")
    drawn = Drawn(tmp_path, "", items)
    (tmp_path / "folder").mkdir()
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) <= 3:
            file_of(items[len(waits) - 1], tmp_path).touch()
        assert len(waits) <= 3

    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr("cascade.evaluate.drawn.time.sleep", sleep)
    monkeypatch.setattr("cascade.evaluate.drawn.time.monotonic", lambda: next(clock))
    drawn.wait(10.0)  # 8 s since the one before, each time
    assert len(waits) == 3


def test_weights_of_the_other_kind_are_refused(tmp_path: Path, protocol: Path) -> None:
    one: Protocol = load_protocol(protocol)
    network = Previewer(PreviewerConfig(channels=(8, 8)))
    save_network(tmp_path / "a.safetensors", network, metadata={"weights": "raw"})
    with pytest.raises(UserError, match="raw weights, but the protocol tiny measures ema"):
        check_weights_kind([tmp_path], one)
    raw = load_protocol(write(tmp_path / "raw.yaml", weights="raw"))
    check_weights_kind([tmp_path / "a.safetensors"], raw)


@pytest.mark.parametrize(
    ("changes", "words", "line"),
    [
        ({}, ("--pictures", "NONE"), "NONE: no such folder of pictures"),
        ({}, (), "one of the arguments --pictures --model is required"),
        ({}, ("--pictures", ".", "--unet", "x"), "--unet is for --model"),
        ({}, ("--pictures", ".", "--clip", "NONE"), "NONE: a CLIP is a folder"),
        ({}, ("--pictures", ".", "--prompt", "x"), "did you mean --prompts"),
        ({}, ("--pictures", ".", "--prompts", "x.txt"), "holds its prompts itself"),
        ({"metrics": ["frechet"]}, ("--pictures", "."), "need reference pictures (--real)"),
        (
            {"features": {"kind": "inception", "name": "Inception"}, "metrics": ["frechet"]},
            ("--pictures", "."),
            "takes its features from Inception: --features",
        ),
        (
            {"features": {"kind": "inception", "name": "Inception"}, "metrics": ["frechet"]},
            ("--pictures", ".", "--features", "NONE.pth"),
            "NONE.pth: no such file of weights",
        ),
        (
            {"metrics": ["lpips"], "perceptual": "lpips_vgg"},
            ("--pictures", "."),
            "measures lpips_vgg: give --lpips",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    words: tuple[str, ...],
    line: str,
) -> None:
    path = write(tmp_path / "p.yaml", **changes)
    code = run("--protocol", path, *words, "--out", tmp_path / "out")
    error = capsys.readouterr().err
    assert code == 2 and line in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_size_is_refused(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "p.yaml", generated_size=60, size=60)
    assert run("--protocol", path, "--model", tiny_model, "--out", tmp_path / "out") == 2
    assert "makes multiples of" in capsys.readouterr().err


def test_tables_of_unlike_protocols_are_refused(
    tmp_path: Path, protocol: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.yaml", cascade={"steps_c": 3, "steps_b": 1})
    files = []
    for path in (protocol, other):
        out = tmp_path / path.stem
        assert run("--protocol", path, "--model", tiny_model, "--out", out) == 0
        files.append(out / "results.jsonl")
    capsys.readouterr()
    assert run("table", *files) == 2
    error = capsys.readouterr().err
    assert "cascade.steps_c is 2 and 3" in error and error.count("\n") == 1
    assert run("table", files[0], files[0]) == 0
    assert json.loads(files[0].read_text())["protocol"]["cascade"]["steps_c"] == 2


def test_what_the_protocol_leaves_to_the_models_must_be_the_same_or_said_to_be_their_own(
    tmp_path: Path, protocol: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    words = ("--protocol", protocol, "--model", model, "--out", tmp_path / "out")
    assert run(*words) == 0
    spec = json.loads((model / "model.json").read_text())
    spec["stage_c"]["guidance"] = 1.5
    (model / "model.json").write_text(json.dumps(spec))
    assert run(*words) == 0
    results = tmp_path / "out" / "results.jsonl"
    first, second = read_rows(results)
    assert first["pictures"] != second["pictures"], "they are drawn again"
    assert first["protocol_hash"] == second["protocol_hash"]
    assert second["sampling"]["cascade"]["guidance_c"] == 1.5
    capsys.readouterr()
    assert run("table", results) == 2
    error = capsys.readouterr().err
    assert "cascade.guidance_c is" in error and "say sampling: own" in error
    own = write(tmp_path / "own.yaml", sampling="own")
    for change in (4.0, 1.5):
        spec["stage_c"]["guidance"] = change
        (model / "model.json").write_text(json.dumps(spec))
        assert run("--protocol", own, "--model", model, "--out", tmp_path / "own") == 0
    assert run("table", tmp_path / "own" / "results.jsonl") == 0


def test_a_u_nets_sampling_settings_are_in_what_is_drawn(tmp_path: Path) -> None:
    one = load_protocol(write(tmp_path / "open.yaml", unet={}, generated_size=64))
    model = tmp_path / "koala"
    shutil.copytree("weights/demo-koala", model)
    before = maker_of(str(model), one, unet=None, device="cpu", dtype="auto").settings()
    spec = json.loads((model / "pipeline.json").read_text())
    spec["sampling"]["steps"] += 1
    (model / "pipeline.json").write_text(json.dumps(spec))
    maker = maker_of(str(model), one, unet=None, device="cpu", dtype="auto")
    assert maker.settings() != before
    assert maker.sampling()["unet"]["steps"] == spec["sampling"]["steps"]


def test_a_u_nets_folder_says_whether_its_weights_are_averaged(tmp_path: Path) -> None:
    one = load_protocol(write(tmp_path / "ema.yaml"))
    network = Previewer(PreviewerConfig(channels=(8, 8)))
    (tmp_path / "unet").mkdir()
    save_network(tmp_path / "unet" / "a.safetensors", network, metadata={"weights": "raw"})
    with pytest.raises(UserError, match="raw weights"):
        check_weights_kind([tmp_path], one)
