"""Finds one callback of a run from within another."""

from __future__ import annotations

from typing import TypeVar

from lightning.pytorch import Callback, Trainer

C = TypeVar("C", bound=Callback)


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """Return the run's callback of a class; None: it has none."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, kind)), None)
