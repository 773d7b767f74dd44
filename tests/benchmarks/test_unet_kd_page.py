"""The commands and figures of UNET_KD.md and of the card of the student that ships."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import recipes, recipes_agreement
from cascade.checkpoints.files import read_metadata
from cascade.pipelines.unet_parts import open_unet_source
from stages.unet.config import UNetConfig
from train import assemble_unet
from train.distill.plans import read_plan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "benchmarks" / "UNET_KD.md").read_text(encoding="utf-8")
KOALA = ROOT / "weights" / "demo-koala"
CARD = (KOALA / "README.md").read_text(encoding="utf-8")
STUDENT = KOALA / "unet" / "diffusion_pytorch_model.safetensors"


def commands() -> list[str]:
    [block] = re.findall(r"```\n(.*?)```", PAGE, flags=re.S)
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


class Parsed(Exception):
    """The command line was understood."""


def stop(*_: object, **__: object) -> None:
    raise Parsed


@pytest.mark.parametrize("command", commands())
def test_a_printed_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command, comments=True)
    if program == "bash":
        assert subprocess.run(["bash", "-n", words[0]]).returncode == 0
        return
    modules: dict[str, tuple[ModuleType, str, int]] = {
        "benchmarks/recipes.py": (recipes, "read_recipes", 1),
        "benchmarks/recipes_agreement.py": (recipes_agreement, "read_recipes", 1),
        "train.assemble_unet": (assemble_unet, "assemble_unet", 2),
    }
    named = words[1] if words[0] == "-m" else words[0]
    module, work, first = modules[named]
    monkeypatch.setattr(module, work, stop)
    with pytest.raises(Parsed):
        module.main(words[first:])
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


def test_what_a_command_reads_an_earlier_one_makes() -> None:
    model = re.search(r"--model (\S+)", PAGE)
    assert model is not None and f"--out {model[1]}" in " ".join(commands()[:-1])


def test_the_page_and_the_card_have_the_files_own_figures() -> None:
    student, teacher = read_metadata(STUDENT), read_metadata(KOALA / "teacher.safetensors")
    assert f"{int(student['train_seconds']):,} s beside" in PAGE
    for told in (student, teacher):
        assert f"| {int(told['train_seconds']):,} |" in CARD
    config = (ROOT / "configs" / "demo_koala" / "unet.yaml").read_text(encoding="utf-8")
    assert f"{int(teacher['train_seconds']):,} s;" in config
    total_mb = sum(path.stat().st_size for path in KOALA.rglob("*") if path.is_file()) / 1e6
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    said = re.search(r"`weights/demo-koala` \((\d+) MB\)", readme)
    assert said is not None and int(said[1]) == round(total_mb)
    assert f"- weights: {open_unet_source(KOALA).weights_hash}\n" in CARD


def test_the_card_says_what_the_student_lost() -> None:
    plan = read_plan(read_metadata(STUDENT), str(STUDENT))

    def stacks(config: UNetConfig) -> list[int]:
        ways = (*config.down_depths, (config.mid_depth or 0,), *config.up_depths)
        return [depth for depths in ways for depth in depths if depth]

    def coarsest(config: UNetConfig) -> tuple[int, ...]:
        return (*config.down_depths[-1], *config.up_depths[0])

    teacher, student = plan.teacher, plan.student
    assert student.mid_depth is None
    assert (len(coarsest(teacher)), len(coarsest(student))) == (5, 3)
    assert [depth for depth in coarsest(student) if depth] == [1]
    assert (len(stacks(teacher)), len(stacks(student))) == (11, 6)
    assert (sum(stacks(teacher)), sum(stacks(student))) == (23, 6)
    assert "two of the five layers of the coarsest level" in CARD
    assert "five stacks of eleven, and 17 of 23 transformer blocks" in CARD
