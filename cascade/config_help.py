"""What a configuration's keys mean, for ``--help``: read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cascade.config import to_dict

_WIDTH = 96
_UNIONS = (Union, types.UnionType)


def describe_keys(cls: type) -> str:
    """Return a paragraph for each key of a configuration: name, type, default and meaning.

    Args:
        cls: The dataclass of a configuration. A field's meaning is the string after it; keys of a
            section follow where the section would stand, as ``section.key``.
    """
    return "\n".join(
        f"  --{name} {kind}\n{textwrap.indent(textwrap.fill(meaning, _WIDTH - 6), ' ' * 6)}"
        for name, kind, meaning in _keys(cls, "")
    )


def _keys(cls: type, prefix: str) -> Iterator[tuple[str, str, str]]:
    meanings = _meanings(cls)
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name, hint = f"{prefix}{field.name}", hints[field.name]
        meaning = f"{meanings.get(field.name, '')} {_default(field)}".strip()
        sections = _sections(hint)
        if not sections:
            yield name, _type(hint), meaning
            continue
        if type(None) in get_args(hint):
            yield name, "section | null", meaning
        for section in sections:
            yield from _keys(section, f"{name}.")


def _sections(hint: object) -> list[type]:
    """Return the dataclasses that a key may be; of a list of them it is none."""
    kinds = get_args(hint) if get_origin(hint) in _UNIONS else (hint,)
    return [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]


def _type(hint: object) -> str:
    """Return what may be written for a key, in words of YAML."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin in _UNIONS:
        return " | ".join(dict.fromkeys(_type(kind) for kind in inner))
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin is tuple:
        same = len(inner) == 2 and inner[1] is Ellipsis
        return f"[{_type(inner[0])}, ...]" if same else f"[{', '.join(map(_type, inner))}]"
    if origin in (dict, Mapping):
        return f"{{{_type(inner[0])}: {_type(inner[1])}}}"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        keys = ", ".join(f"{key}: {kind}" for key, kind, _ in _keys(hint, ""))
        return f"{{{keys}}}"
    return {Path: "path"}.get(hint, getattr(hint, "__name__", str(hint)))  # type: ignore[call-overload, no-any-return]


def _default(field: dataclasses.Field[object]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        value = field.default
    else:
        return "(required)"
    plain = to_dict(_Holder(value))["value"]
    shown = yaml.safe_dump(plain, default_flow_style=True, width=1000).splitlines()[0]
    return f"(default: {shown})"


@dataclasses.dataclass(frozen=True)
class _Holder:
    """One value, so that it is made plain as within a configuration."""

    value: object


def _meanings(cls: type) -> dict[str, str]:
    """Return the string after each field, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[field.target.id] = " ".join(after.value.value.split())
    return found
