"""Train one network: ``python -m train stage_c --config configs/demo/stage_c.yaml``.

Every key of the configuration can be set on the command line: ``--optim.lr 3e-4``.
``--resume`` goes on from the newest whole checkpoint of the run's folder, or starts if there is
none: the same command begins a run and goes on with it however it ended.
``--data.mode exact`` or ``resampled`` streams a set of any size; ``python -m train.data check``
looks at it first.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cascade.command import Parser
from cascade.config import load_yaml, parse_overrides
from cascade.errors import run_main

KINDS = ("clip", "stage_a", "compressor", "stage_b", "stage_c", "previewer")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our options and overrides of the configuration."""
    parser = Parser(
        prog="python -m train",
        description="Train one network of the cascade.",
        epilog="Any key of the configuration is an option too: --optim.lr 3e-4 --run.max_steps 10",
    )
    parser.add_argument("kind", choices=KINDS, help="which network")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's newest checkpoint; start if there is none",
    )
    options, rest = parser.parse_known_args(argv)
    return options, parse_overrides(rest)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, fit."""
    options, overrides = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Lightning and transformers take seconds to import: only when a run really starts.
    from train import runs

    kinds: dict[str, tuple[type[Any], Callable[..., None]]] = {
        "clip": (runs.ClipRun, runs.train_clip),
        "stage_a": (runs.StageARun, runs.train_stage_a),
        "compressor": (runs.CompressorRun, runs.train_compressor),
        "stage_b": (runs.StageBRun, runs.train_stage_b),
        "stage_c": (runs.StageCRun, runs.train_stage_c),
        "previewer": (runs.PreviewerRun, runs.train_previewer),
    }
    run_class, start = kinds[options.kind]
    start(load_yaml(run_class, options.config, overrides), resume=options.resume)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
