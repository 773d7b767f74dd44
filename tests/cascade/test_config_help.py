"""What --help says of a configuration's keys."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from cascade.config_help import describe_keys


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-4
    """How fast."""
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    out: str
    """Where to,
    in full."""
    mode: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    """Or not."""


def test_each_key_stands_with_its_type_its_default_and_its_meaning() -> None:
    assert describe_keys(Outer).splitlines() == [
        "  --out str",
        "      Where to, in full. (required)",
        "  --mode a | b",
        "      (default: a)",
        "  --inner.rate float",
        "      How fast. (default: 0.0001)",
        "  --inner.sizes list[int]",
        "      (default: [1, 2])",
        "  --maybe section, or null",
        "      Or not. (default: null)",
        "  --maybe.rate float",
        "      How fast. (default: 0.0001)",
        "  --maybe.sizes list[int]",
        "      (default: [1, 2])",
    ]
