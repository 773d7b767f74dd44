"""Signals end a run."""

from __future__ import annotations

import contextlib
import logging
import signal

import pytest
from lightning.pytorch import LightningModule, Trainer

from train.callbacks.stop import Stop, StopAtOnce


def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not():
    stop = Stop(None)
    stop._on_signal(signal.SIGINT, None)
    with pytest.raises(StopAtOnce):
        stop._on_signal(signal.SIGINT, None)
    stop = Stop(None)
    for _ in range(3):
        stop._on_signal(signal.SIGTERM, None)
    assert stop.interrupted_by == "SIGTERM"
    stop._on_signal(signal.SIGINT, None)
    assert stop.interrupted_by == "SIGTERM", "it was asked for before"
    with pytest.raises(StopAtOnce):
        stop._on_signal(signal.SIGINT, None)


def test_the_answer_to_what_is_said_may_come_at_once():
    stop = Stop(max_minutes=None)

    class Impatient(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stop._on_signal(signal.SIGINT, None)

    log = logging.getLogger("train.callbacks.stop")
    user, level = Impatient(), log.level
    log.addHandler(user)
    log.setLevel(logging.INFO)
    try:
        with pytest.raises(StopAtOnce):
            stop._on_signal(signal.SIGINT, None)
    finally:
        log.removeHandler(user)
        log.setLevel(level)


def test_a_second_ctrl_c_that_python_dropped_ends_the_next_micro_batch():
    stop = Stop(max_minutes=None)
    stop._on_signal(signal.SIGINT, None)
    with contextlib.suppress(StopAtOnce):
        stop._on_signal(signal.SIGINT, None)
    with pytest.raises(StopAtOnce):
        stop.on_train_batch_end(Trainer(), LightningModule(), None, None, 0)
