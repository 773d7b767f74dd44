"""Signals end a run."""

from __future__ import annotations

import signal

import pytest

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
