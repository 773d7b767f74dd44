from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cascade.checkpoints.files import load_network, read_metadata, save_network
from cascade.checkpoints.load import load_any
from cascade.errors import UserError, run_main
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_plan import UNetSettings
from cascade.pipelines.unet_spec import UNET_DIFFUSION_KEY, UNET_TEACHER_KEY
from stages.unet.compress import PUBLISHED, plan_student
from stages.unet.unet import UNet, UNetCondition
from tests.reference.unet_toys import SDXL
from tests.unet_models import save_tiny
from train.distill.__main__ import main
from train.distill.make_student import (
    RECIPE_KEY,
)
from train.distill.plans import STUDENT_KEY, read_plan, read_recipe

ROOT = Path(__file__).parents[3]
Refused = Callable[..., str]


def _make(teacher: Path | str, recipe: Path | str, out: Path, *more: str) -> None:
    arguments = ["--teacher", str(teacher), "--recipe", str(recipe), "--out", str(out), *more]
    assert main(["make-student", *arguments]) == 0


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Refused:
    """Run a command that must fail with one line and leave nothing; return the line."""

    def run(teacher: Path | str, recipe: Path | str, *more: str, out: Path | None = None) -> str:
        target = tmp_path / "refused" if out is None else out
        before = sorted(target.iterdir()) if target.is_dir() else []
        given = ["--teacher", str(teacher), "--recipe", str(recipe), "--out", str(target), *more]
        assert run_main(lambda: main(["make-student", *given])) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert (sorted(target.iterdir()) if target.is_dir() else []) == before
        return error

    return run


# What is written


def test_a_student_is_written_with_its_plan_and_loads_as_any_unet(sdxl_file, tmp_path, capsys):
    out = tmp_path / "student"
    _make(sdxl_file, "koala_700m", out)
    teacher = load_network(sdxl_file, expect=UNet)
    plan = plan_student(teacher.config, PUBLISHED["koala_700m"])
    path = out / "student.safetensors"
    [(published, student)] = load_any(path, expect=["unet"])
    assert published.config == plan.student == student.config
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, theirs[plan.teacher_name(name)]), name
    metadata = read_metadata(path)
    assert read_plan(metadata, "here") == plan
    assert json.loads(metadata[RECIPE_KEY]) == {"remove": list(PUBLISHED["koala_700m"].remove)}
    source = json.loads(metadata[UNET_TEACHER_KEY])
    assert source["name"] == str(sdxl_file) and len(source["weights_hash"]) == 12
    printed = capsys.readouterr().out
    before = sum(tensor.numel() for tensor in theirs.values())
    after = sum(tensor.numel() for tensor in student.state_dict().values())
    assert f"{before:,} -> {after:,} parameters" in printed
    assert "70 -> 21 transformer blocks, 1680 -> 584 tensors" in printed
    [middle] = [line for line in printed.splitlines() if line.startswith("mid_block")]
    assert middle.endswith("all of it")
    [up] = [line for line in printed.splitlines() if line.startswith("up_blocks.0")]
    assert "attentions.0.transformer_blocks.5-9" in up and "resnets.1, attentions.1" in up


def test_a_student_says_how_its_teacher_was_trained(sdxl_file, tmp_path):
    teacher = tmp_path / "teacher.safetensors"
    said = {UNET_DIFFUSION_KEY: json.dumps({"prediction": "v"})}
    save_network(teacher, load_network(sdxl_file, expect=UNet), metadata=said)
    _make(teacher, "vega", tmp_path / "out")
    metadata = read_metadata(tmp_path / "out" / "student.safetensors")
    assert metadata[UNET_DIFFUSION_KEY] == said[UNET_DIFFUSION_KEY]


