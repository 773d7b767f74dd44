"""Studies: ``python -m train.study budget --config configs/study/smoke.yaml``.

``budget`` compares ways to a model under one budget, on the same devices, data and protocol;
``compression`` compares sizes of Stage C's latents, each with a compressor and Stage B of its own.
``worth`` sets the arms of finished runs beside what as many operations buy without a teacher.
``cost`` counts, without weights or data, what a study would take on devices whose rate is known.
``--dry-run`` tries a few steps of each training and prints the plan with estimated seconds.
A study that was stopped goes on with the same command; it also writes the report again.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cascade.command import Parser
from cascade.config import load_yaml, parse_overrides, read_yaml
from cascade.errors import UserError, run_main
from cascade.evaluate.protocol import load_protocol
from cascade.launchers import Part

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
        kind.add_argument(
            "--join",
            type=Path,
            nargs="+",
            default=(),
            metavar="FOLDER",
            help="take the finished runs of these folders first: the same study with other seeds, "
            "made elsewhere",
        )
    cost = kinds.add_parser("cost", help="what a study would take on devices of a known rate")
    cost.add_argument("--config", required=True, help="YAML file of a study of either kind")
    cost.add_argument(
        "--rates", required=True, help="YAML file of devices, such as configs/study/sdxl/rates.yaml"
    )
    worth = kinds.add_parser("worth", help="what arms' teachers are worth, from finished runs")
    worth.add_argument(
        "--study", type=Path, nargs="+", required=True, metavar="FOLDER", help="studies' folders"
    )
    worth.add_argument(
        "--baseline", required=True, help="arm without a teacher, of several budgets"
    )
    worth.add_argument("--metrics", nargs="+", default=(), help="figures (default: all)")
    return parser


def check_started_once() -> None:
    """Refuse to be one of a launcher's processes: each would run the whole study.

    Raises:
        UserError: Saying what to do.
    """
    processes = Part.of_environment().count
    if processes > 1:
        raise UserError(
            f"{processes} processes of train.study were started; start it once, plainly, and name "
            "what starts its trainings as launcher in its file: [torchrun, --nproc_per_node, '8'] "
            "or [srun, python]"
        )


def _print_cost(path: str, overrides: Sequence[str], rates: str) -> int:
    """Print what a study would cost."""
    from train.study.cost import cost_lines, load_rates
    from train.study.rates import load_compression
    from train.study.settings import StudyConfig

    devices = load_rates(rates)
    if "arm" in read_yaml(path):
        compression = load_compression(path, overrides)
        study, image_size = compression.study, compression.sweep.image_size
    else:
        study = load_yaml(StudyConfig, path, overrides)
        image_size = load_protocol(study.judge.protocol).generated_size
    print("\n".join(cost_lines(study, image_size, devices)))
    return 0


def _print_worth(folders: Sequence[Path], baseline: str, metrics: Sequence[str]) -> int:
    """Print what teachers are worth."""
    from train.study.page import to_markdown
    from train.study.worth import read_finished, worth_blocks

    print(to_markdown(worth_blocks(read_finished(folders), baseline, metrics)), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, say how it went."""
    parser = make_parser()
    options, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.kind == "worth":
        if rest:
            parser.error(f"worth reads no configuration: {rest[0]}")
        return _print_worth(options.study, options.baseline, options.metrics)
    check_started_once()
    # Lightning takes seconds to import.
    from train.study.budget import run_study
    from train.study.compression import run_compression
    from train.study.rates import load_compression
    from train.study.settings import StudyConfig
    from train.study.steps import StudyStoppedError

    overrides = parse_overrides(rest)
    if options.kind == "cost":
        return _print_cost(options.config, overrides, options.rates)
    run: Callable[[Path], int]
    if options.kind == "compression":
        compression = load_compression(options.config, overrides)
        name, run = (
            compression.study.name,
            lambda out: run_compression(
                compression, out, dry_run=options.dry_run, others=options.join
            ),
        )
    else:
        config = load_yaml(StudyConfig, options.config, overrides)
        name, run = (
            config.name,
            lambda out: run_study(config, out, dry_run=options.dry_run, others=options.join),
        )
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
