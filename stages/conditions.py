"""Conditions are dataclasses of tensors; this joins them, whatever their fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def concat(conditions: Sequence[T]) -> T:
    """Join conditions of one type along the batch, field by field.

    Raises:
        ValueError: A field is given in one condition and None in another.
    """
    first = conditions[0]
    joined = {
        field.name: _join([getattr(condition, field.name) for condition in conditions], field.name)
        for field in dataclasses.fields(first)  # type: ignore[arg-type]
    }
    return type(first)(**joined)


def _join(values: Sequence[Any], name: str) -> Any:
    given = [value for value in values if value is not None]
    if not given:
        return None
    if len(given) < len(values):
        raise ValueError(f"{name} is given in some of the conditions and None in others")
    if isinstance(given[0], Tensor):
        return torch.cat(given)
    if isinstance(given[0], tuple):  # of tensors and None, one for each block of a network
        lengths = {len(value) for value in given}
        if len(lengths) > 1:
            raise ValueError(f"{name} has {min(lengths)} entries in one condition, others more")
        return tuple(
            _join(entries, f"{name}[{index}]")
            for index, entries in enumerate(zip(*given, strict=True))
        )
    return given[0]  # the same constant in all of them, such as a size