def test_the_report_names_every_tensor_of_both(sdxl_file, tmp_path):
    out = tmp_path / "student"
    _make(sdxl_file, "ssd_1b", out)
    text = (out / "report.txt").read_text(encoding="utf-8")
    inherited, left_out = text.split("\ninherited: ")[1].split("\nleft out: ")
    rows = [line.split() for line in inherited.splitlines()[2:] if line]
    student = load_file(out / "student.safetensors")
    assert sorted(row[0] for row in rows) == sorted(student)
    origins = [row[0] if row[1:3] == ["the", "same"] else row[1] for row in rows]
    lost = [line.split()[0] for line in left_out.splitlines()[2:]]
    assert sorted(origins + lost) == sorted(load_file(sdxl_file))


def test_the_written_recipe_makes_the_same_student_again(sdxl_file, tmp_path):
    _make(sdxl_file, "vega", tmp_path / "one")
    _make(sdxl_file, tmp_path / "one" / "recipe.yaml", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "student.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_example_recipe_makes_a_student(sdxl_file, tmp_path):
    _make(sdxl_file, ROOT / "configs" / "distill" / "my_student.yaml", tmp_path / "out")
    config = load_network(tmp_path / "out" / "student.safetensors", expect=UNet).config
    assert config.up_depths == ((5, 5), (2, 2), (0, 0)) and config.mid_depth == 0


def test_a_recipe_that_removes_nothing_says_so(sdxl_file, tmp_path, capsys):
    (tmp_path / "none.yaml").write_text("remove: []\n")
    out = str(tmp_path / "out")
    recipe = str(tmp_path / "none.yaml")
    words = ["make-student", "--teacher", str(sdxl_file), "--recipe", recipe, "--out", out]
    assert main(words) == 0
    assert "the recipe removes nothing" in capsys.readouterr().out


def test_a_student_of_half_precision_stays_so(middling, tmp_path):
    teacher = tmp_path / "half.safetensors"
    save_network(teacher, middling, dtype=torch.float16)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("remove: [mid_block]\n")
    _make(teacher, recipe, tmp_path / "out")
    state = load_file(tmp_path / "out" / "student.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_a_teacher_may_be_a_model_in_any_layout(tmp_path, single):
    model = save_tiny(tmp_path / "model", "sdxl", single=single)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("remove: [mid_block]\n")
    _make(model, recipe, tmp_path / "out")
    student = load_network(tmp_path / "out" / "student.safetensors", expect=UNet)
    assert student.config.mid_depth is None and student.config.channels == SDXL.channels


def test_a_whole_model_with_the_student_in_it_makes_pictures(tmp_path):
    model = save_tiny(tmp_path / "model", "sdxl")
    recipe = tmp_path / "own.yaml"
    recipe.write_text("remove: [mid_block]\n")
    whole = tmp_path / "whole"
    _make(model, recipe, tmp_path / "out", "--model-out", str(whole))
    assert json.loads((whole / "unet" / "config.json").read_text())["mid_block_type"] is None
    pipeline = UNetPipeline.from_pretrained(str(whole))
    assert pipeline("a red apple", UNetSettings(steps=1)).pictures
    found, student = (
        load_file(path)
        for path in (
            whole / "unet" / "diffusion_pytorch_model.safetensors",
            tmp_path / "out" / "student.safetensors",
        )
    )
    assert found.keys() == student.keys()
    assert all(torch.equal(found[name], student[name]) for name in found)


@pytest.mark.reference
def test_diffusers_loads_the_whole_model_and_predicts_the_same(tmp_path):
    from diffusers import UNet2DConditionModel

    recipe = tmp_path / "own.yaml"
    recipe.write_text("remove: [mid_block]\n")
    whole = tmp_path / "whole"
    model = save_tiny(tmp_path / "model", "sdxl")
    _make(model, recipe, tmp_path / "out", "--model-out", str(whole))
    theirs = UNet2DConditionModel.from_pretrained(whole / "unet").eval()
    ours = load_network(tmp_path / "out" / "student.safetensors", expect=UNet)
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 16 + 24)))
    pooled, sizes = torch.randn(1, 20, generator=generator), torch.full((1, 6), 16.0)
    with torch.no_grad():
        told = {"text_embeds": pooled, "time_ids": sizes}
        expected = theirs(x, 500, text, added_cond_kwargs=told).sample
        found = ours(x, torch.tensor([500.0]), UNetCondition(text, pooled, sizes))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# What does not fit


