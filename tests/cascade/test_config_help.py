"""What --help says of a configuration's keys."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from cascade.config_help import describe_keys

Choice = Literal["x", "y"]


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
    many: tuple[Inner, ...] = ()
    """As many as you like."""
    pair: tuple[int, str | None] = (1, None)
    scores: dict[str, float] = field(default_factory=dict)
    named: Choice = "x"


def test_each_key_stands_with_its_type_its_default_and_its_meaning() -> None:
    assert describe_keys(Outer).splitlines() == [
        "  --out str",
        "      Where to, in full. (required)",
        "  --mode a | b",
        "      (default: a)",
        "  --inner.rate float",
        "      How fast. (default: 0.0001)",
        "  --inner.sizes [int, ...]",
        "      (default: [1, 2])",
        "  --maybe section | null",
        "      Or not. (default: null)",
        "  --maybe.rate float",
        "      How fast. (default: 0.0001)",
        "  --maybe.sizes [int, ...]",
        "      (default: [1, 2])",
        "  --many [{rate: float, sizes: [int, ...]}, ...]",
        "      As many as you like. (default: [])",
        "  --pair [int, str | null]",
        "      (default: [1, null])",
        "  --scores {str: float}",
        "      (default: {})",
        "  --named x | y",
        "      (default: x)",
    ]
