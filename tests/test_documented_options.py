"""Every documented command is one that its program understands: its options, and its keys."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

import sample
from cascade.config import apply_overrides, from_dict, load_yaml, parse_overrides, read_yaml
from cascade.errors import UserError
from train.__main__ import kinds
from train.assemble import AssembleConfig
from train.assemble_latent import AssembleLatentConfig
from train.assemble_unet import AssembleUNetConfig
from train.data.config import DataConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("weights/*/README.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("studies/*.md")),
    *sorted(ROOT.glob("configs/**/*.sh")),
]
_PROGRAM = re.compile(r"python (?:-m )?((?:cascade|train|benchmarks)[\w./]*|sample\.py)")
ASSEMBLED: dict[str, type] = {
    "train.assemble": AssembleConfig,
    "train.assemble_latent": AssembleLatentConfig,
    "train.assemble_unet": AssembleUNetConfig,
}
_PLACEHOLDERS = ("RUN.yaml", "...", "$", "[", "<")


class Parsed(Exception):
    """What a parser has made of a command line."""

    def __init__(self, options: argparse.Namespace, rest: Sequence[str]) -> None:
        super().__init__()
        self.options, self.rest = options, list(rest)


def commands() -> Iterator[tuple[str, str, str]]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [text] if page.suffix == ".sh" else re.findall(r"```\w*\n(.*?)```", text, re.S)
        for block in blocks:
            for line in block.replace("\\\n", " ").splitlines():
                found = _PROGRAM.search(line)
                if found is not None and not line.lstrip().startswith("#"):
                    words = line[found.end() :].split(" | ")[0].split(" > ")[0].split("&&")[0]
                    yield page.name, found[1], words.strip()


COMMANDS = sorted({one for one in commands() if not any(p in one[2] for p in _PLACEHOLDERS)})


def parsed(program: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> Parsed:
    """Start a program, and end it when it has parsed its command line."""
    name = program.removesuffix(".py").replace("/", ".")
    module: Any = importlib.import_module(name)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{name}.__main__")
    plain = argparse.ArgumentParser.parse_known_args
    depth = 0

    def parse(self: Any, args: Any = None, namespace: Any = None) -> Any:
        nonlocal depth
        depth += 1
        try:  # subcommands have parsers of their own, within the first one's
            found = plain(self, args, namespace)
        finally:
            depth -= 1
        if depth:
            return found
        raise Parsed(*found)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    try:
        module.main(list(words))
    except Parsed as one:
        return one
    return _fail(f"{program} parses nothing")


def _fail(why: str) -> NoReturn:
    raise AssertionError(why)


def check_rest(program: str, found: Parsed) -> None:
    """Fail if what the parser left is no key of the configuration that it belongs to."""
    if program == "train":
        data = read_yaml(ROOT / found.options.config)
        overrides = parse_overrides(found.rest)
        apply_overrides(data, overrides)
        from_dict(kinds()[found.options.kind][0], data, found.options.config, told=overrides)
    elif program == "train.data":
        known = set(DataConfig.__dataclass_fields__)
        assert {one.partition("=")[0].split(".")[0] for one in parse_overrides(found.rest)} <= known
    elif program in ASSEMBLED:
        load_yaml(ASSEMBLED[program], ROOT / found.options.config, parse_overrides(found.rest))
    elif program == "train.study":
        keys = [one.partition("=")[0].split(".")[0] for one in parse_overrides(found.rest)]
        assert set(keys) <= {"out", "budget", "seeds", "judge"}
    else:
        assert found.rest == [], f"unknown: {found.rest}"


@pytest.mark.parametrize(("page", "program", "words"), COMMANDS)
def test_a_documented_command_is_understood(page, program, words, monkeypatch):
    given = shlex.split(words, comments=True)
    if "--help" in given:
        return
    monkeypatch.chdir(ROOT)
    if program == "sample.py":
        assert sample.parse(given) is not None
        return
    check_rest(program, parsed(program, given, monkeypatch))


def test_there_are_commands_of_all_programs():
    assert {"sample.py", "train", "train.data", "cascade.tools", "train.study"} <= {
        program for _, program, _ in COMMANDS
    }
    assert len(COMMANDS) > 60


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("train", "stage_c --config configs/demo/stage_c.yaml --optim.rate 1"),
        ("train", "stage_c --config configs/demo/stage_c.yaml --resumed"),
        ("cascade.tools", "describe x --formt y"),
        ("train.data", "precompute --shards x --out y --sise 3"),
        ("benchmarks.sampling", "--quickly"),
    ],
)
def test_a_mistyped_option_fails_here(program, words, monkeypatch):
    with pytest.raises((UserError, AssertionError)):
        check_rest(program, parsed(program, words.split(), monkeypatch))
