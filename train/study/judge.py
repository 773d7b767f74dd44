"""What a model is worth and what it costs: the protocol's figures, and the cost of a picture.

Both are measured by ``python -m cascade.evaluate``, in a process of its own: what a model needs of
memory and time is not mixed with what this one holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade.errors import UserError
from cascade.evaluate.protocol import load_protocol
from cascade.evaluate.results import read_rows
from train.study.checks import figure_names
from train.study.settings import JudgeConfig, StudyConfig
from train.study.steps import Commands

LOWER = frozenset({"frechet", "kernel", "mmd", "lpips"})
"""Metrics of which less is better; of all others more is."""
_KEPT = (
    *("value", "label", "real", "num_pictures", "num_reference", "spread", "low", "high"),
    *("uncertainty", "notes", "yardstick", "yardstick_weights"),
)
FIGURES_FILE = "results.jsonl"
COST_FILE = "cost.json"


def judge(config: StudyConfig, folder: Path, shared: Path, commands: Commands) -> dict[str, Any]:
    """Measure the model in ``folder/model``, or read what was measured before.

    Args:
        config: The study.
        folder: Of this moment.
        shared: What ``{shared}`` means.
        commands: Runs it.

    Returns:
        ``metrics`` (name -> :func:`figure_of`), the protocol and its hash, ``sampling``,
        ``pictures`` (their folder) and ``cost``.

    Raises:
        StepFailedError: It can't be measured.
        StudyStoppedError: The study is to end.
    """
    figures, cost = folder / FIGURES_FILE, folder / COST_FILE
    model = folder / "model"
    options = judge_options(config.judge, shared)
    if not _is_whole(figures, config.judge.protocol):
        figures.unlink(missing_ok=True)
        words = ["--protocol", config.judge.protocol, "--model", str(model), "--out", str(folder)]
        words += ["--device", config.device, "--cost", str(cost), *options]
        log, launcher = folder / "evaluate.log", config.judge.launcher
        commands.module("cascade.evaluate", words, log, "figures and cost", launcher)
    rows = read_rows(figures)
    return {
        "metrics": {row["metric"]: figure_of(row) for row in rows},
        "protocol_hash": rows[0]["protocol_hash"],
        "protocol": rows[0]["protocol"],
        "sampling": rows[0]["sampling"],
        "pictures": str(folder / "pictures"),
        "cost": _cost(json.loads(cost.read_text(encoding="utf-8"))),
    }


def _is_whole(figures: Path, protocol: str) -> bool:
    """Return whether all figures of a protocol are there; a kill may have cut their file."""
    if not figures.is_file():
        return False
    try:
        found = {row["metric"] for row in read_rows(figures)}
    except UserError:
        return False
    return found >= set(figure_names(load_protocol(protocol)))


def figure_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a study keeps of a figure: all that one needs to believe it."""
    kept = {name: row[name] for name in _KEPT}
    return {**kept, "better": "lower" if row["metric"] in LOWER else "higher"}


def _cost(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a picture costs, made alone."""
    peak, latency = measured["peak_memory_bytes"], measured["seconds"]["all"]
    return {
        "parameters": sum(measured["parameters"].values()),
        "gflops": sum(measured["flops"].values()) / 1e9,
        "latency_s": latency["median"],
        "latency_quartiles_s": [latency["lower"], latency["upper"]],
        "weights_mib": measured["weights_bytes"] / 2**20,
        "peak_memory_mib": None if peak is None else (measured["weights_bytes"] + peak) / 2**20,
        "energy_j": measured["energy_j"],
    }


def judge_options(config: JudgeConfig, shared: Path) -> list[str]:
    """Return the places of what a protocol measures with, as ``cascade.evaluate`` takes them."""
    named = {
        "--real": config.real,
        "--prompts": config.prompts,
        "--features": config.features,
        "--clip": config.clip,
        "--lpips": config.lpips,
    }
    given = {key: value for key, value in named.items() if value is not None}
    return [word for key, value in given.items() for word in (key, value.format(shared=shared))]
