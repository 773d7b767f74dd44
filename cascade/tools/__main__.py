"""``python -m cascade.tools describe PATH...`` and ``convert``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import run_main


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m cascade.tools",
        description="Look into files of weights.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser(
        "describe", help="say what files of weights are, whatever their names"
    )
    describe.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder to search"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand."""
    options = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    from cascade.tools.describe import describe_path  # torch takes a second to import

    blocks = [
        "\n".join(description.lines())
        for path in options.paths
        for description in describe_path(path)
    ]
    print("\n".join(blocks))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
