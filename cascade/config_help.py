"""What a configuration's keys mean, for ``--help``: read from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import get_args, get_type_hints

import yaml

from cascade.config import to_dict

_WIDTH = 96
_CHOICES = re.compile(r"Literal\[([^]]*)\]")
_NO_QUOTES = str.maketrans("", "", "'\"")


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
        name = f"{prefix}{field.name}"
        kinds = (hints[field.name], *get_args(hints[field.name]))
        sections = [
            kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        ]
        meaning = f"{meanings.get(field.name, '')} {_default(field)}".strip()
        if sections:
            if type(None) in kinds:
                yield name, "section, or null", meaning
            for section in sections:
                yield from _keys(section, f"{name}.")
        else:
            yield name, _type(field.type), meaning


def _type(annotation: object) -> str:
    """Return an annotation as it stands in the source, which says more than its object."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = _CHOICES.sub(lambda choices: choices[1].replace(", ", " | "), text)
    return (
        text.replace("None", "null")
        .replace("tuple[", "list[")
        .replace(", ...]", "]")
        .translate(_NO_QUOTES)
    )


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
