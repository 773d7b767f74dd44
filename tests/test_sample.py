from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import sample
from cascade.errors import run_main
from cascade.images import open_image, read_png_metadata
from cascade.pipelines.cascade import CascadePipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Make:
    return Make(tiny_model, tmp_path / "out", capsys)


class Make:
    """Runs sample.py's main with the tiny model."""

    def __init__(self, model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model = model
        self.out = out
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        argv = ["--model", str(self.model), "--device", "cpu", "--out", str(self.out), *arguments]
        code = run_main(lambda: sample.main(argv))
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err

    def files(self) -> list[Path]:
        return sorted(self.out.iterdir()) if self.out.is_dir() else []


def test_a_prompt_becomes_a_file_and_the_screen_says_where(make: Make) -> None:
    code, out, err = make("--prompt", "a red apple", "--seed", "7")
    assert (code, err) == (0, "")
    [path] = make.files()
    assert f"{path}  seed 7  (text " in out
    for stage in ("Stage C", "Stage B", "Stage A"):
        assert re.search(rf"{stage} \d+\.\d\d s", out)
    assert open_image(path).size == (32, 32)


def test_the_same_command_twice_gives_the_same_bytes_in_two_files(make: Make) -> None:
    for _ in range(2):
        assert make("--prompt", "a flat icon of a blue fish", "--seed", "7")[0] == 0
    first, second = make.files()
    assert first.name.startswith("0001-") and second.name.startswith("0002-")
    assert first.read_bytes() == second.read_bytes()


def test_many_pictures_have_the_bytes_of_each_seed_alone(make: Make) -> None:
    make("--prompt", "a hat", "--seed", "7", "--num-images", "3")
    together = make.files()
    for seed, path in zip((7, 8, 9), together, strict=True):
        make("--prompt", "a hat", "--seed", str(seed))
        assert make.files()[-1].read_bytes() == path.read_bytes()


def test_prompts_come_from_options_and_from_a_file(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two of them\na blue fish\n\n  a green hat  \n", encoding="utf-8")
    code, _, _ = make("--prompt", "a red apple", "--prompts-file", str(file), "--seed", "1")
    assert code == 0
    prompts = [read_png_metadata(path)["prompt"] for path in make.files()]
    assert prompts == ["a red apple", "a blue fish", "a green hat"]


def test_a_prompts_file_of_another_system_is_read_the_same(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff# made elsewhere\r\na blue\u2028fish\r\na hat\r\n".encode())
    assert make("--prompts-file", str(file), "--seed", "1")[0] == 0
    prompts = [read_png_metadata(path)["prompt"] for path in make.files()]
    assert prompts == ["a blue\u2028fish", "a hat"]


def test_every_option_reaches_the_picture(make: Make) -> None:
    code, _, err = make(
        *("--prompt", "a hat", "--negative-prompt", "rain", "--seed", "3", "--sampler", "ddim"),
        *("--steps-c", "2", "--steps-b", "1", "--guidance-c", "3", "--guidance-b", "1.5"),
        *("--width", "41", "--height", "24", "--dtype", "bfloat16"),
    )
    assert code == 0
    assert err == "notice: width 41 becomes 40: this model makes multiples of 8 pixels\n"
    [path] = make.files()
    text = read_png_metadata(path)
    assert (text["negative_prompt"], text["seed"], text["model"]) == ("rain", "3", "tiny")
    for part in ('"width": 40', '"height": 24', '"dtype": "bfloat16"', '"guidance": 1.5'):
        assert part in text["settings"]
    assert open_image(path).size == (40, 24)


def test_a_grid_is_added_to_the_folder(make: Make) -> None:
    code, out, _ = make("--prompt", "a hat", "--seed", "7", "--num-images", "2", "--grid")
    assert code == 0
    assert [path.name[:4] for path in make.files()] == ["0001", "0002", "0003"]
    grid = make.files()[-1]
    assert f"{grid}  2 pictures" in out
    assert open_image(grid).size == (68, 32)
    assert read_png_metadata(grid)["pictures"] == "seed 7: a hat\nseed 8: a hat"


def test_a_named_file_is_replaced_whole(make: Make) -> None:
    make.out.mkdir()
    path = make.out / "x.png"
    path.write_text("an old picture")
    assert make("--prompt", "a hat", "--out", str(path))[0] == 0
    assert open_image(path).size == (32, 32)
    assert make.files() == [path]


def test_a_preview_lies_beside_the_picture(make: Make) -> None:
    assert make("--prompt", "a hat", "--seed", "7", "--preview")[0] == 0
    names = [path.name for path in make.files()]
    assert names == ["0001-a-hat-seed7.png", "0001-a-hat-seed7.preview.png"]
    assert open_image(make.files()[1]).size == (4, 4)


def test_ctrl_c_keeps_what_is_finished_and_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CascadePipeline._make_batch

    def stop_at_the_third(self: CascadePipeline, plan, states, given, watch):  # type: ignore[no-untyped-def]
        if watch.batch[0] == 2:
            raise KeyboardInterrupt
        return whole(self, plan, states, given, watch)

    monkeypatch.setattr(CascadePipeline, "_make_batch", stop_at_the_third)
    code, _, err = make("--prompt", "a hat", "--seed", "7", "--num-images", "4", "--grid")
    assert code == 130
    assert err == "stopped: 2 of 4 pictures kept\n"
    assert [path.name[:4] for path in make.files()] == ["0001", "0002", "0005"]


def test_a_picture_and_a_mask_become_a_picture_that_keeps_the_black_side(
    make: Make, tmp_path: Path
) -> None:
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.new("RGB", (32, 32), (200, 30, 60)).save(picture)
    hole = Image.new("L", (32, 32))
    hole.paste(255, (16, 0, 32, 32))
    hole.save(mask)
    given = ("--image", str(picture), "--seed", "7")
    assert make("--prompt", "a hat", "--mask", str(mask), *given)[0] == 0
    assert make("--mode", "reconstruct", *given)[0] == 0
    painted, reconstructed = (open_image(path).convert("RGB") for path in make.files())
    assert painted.crop((0, 0, 16, 32)).getcolors() == [(512, (200, 30, 60))]
    assert len(painted.crop((16, 0, 32, 32)).getcolors() or []) > 1
    assert reconstructed.size == (32, 32)
    told = json.loads(read_png_metadata(make.files()[0])["settings"])["picture"]
    assert told["mode"] == "inpaint"


def test_a_picture_of_another_size_is_scaled_with_a_notice(make: Make, tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), "red").save(tmp_path / "wide.png")
    code, _, err = make("--mode", "reconstruct", "--image", str(tmp_path / "wide.png"))
    assert (code, err) == (0, "notice: the picture is scaled and cut from 100x50 to 48x24\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt given"),
        (["--prompt", ""], "the prompt is empty"),
        (["--promt", "a hat"], "did you mean --prompt?"),
        (["--prompt", "a hat", "--step-c=3"], "did you mean --steps-c?"),
        (["--prompt", "a", "hat"], "put a prompt of several words in quotes"),
        (["--prompt", "a", "--seed", "x"], "--seed: invalid int value: 'x'"),
        (["--prompt", "a", "--seed", "-1"], "seed -1"),
        (["--prompt", "a", "--num-images", "0"], "num_images 0"),
        (["--prompt", "a", "--width", "0"], "valid sizes near it: 16, 24, 32"),
        (["--prompt", "a", "--height", "7"], "valid sizes near it: 16, 24, 32"),
        (["--prompt", "a", "--width", "100000"], "valid sizes near it: 48, 56, 64"),
        (["--prompt", "a", "--sampler", "dppm"], "did you mean 'ddpm'"),
        (["--prompt", "a", "--guidance-c", "nan"], "guidance_c nan"),
        (["--prompt", "a", "--guidance-interval", "0.2"], "is no FROM:TO, such as 0.2:0.8"),
        (["--prompt", "a", "--guidance-interval", "0.9:0.2"], "0 <= from <= to <= 1"),
        (["--prompt", "a", "--compile", "--offload", "model"], "leave --offload and --vram out"),
        (["--prompt", "a", "--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a CUDA GPU"),
        (["--prompt", "a", "--dtype", "fp32"], "dtype 'fp32'"),
        (["--prompt", "a", "--device", "tpu"], "device 'tpu'"),
        (["--prompt", "a", "--out", "x.jpg"], "written as PNG"),
        (["--prompt", "a", "--out", "/dev/null/x"], "/dev/null"),
        (["--prompt", "a", "--model", "/nowhere/at/all"], "no such folder"),
        (["--prompts-file", "/nowhere.txt"], "/nowhere.txt"),
        (["--prompts-file", "/dev/null"], "no prompts in it"),
        (["--prompt", "a", "--mode", "inpaint"], "--mode is about a picture"),
        (["--prompt", "a", "--strength", "0.5"], "--strength is about a picture"),
        (["--prompt", "a", "--image", "/nowhere.png"], "/nowhere.png: no such file"),
        (["--prompt", "a", "--image", __file__], "not a readable picture"),
        (["--image", "{picture}"], "no prompt given"),
        (["--prompt", "a", "--image", "{picture}", "--mode", "inpait"], "'inpaint', 'outpaint'"),
        (["--image", "{picture}", "--mode", "variaton"], "'variation'"),
        (["--image", "{picture}", "--mode", "reconstruct", "--preview"], "does not run"),
        (["--image", "{picture}", "--mode", "reconstruct", "--steps-c", "9"], "steps_c"),
        (["--image", "{picture}"], "--mode variation and reconstruct need none"),
        (["--prompt", "a", "--image", str(Path(__file__).parent)], "a folder"),
        (["--prompt", "a", "--dtype", "stage_c="], "no format for 'stage_c'"),
        (["--prompt", "a", "--image", "{picture}", "--mode", "inpaint"], "needs a mask"),
        (["--prompt", "a", "--image", "{picture}", "--strength", "2"], "above 0 and up to 1"),
        (["--prompt", "a", "--image", "{picture}", "--mode", "outpaint"], "a width or height"),
        (["--image", "{picture}", "--mode", "variation"], "told nothing of pictures"),
        (["--prompt", "a", "--control-image", "{picture}"], "name it with --control FILE"),
        (["--prompt", "a", "--control", "/nowhere.safetensors"], "needs a picture"),
        (
            ["--prompt", "a", "--control", "/nowhere.safetensors", "--image", "{picture}"],
            "/nowhere.safetensors: no such file",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    make: Make, arguments: list[str], message: str, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "picture.png")
    arguments = [one.replace("{picture}", str(tmp_path / "picture.png")) for one in arguments]
    code, _, err = make(*arguments)
    assert code == 2
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not [path for path in make.files() if path.is_file()]


def test_nothing_is_computed_before_the_folder_is_known_to_be_writable(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **settings: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(CascadePipeline, "__init__", never)
    make.out.write_text("a file in the way")
    code, _, err = make("--prompt", "a hat")
    assert code == 2 and "a file, not a folder" in err


def test_a_disk_that_is_full_at_the_end_leaves_no_half_written_file(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    code, _, err = make("--prompt", "a hat")
    assert code == 2 and "disk is full" in err
    assert make.files() == []


def test_a_prompt_that_is_too_long_names_the_words_that_are_dropped(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompt = "a red apple " * 12 + "tail"
    ran = _run("--model", str(tiny_model), "--prompt", prompt, "--out", str(tmp_path))
    assert ran.returncode == 0
    assert ran.stderr.startswith("notice: ") and "tail'" in ran.stderr
    assert ran.stderr.count("dropped") == 1


def test_help_names_every_option_without_importing_torch() -> None:
    ran = _run("--help", python=("-X", "importtime"))
    assert ran.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines()}
    assert not {"torch", "transformers", "numpy"} & imported
    for option in ("--prompt ", "--prompts-file", "--negative-prompt", "--grid", "--preview"):
        assert option in ran.stdout


def test_generating_imports_no_heavy_package_that_it_does_not_need(
    tiny_model: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(tiny_model), "--prompt", "a hat", "--out", str(tmp_path))
    ran = _run(*arguments, python=("-X", "importtime"))
    assert ran.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in ran.stderr.splitlines()}
    assert not {"lightning", "webdataset", "diffusers", "matplotlib", "gradio"} & imported


def _run(*arguments: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *python, str(ROOT / "sample.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_offloading_makes_the_same_file_and_says_what_it_does(make: Make) -> None:
    make("--prompt", "a hat", "--seed", "7")
    for mode in ("model", "sequential"):
        code, out, err = make("--prompt", "a hat", "--seed", "7", "--offload", mode)
        assert (code, err) == (0, "")
        assert f"offload {mode}: nothing is saved on a CPU" in out
    first, *others = make.files()
    assert all(first.read_bytes() == other.read_bytes() for other in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--offload", "modle"), "invalid choice: 'modle'"),
        (("--vram", "8"), "vram 8: it bounds a GPU's own memory, and cpu has none"),
        (("--vram", "0"), "vram 0: a positive number of GiB"),
        (("--vram", "-3"), "vram -3: a positive number"),
        (("--vram", "nan"), "vram nan: a positive number"),
        (("--vram", "lots"), "invalid float value: 'lots'"),
        (("--dtype", "stage_x=float32"), "valid: stage_c, stage_b, stage_a"),
    ],
)
def test_a_slip_about_memory_is_one_line(
    make: Make, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = make("--prompt", "a hat", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert make.files() == []
