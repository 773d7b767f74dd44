"""Strict configuration: YAML or JSON <-> frozen dataclasses.

Unknown keys are errors that name the nearest valid one; a value of the wrong type says what was
expected and what was given. The same functions serve run files, command-line overrides and the
configuration inside a checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from cascade.errors import UserError

T = TypeVar("T")


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like ``word``, or None if none is like it."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return the choice most like a word as the end of a message, ``"; did you mean 'x'?"``."""
    guess = nearest(word, choices)
    return f"; did you mean {guess!r}?" if guess and guess != word else ""


def not_among(what: str, value: object, choices: Iterable[str]) -> UserError:
    """Return the error of a value that is none of the choices, which it names."""
    listed = list(choices)
    guess = nearest(str(value), listed)
    hint = f"did you mean {guess!r}? " if guess else ""
    return UserError(f"{what} {value!r}: {hint}valid: {', '.join(listed)}")


class DependentDefaults:
    """A dataclass in which some keys that are left out depend on those that are given."""

    @classmethod
    def defaults_beside(cls, given: Mapping[str, object]) -> Mapping[str, object]:
        """Return values, by key, that take the place of the fields' own defaults."""
        raise NotImplementedError


def from_dict(cls: type[T], data: Mapping[str, object], where: str, told: Sequence[str] = ()) -> T:
    """Build the dataclass ``cls`` from plain values.

    Args:
        cls: A dataclass; its fields may be dataclasses, tuples, Literals, unions and scalars.
        data: What YAML or JSON gave.
        where: Where ``data`` is from, such as ``"configs/x.yaml"``; errors begin with it.
        told: ``"a.b.c=value"`` strings of the command line among them; errors in their keys begin
            with ``--a.b.c``.

    Raises:
        UserError: Unknown or missing key, wrong type, or a value the dataclass refuses.
    """
    try:
        return _dataclass(cls, data, where, "")
    except UserError as error:
        blamed = str(error)[len(f"{where}: ") :]
        key, _, message = blamed.partition(": ")
        for name in (one.partition("=")[0] for one in told):
            if key == name:
                raise UserError(f"--{name}: {message}") from error
            if key.startswith((f"{name}.", f"{name}[")):  # a part of the value
                raise UserError(f"--{name}: {blamed}") from error
        if any(name.partition("=")[0].startswith(f"{key}.") for name in told):
            # A section as a whole, of the file and of the command line together.
            raise UserError(f"{where} and the command line: {blamed}") from error
        raise


def to_dict(config: object) -> dict[str, object]:
    """Return a dataclass as plain values that YAML and JSON can carry."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"{config!r} is not a dataclass instance")
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def load_yaml(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a dataclass from a YAML file.

    Args:
        cls: The dataclass.
        path: The file.
        overrides: ``"a.b.c=value"`` strings; values are parsed as YAML.
    """
    data = read_yaml(path)
    apply_overrides(data, overrides)
    return from_dict(cls, data, str(path), overrides)


def read_yaml(path: str | Path) -> dict[str, object]:
    """Read a YAML file's mapping as plain values.

    Raises:
        UserError: It is not there, not YAML, or no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; check the path")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    return data


def apply_overrides(data: dict[str, object], overrides: Sequence[str]) -> None:
    """Set keys of plain values from ``"a.b.c=value"`` strings; values are parsed as YAML.

    Raises:
        UserError: A value is not YAML, or a section is a value.
    """
    for override in overrides:
        _apply(data, override)


def parse_overrides(arguments: Sequence[str]) -> list[str]:
    """Turn ``--a.b value`` and ``--a.b=value`` arguments into ``"a.b=value"`` strings."""
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--") or len(name) < 3:
            raise UserError(f"{name}: unexpected argument; a key is set with --section.key value")
        if "=" in name:
            overrides.append(name[2:])
        elif not rest:
            raise UserError(f"{name}: a value is missing; write {name} VALUE")
        else:
            overrides.append(f"{name[2:]}={rest.pop(0)}")
    return overrides


def _apply(data: dict[str, object], override: str) -> None:
    name, _, text = override.partition("=")
    *sections, key = name.split(".")
    for section in sections:
        inner = data.get(section)
        if inner is None:  # not there, or "section:" without keys
            inner = data[section] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--{name}: {section} is a value, not a section")
        data = inner
    try:
        data[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--{name}: {text!r} is not valid YAML") from error


def _dataclass(cls: type[T], data: object, where: str, prefix: str) -> T:
    at = f"{where}: {prefix[:-1]}" if prefix else where
    if not isinstance(data, Mapping):
        raise UserError(f"{at}: expected a section of keys, got {data!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for key, value in data.items():
        if key not in fields:
            raise UserError(f"{where}: {prefix}{key}: unknown key{_hint(str(key), fields)}")
        values[key] = _value(hints[key], value, where, f"{prefix}{key}")
    if issubclass(cls, DependentDefaults):
        values = {**cls.defaults_beside(values), **values}
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise UserError(f"{where}: {prefix}{name}: missing; this key is required")
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{at}: {error}") from error


def _hint(key: str, fields: Iterable[str]) -> str:
    hint, listed = did_you_mean(key, fields), ", ".join(fields)
    return f"{hint} valid: {listed}" if hint else f"; valid: {listed}"


def _value(kind: object, value: object, where: str, key: str) -> object:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, value, where, key)
    if origin is Literal:
        if value in arguments:
            return value
        choices = ", ".join(str(choice) for choice in arguments)
        hint = did_you_mean(str(value), [str(choice) for choice in arguments])
        raise UserError(f"{where}: {key}: {value!r} is not one of {choices}{hint}")
    if origin is tuple:
        return _tuple(arguments, value, where, key)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, {} if value is None else value, where, f"{key}.")
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {k: _value(arguments[1], v, where, f"{key}.{k}") for k, v in value.items()}
    return _scalar(kind, value, where, key)


def _union(kinds: Sequence[object], value: object, where: str, key: str) -> object:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _value(kind, value, where, key)
        except UserError as error:
            errors.append(error)
    raise errors[-1]


def _tuple(kinds: Sequence[object], value: object, where: str, key: str) -> tuple[object, ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: {key}: expected a list, got {value!r}")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = [kinds[0]] * len(value)
    if len(kinds) != len(value):
        raise UserError(f"{where}: {key}: expected {len(kinds)} values, got {len(value)}")
    return tuple(
        _value(kind, item, where, f"{key}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _scalar(kind: object, value: object, where: str, key: str) -> object:
    # bool is an int in Python, but "steps: true" is a slip.
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-4 (no dot) as text
        except ValueError:
            number = math.nan
        if not math.isnan(number):
            return number
    if kind is str and isinstance(value, str):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    name = getattr(kind, "__name__", str(kind))
    raise UserError(f"{where}: {key}: expected {name}, got {value!r}")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value
