"""``python -m cascade.tools describe PATH...``, ``convert``, ``convert-lora`` and ``average``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.command import Parser, parse_all
from cascade.errors import run_main


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="python -m cascade.tools",
        description="Look into files of weights, convert and average them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    describe = commands.add_parser(
        "describe", help="say what files of weights are, whatever their names"
    )
    describe.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a file, or a folder to search"
    )
    convert = commands.add_parser("convert", help="write a model in another layout")
    convert.add_argument("model", type=Path, metavar="MODEL", help="its folder, or a single file")
    convert.add_argument(
        "--to",
        choices=("ours", "original", "diffusers"),
        required=True,
        help="our model folder, the authors' single files (which ComfyUI reads), or diffusers; of "
        "U-Nets the first and the last are the same, but for students that diffusers can't build, "
        "which it refuses and ours takes",
    )
    convert.add_argument("--out", type=Path, required=True, help="new folder")
    convert.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s"
    )
    lora = commands.add_parser("convert-lora", help="write a LoRA of a U-Net by other names")
    lora.add_argument("file", type=Path, metavar="FILE", help="its file")
    lora.add_argument(
        "--to",
        choices=("peft", "kohya"),
        required=True,
        help="PEFT's names, as diffusers writes, or kohya's, which ComfyUI and others read",
    )
    lora.add_argument("--out", type=Path, required=True, help="file to write")
    lora.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="the model that it is for (default: a published one, if its names tell which)",
    )
    average = commands.add_parser("average", help="write the mean of files of one network")
    average.add_argument("files", nargs="+", type=Path, metavar="FILE", help="files of weights")
    average.add_argument(
        "--weights",
        nargs="+",
        type=float,
        required=True,
        metavar="W",
        help="each file's share; they sum to 1",
    )
    average.add_argument("--out", type=Path, required=True, help="file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand."""
    options = parse_all(make_parser(), sys.argv[1:] if argv is None else argv)
    # torch takes a second to import: only when there is something to do.
    if options.command == "describe":
        from cascade.tools.describe import describe_path

        blocks = [
            "\n".join(description.lines())
            for path in options.paths
            for description in describe_path(path)
        ]
        print("\n".join(blocks))
        return 0
    if options.command == "average":
        from cascade.tools.average import average

        average(options.files, options.weights, options.out)
        print(options.out)
        return 0
    if options.command == "convert-lora":
        from cascade.tools.convert_lora import convert_lora

        convert_lora(options.file, options.to, options.out, options.model)
        print(options.out)
        return 0
    from cascade.tools.convert import DTYPES, convert

    written = convert(options.model, options.to, options.out, DTYPES[options.dtype])
    for path in written.files:
        print(path)
    for notice in written.notices:
        print(f"notice: {notice}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
