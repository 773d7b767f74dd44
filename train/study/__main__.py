"""Studies: ``python -m train.study budget --config configs/study/smoke.yaml``.

``budget`` compares ways to a model under one budget, on the same devices, data and protocol;
``compression`` compares sizes of Stage C's latents, each with a compressor and Stage B of its own.
``--dry-run`` tries a few steps of each training and prints the plan with estimated seconds.
A study that was stopped goes on with the same command; it also writes the report again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
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
    for name, what in (
        ("budget", "arms under one budget"),
        ("compression", "one arm at several compression rates"),
    ):
        kind = kinds.add_parser(name, help=what)
        kind.add_argument("--config", required=True, help="YAML file of the study")
        kind.add_argument("--out", type=Path, help="folder (default: runs/study/NAME)")
        kind.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, say how it went."""
    options, rest = make_parser().parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Lightning takes seconds to import.
    from train.study.budget import run_study
    from train.study.compression import run_compression
    from train.study.rates import load_compression
    from train.study.settings import StudyConfig
    from train.study.steps import StudyStoppedError

    overrides = parse_overrides(rest)
    run: Callable[[Path], int]
    if options.kind == "compression":
        compression = load_compression(options.config, overrides)
        name, run = (
            compression.study.name,
            lambda out: run_compression(compression, out, dry_run=options.dry_run),
        )
    else:
        config = load_yaml(StudyConfig, options.config, overrides)
        name, run = config.name, lambda out: run_study(config, out, dry_run=options.dry_run)
    out = options.out or Path("runs/study") / name
    try:
        failed = run(out)
    except StudyStoppedError:
        _log.info("stopped: all is saved, the same command goes on")
        return 0
    if failed:
        _log.error("%d of the runs failed; the report says which and why", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
