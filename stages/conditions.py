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
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(first):  # type: ignore[arg-type]
        values = [getattr(condition, field.name) for condition in conditions]
        given = [value for value in values if value is not None]
        if not given:
            joined[field.name] = None
        elif len(given) < len(values):
            raise ValueError(f"{field.name} is given in some of the conditions and None in others")
        elif isinstance(given[0], Tensor):
            joined[field.name] = torch.cat(given)
        else:  # the same constant in all of them, such as a size
            joined[field.name] = given[0]
    return type(first)(**joined)
