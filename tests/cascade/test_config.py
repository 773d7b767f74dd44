from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cascade.config import from_dict, load_yaml, nearest, parse_overrides, to_dict
from cascade.errors import UserError


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int
    inner: Inner = field(default_factory=Inner)
    kind: Literal["uniform", "official"] = "uniform"
    limit: float | None = None
    either: int | str = 0
    flag: bool = False
    folder: Path = Path("runs")
    shares: dict[str, float] = field(default_factory=dict)
    blocks: tuple[Inner, ...] = ()


LEAST = {"name": "x", "steps": 3}


def _error(data: object) -> str:
    with pytest.raises(UserError) as caught:
        from_dict(Outer, data, "run.yaml")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("told", [float("nan"), "nan", "NaN"])
def test_what_is_no_number_is_no_value(told: object) -> None:
    assert _error({**LEAST, "limit": told}).startswith("run.yaml: limit: expected float, got ")
    assert from_dict(Outer, {**LEAST, "limit": "inf"}, "run.yaml").limit == float("inf")


def test_values_become_the_fields_types_through_all_levels() -> None:
    data = {
        **LEAST,
        "inner": {"lr": 1, "betas": [0, 0.5], "channels": [1, 2, 3]},
        "kind": "official",
        "limit": 2,
        "either": "many",
        "flag": True,
        "folder": "out/here",
        "shares": {"a": 1},
        "blocks": [{"lr": 0.5}, {}],
    }
    config = from_dict(Outer, data, "run.yaml")
    assert config == Outer(
        name="x",
        steps=3,
        inner=Inner(1.0, (0.0, 0.5), (1, 2, 3)),
        kind="official",
        limit=2.0,
        either="many",
        flag=True,
        folder=Path("out/here"),
        shares={"a": 1.0},
        blocks=(Inner(0.5), Inner()),
    )
    assert isinstance(config.inner.lr, float) and isinstance(config.limit, float)


def test_what_is_not_given_keeps_its_default() -> None:
    assert from_dict(Outer, LEAST, "run.yaml") == Outer("x", 3)
    assert from_dict(Outer, {**LEAST, "inner": None}, "run.yaml").inner == Inner()


def test_a_configuration_survives_json() -> None:
    config = Outer("x", 3, Inner(0.1, (0.1, 0.2), (4, 5)), limit=0.5, blocks=(Inner(), Inner(2.0)))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(config))), "file") == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**LEAST, "stesp": 1}, "run.yaml: stesp: unknown key; did you mean 'steps'? valid: name,"),
        ({**LEAST, "inner": {"lt": 1}}, "run.yaml: inner.lt: unknown key; did you mean 'lr'?"),
        ({**LEAST, "zzzzzz": 1}, "run.yaml: zzzzzz: unknown key; valid: name, steps"),
        ({**LEAST, 7: 1}, "run.yaml: 7: unknown key"),
        ({"name": "x"}, "run.yaml: steps: missing; this key is required"),
        ({}, "run.yaml: name: missing"),
        ({**LEAST, "steps": "many"}, "run.yaml: steps: expected int, got 'many'"),
        ({**LEAST, "steps": 1.5}, "run.yaml: steps: expected int, got 1.5"),
        ({**LEAST, "steps": True}, "run.yaml: steps: expected int, got True"),
        ({**LEAST, "steps": None}, "run.yaml: steps: expected int, got None"),
        ({**LEAST, "name": 7}, "run.yaml: name: expected str, got 7"),
        ({**LEAST, "flag": 1}, "run.yaml: flag: expected bool, got 1"),
        ({**LEAST, "limit": "fast"}, "run.yaml: limit: expected float, got 'fast'"),
        ({**LEAST, "limit": False}, "run.yaml: limit: expected float, got False"),
        ({**LEAST, "folder": 3}, "run.yaml: folder: expected Path, got 3"),
        ({**LEAST, "inner": 3}, "run.yaml: inner: expected a section of keys, got 3"),
        ({**LEAST, "inner": [1]}, "run.yaml: inner: expected a section of keys"),
        ({**LEAST, "inner": {"betas": [1]}}, "run.yaml: inner.betas: expected 2 values, got 1"),
        ({**LEAST, "inner": {"betas": 0.9}}, "run.yaml: inner.betas: expected a list, got 0.9"),
        ({**LEAST, "inner": {"channels": [1, "b"]}}, "inner.channels[1]: expected int, got 'b'"),
        ({**LEAST, "blocks": [{"lr": 1}, {"l": 1}]}, "run.yaml: blocks[1].l: unknown key"),
        ({**LEAST, "shares": {"a": "b"}}, "run.yaml: shares.a: expected float, got 'b'"),
        ({**LEAST, "kind": "oficial"}, "kind: 'oficial' is not one of uniform, official; did you"),
        ({**LEAST, "kind": 3}, "run.yaml: kind: 3 is not one of uniform, official"),
        ({**LEAST, "inner": {"lr": -1}}, "run.yaml: inner: lr is -1.0; it must be above 0"),
        ("steps", "run.yaml: expected a section of keys, got 'steps'"),
    ],
)
def test_a_slip_says_where_it_is_what_was_expected_and_what_was_given(
    data: object, message: str
) -> None:
    assert message in _error(data)