def test_a_recipe_of_another_teacher_is_refused(refused, sd_file, sdxl_file):
    error = refused(sd_file, "koala_700m")
    assert f"koala_700m does not fit {sd_file}: the recipe removes" in error
    assert "up ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))" in error
    assert f"bk_tiny does not fit {sdxl_file}" in refused(sdxl_file, "bk_tiny")


def test_an_unknown_recipe_is_refused_with_the_nearest(refused, sdxl_file):
    error = refused(sdxl_file, "koala_700")
    assert "did you mean 'koala_700m'?" in error and "ssd_1b" in error
    with pytest.raises(UserError, match=r"no recipe '.*': valid: "):
        read_recipe("zzz")
    with pytest.raises(UserError, match="no such configuration file"):
        read_recipe("not_there.yaml")


def test_a_recipe_file_with_an_unknown_key_is_refused(refused, sdxl_file, tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text("removed: [mid_block]\n")
    assert "removed: unknown key; did you mean 'remove'?" in refused(sdxl_file, recipe)
    recipe.write_text("remove: mid_block\n")
    assert "remove: expected a list" in refused(sdxl_file, recipe)
    recipe.write_text("remove: [mid_blok]\n")
    assert "did you mean mid_block?" in refused(sdxl_file, recipe)


def test_a_folder_with_something_in_it_is_left_alone(refused, sdxl_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "something is there already; name a new folder with --out" in refused(
        sdxl_file, "vega", out=out
    )
    file = refused(sdxl_file, "vega", "--model-out", str(out))
    assert "name a new folder with --model-out" in file


def test_what_is_no_teacher_is_refused(refused, tmp_path, tiny_model):
    assert "no such file or folder" in refused(tmp_path / "nowhere", "vega")
    stage_a = tiny_model / "stage_a.safetensors"
    assert "holds a Stage A, but a U-Net is needed" in refused(stage_a, "vega")


def test_a_single_file_has_no_model_folder(refused, sdxl_file, tmp_path):
    error = refused(sdxl_file, "vega", "--model-out", str(tmp_path / "whole"))
    assert "is no folder of diffusers" in error and "--unet" in error
    assert not (tmp_path / "whole").exists()


def test_options_of_the_automatic_recipe_are_refused_of_others(refused, sdxl_file):
    assert "--max-params is for --recipe auto" in refused(sdxl_file, "vega", "--max-params", "1M")
    assert "give --max-params or --max-latency" in refused(sdxl_file, "auto")
    both = ("--max-params", "1M", "--max-latency", "50%")
    assert "one of them" in refused(sdxl_file, "auto", *both)
    assert "--calibration random" in refused(sdxl_file, "auto", "--max-params", "1M")
    more = ("--max-params", "1M", "--calibration", "random", "--repeats", "0")
    assert "--repeats 0: must be 1 or more" in refused(sdxl_file, "auto", *more)
    unknown = refused(sdxl_file, "vega", "--modelout", "x")
    assert "did you mean --model-out?" in unknown


def test_a_file_without_a_plan_or_with_a_broken_one_is_told_so(sdxl_file):
    with pytest.raises(UserError, match=r"teacher\.safetensors: no student made by"):
        read_plan(read_metadata(sdxl_file), sdxl_file.name)
    with pytest.raises(UserError, match="not valid JSON"):
        read_plan({STUDENT_KEY: "{"}, "x")
    with pytest.raises(UserError, match=r"x \(plan\): origins: missing"):
        read_plan({STUDENT_KEY: json.dumps({"teacher": {}, "student": {}})}, "x")
