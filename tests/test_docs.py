"""What the README and the model card say is there, is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import sample

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = ROOT / "weights" / "demo" / "README.md"
INSTALL_AND_SAMPLE = (
    'pip install -c constraints.txt -e . && python sample.py --prompt "a 3D render of a red apple"'
)
INSTALL_AND_TEST = 'pip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist worksteal'


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def words_of(command: str, program: str) -> list[str]:
    return shlex.split(command[command.index(program) + len(program) :], comments=True)


def test_two_commands_do_all_the_set_up() -> None:
    assert INSTALL_AND_SAMPLE in commands()
    assert INSTALL_AND_TEST in commands()


def test_ci_calls_exactly_the_readmes_test_command() -> None:
    assert INSTALL_AND_TEST in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [c for c in commands() if "sample.py" in c])
def test_sample_commands_are_understood(command: str) -> None:
    words = words_of(command, "sample.py")
    if words != ["--help"]:
        assert sample.read_prompts(sample.parse(words))


@pytest.mark.parametrize("command", [c for c in commands() if "python -m " in c])
def test_modules_and_configs_of_commands_exist(command: str) -> None:
    words = words_of(command, "python -m ")
    assert importlib.util.find_spec(words[0]) is not None
    for word in words[1:]:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize("page", [ROOT / "README.md", CARD], ids=["readme", "card"])
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_named_files_exist() -> None:
    names = re.findall(r"`([\w./]+(?:\.py|/))`", README)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


def test_nothing_is_left_to_fill_in() -> None:
    for text in (README, CARD.read_text(encoding="utf-8")):
        assert "@@" not in text and "TODO" not in text
    figures = CARD.read_text(encoding="utf-8").split("<!-- figures -->")[1]
    assert "### Prompt agreement" in figures and "### Reconstruction" in figures