def test_a_number_that_yaml_reads_as_text_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x\nsteps: 3\nlimit: 1e-4\ninner: {lr: 3e-4}\n")
    config = load_yaml(Outer, tmp_path / "run.yaml")
    assert (config.limit, config.inner.lr) == (1e-4, 3e-4)


def test_overrides_reach_any_depth_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nsteps: 3\ninner:\n  betas: [0.1, 0.2]\n")
    config = load_yaml(
        Outer, path, ["inner.lr=0.5", "steps=4", "steps=5", "inner.channels=[1, 2]", "limit=null"]
    )
    assert config == Outer("x", 5, Inner(0.5, (0.1, 0.2), (1, 2)))


@pytest.mark.parametrize("section", ["", "inner:\n", "inner: {}\n"])
def test_an_override_makes_the_section_it_needs(tmp_path: Path, section: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nsteps: 3\n" + section)
    assert load_yaml(Outer, path, ["inner.lr=0.5"]).inner.lr == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.lx=1", "inner.lx: unknown key; did you mean 'lr'?"),
        ("steps.more=1", "--steps.more: steps is a value, not a section"),
        ("steps=[1", "--steps: '[1' is not valid YAML"),
        ("steps=", "steps: expected int, got None"),
    ],
)
def test_a_slip_in_an_override_is_an_error(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: x\nsteps: 3\n")
    with pytest.raises(UserError) as caught:
        load_yaml(Outer, path, [override])
    assert message in str(caught.value)


def test_both_spellings_of_an_option_are_overrides() -> None:
    arguments = ["--a.b", "1", "--c=x=y", "--d", "--e", "--f="]
    assert parse_overrides(arguments) == ["a.b=1", "c=x=y", "d=--e", "f="]
    assert parse_overrides([]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps", "3"], "steps: unexpected argument"),
        (["-s", "3"], "-s: unexpected argument"),
        (["--"], "--: unexpected argument"),
        (["--a", "1", "--steps"], "--steps: a value is missing; write --steps VALUE"),
    ],
)
def test_an_argument_that_sets_no_key_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_overrides(arguments)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: [1", "not valid YAML"),
        (b"- 1\n- 2\n", "a configuration is a mapping"),
        (b"", "a configuration is a mapping"),
        (b"\xff\xfe\x00name", "not a text file in UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration_is_an_error_that_names_it(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        load_yaml(Outer, path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match="no such configuration file"):
            load_yaml(Outer, path)


def test_only_instances_of_dataclasses_become_plain_values() -> None:
    for thing in (Outer, {"a": 1}, 3):
        with pytest.raises(TypeError, match="not a dataclass instance"):
            to_dict(thing)


def test_the_nearest_word_is_none_where_no_word_is_near() -> None:
    assert nearest("ddpn", ["ddim", "ddpm"]) == "ddpm"
    assert nearest("euler", ["ddim", "ddpm"]) is None
    assert nearest("a", []) is None
