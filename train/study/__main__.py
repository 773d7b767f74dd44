"""Studies: ``python -m train.study budget --config configs/study/smoke.yaml``.

``budget`` compares ways to a model under one budget, on the same devices, data and protocol.
``--dry-run`` tries a few steps of each training and prints the plan with estimated seconds.
A study that was stopped goes on with the same command; it also writes the report again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.command import Parser
from cascade.config import load_yaml, parse_overrides
from cascade.errors import run_main

_log = logging.getLogger(__name__)


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="python -m train.study",
        description="Compare ways to a model under one budget.",
        epilog="Any key of the configuration is an option too: --seeds '[0]'",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    budget = kinds.add_parser("budget", help="arms under one budget")
    budget.add_argument("--config", required=True, help="YAML file of the study")
    budget.add_argument("--out", type=Path, help="folder (default: runs/study/NAME)")
    budget.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, say how it went."""
    options, rest = make_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Lightning takes seconds to import.
    from train.study.budget import run_study
    from train.study.settings import StudyConfig
    from train.study.steps import StudyStoppedError

    config = load_yaml(StudyConfig, options.config, parse_overrides(rest))
    out = options.out or Path("runs/study") / config.name
    try:
        failed = run_study(config, out, dry_run=options.dry_run)
    except StudyStoppedError:
        _log.info("stopped: all is saved, the same command goes on")
        return 0
    if failed:
        _log.error("%d of the runs failed; the report says which and why", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
