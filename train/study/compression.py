"""The trade-off of compression rates: each rate is an arm of a budget study, judged twice.

Beside what the budget study says of a model's pictures, each run has its reconstructions judged:
pictures through the compressor, Stage B and Stage A. Neither changes after Stage B's training, so
that is done once a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade.config import to_dict
from cascade.evaluate.protocol import load_protocol
from cascade.evaluate.results import check_alike, read_rows
from train.study.budget import Kind, Run, run_study
from train.study.checks import check_judge
from train.study.compression_report import Row, write_compression_report
from train.study.judge import COST_FILE, FIGURES_FILE, figure_of, judge_options
from train.study.rates import CompressionConfig
from train.study.reconstruct import NOTE_FILE, PICTURES
from train.study.spent import read_ledger, spent_until
from train.study.steps import Commands, StepFailedError

ORIGINALS = "originals"
"""Folder, in what the study shares, of the pictures that are reconstructed."""


def run_compression(
    config: CompressionConfig, out: Path, *, dry_run: bool = False, others: Sequence[Path] = ()
) -> int:
    """Run a compression study, or go on with it; print its plan, write its report.

    Args:
        config: The study.
        out: Its folder.
        dry_run: Print the plan and stop.
        others: See ``run_study``.

    Returns:
        How many runs have failed.

    Raises:
        UserError: The folder holds another study, or the budget buys nothing.
        StudyStoppedError: SIGTERM; what was done stays.
    """

    def judge_more(run: Run, model: Path, commands: Commands) -> dict[str, Any]:
        return judge_run(config, run, model, commands)

    def report(rows: Sequence[Row], out: Path, given: Mapping[str, Mapping[str, str]]) -> None:
        judged = [row for row in rows if row["status"] == "judged"]
        names = [f"reconstructions of {row['arm']}, seed {row['seed']}" for row in judged]
        check_alike([row["reconstruction"] for row in judged], names)
        write_compression_report(config, rows, out, given=given)

    check_judge(config.sweep.reconstruction.judge(config.study.judge), "reconstruction")
    asked = {**to_dict(config.study), **to_dict(config.sweep)}
    kind = Kind(asked, judge_more, report)
    return run_study(config.study, out, dry_run=dry_run, kind=kind, others=others)


def judge_run(
    config: CompressionConfig, run: Run, model: Path, commands: Commands
) -> dict[str, Any]:
    """Return what a run's row says beside a budget study's.

    Raises:
        StepFailedError: Pictures can't be reconstructed, or its latents are not its rate's.
        StudyStoppedError: The study is to end.
    """
    folder = run.places.here / "reconstruction"
    options = config.sweep.reconstruction
    judge = options.judge(config.study.judge)
    real = options.real.format(shared=run.places.shared)
    device = ["--device", config.study.device]
    if not (folder / NOTE_FILE).is_file():
        words = ["--model", str(model), "--real", real, "--out", str(folder)]
        words += ["--size", str(load_protocol(options.protocol).generated_size)]
        words += ["--count", str(options.count), *device]
        words += ["--originals", str(run.places.shared / ORIGINALS)]
        commands.module(
            "train.study.reconstruct", words, folder / "reconstruct.log", "reconstructions"
        )
    if not (folder / FIGURES_FILE).is_file():
        words = ["--protocol", options.protocol, "--pictures", str(folder / PICTURES)]
        words += ["--out", str(folder), "--name", run.arm.name, *device]
        words += judge_options(judge, run.places.shared)
        commands.module(
            "cascade.evaluate", words, folder / "evaluate.log", "figures of reconstructions"
        )
    note = json.loads((folder / NOTE_FILE).read_text(encoding="utf-8"))
    rate = config.on_curve.get(run.arm.name)
    if rate is not None and note["latent_shape"] != [rate.channels, rate.grid, rate.grid]:
        raise StepFailedError(
            f"its latents are {'x'.join(map(str, note['latent_shape']))}, and the rate says "
            f"{rate.channels}x{rate.grid}x{rate.grid}"
        )
    figures = read_rows(folder / FIGURES_FILE)
    cost = json.loads((model.parent / COST_FILE).read_text(encoding="utf-8"))
    study = run.places.here.parents[3]
    return {
        "latents": {"shape": note["latent_shape"], "bytes": note["latent_bytes"]},
        "reconstruction": {
            "metrics": {row["metric"]: figure_of(row) for row in figures},
            "protocol_hash": figures[0]["protocol_hash"],
            "protocol": figures[0]["protocol"],
            "pictures": str((folder / PICTURES).relative_to(study)),
            "pictures_per_second": note["pictures_per_second"],
        },
        "training": _training(run),
        "stage_seconds": {name: spread["median"] for name, spread in cost["seconds"].items()},
    }


def _training(run: Run) -> dict[str, dict[str, float | None]]:
    """Return what each training saw, and how fast."""
    found = {}
    for step in run.arm.steps:
        if step.train is None:
            continue
        spent = spent_until(read_ledger(run.places.here / step.name))
        found[step.name] = {
            "samples": spent.samples,
            "samples_per_second": spent.samples / spent.device_seconds
            if spent.device_seconds > 0
            else None,
            "flops": spent.flops,
        }
    return found
