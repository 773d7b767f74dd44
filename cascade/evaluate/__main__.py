"""Measure pictures: ``python -m cascade.evaluate --protocol FILE --pictures FOLDER --real FOLDER``.

``python -m cascade.evaluate table A.jsonl B.jsonl`` puts results of one protocol side by side, and
``python -m cascade.evaluate cost --model M`` measures what pictures cost.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.command import Parser, parse_all
from cascade.cpu_memory import tune_cpu_memory
from cascade.errors import UserError, run_main
from cascade.evaluate.cost_command import cost_of, make_cost_parser, show_cost

DEMO_CLIP = "weights/demo/text"


def make_parser() -> Parser:
    """Return the parser of the command that measures."""
    parser = Parser(
        prog="python -m cascade.evaluate",
        description="Measure pictures by a protocol, from a folder or from a model.",
        epilog="python -m cascade.evaluate table A.jsonl B.jsonl puts results of one protocol side "
        "by side.",
        allow_abbrev=False,
    )
    parser.add_argument("--protocol", type=Path, required=True, metavar="FILE", help="YAML file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="pictures, or .tar shards, named by key"
    )
    source.add_argument("--model", help="model that draws them: folder, file or name on the hub")
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="pictures, or .tar shards")
    parser.add_argument(
        "--prompts", type=Path, metavar="PLACE", help=".txt, .jsonl, .tsv, COCO's .json, or shards"
    )
    parser.add_argument(
        "--features",
        metavar="PLACE",
        help=f"the protocol's feature network (of a CLIP the default is {DEMO_CLIP})",
    )
    parser.add_argument(
        "--clip", default=DEMO_CLIP, metavar="PLACE", help="folder or hub (default %(default)s)"
    )
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="AlexNet or VGG of torchvision")
    parser.add_argument("--unet", type=Path, metavar="FILE", help="in place of the model's own")
    parser.add_argument(
        "--cost", type=Path, metavar="FILE", help="also measure what a picture costs, as JSON there"
    )
    parser.add_argument("--name", help="what tables call the pictures (default: model or folder)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluate"), help="folder (default %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="of the model (default auto)")
    parser.add_argument(
        "--int8", action="store_true", default=None, help="keep its linear layers in int8"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures drawn together")
    return parser


def make_table_parser() -> Parser:
    """Return the parser of the command that compares."""
    parser = Parser(
        prog="python -m cascade.evaluate table",
        description="Put results of one protocol side by side; unlike protocols are refused.",
        allow_abbrev=False,
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="RESULTS.jsonl")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure or compare, and print."""
    words = list(sys.argv[1:] if argv is None else argv)
    tune_cpu_memory()
    if words[:1] == ["table"]:
        return compare(parse_all(make_table_parser(), words[1:]).files)
    if words[:1] == ["cost"]:
        return show_cost(parse_all(make_cost_parser(), words[1:]))
    hint = "to compare results, 'table' comes first; "
    return measure(parse_all(make_parser(), words, stray=hint))


def compare(files: Sequence[Path]) -> int:
    """Print the results of all files in one table."""
    from cascade.evaluate.results import comparison, read_rows

    found = [
        (row, f"{path} ({row['model']}, {row['protocol_hash']})")
        for path in files
        for row in read_rows(path)
    ]
    print(comparison([row for row, _ in found], [name for _, name in found]))
    return 0


def measure(options: argparse.Namespace) -> int:
    """Measure, print a table, and append the figures to ``results.jsonl``."""
    if options.batch_size is not None and options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    for name in ("unet", "batch_size", "cost", "int8"):
        if options.model is None and getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --model, not for --pictures")
    # Not before the command line is read: torch takes seconds.
    from cascade.evaluate.drawn import draw_pictures, maker_of
    from cascade.evaluate.measure import Judge
    from cascade.evaluate.picture_sets import open_set
    from cascade.evaluate.protocol import PROMPTED, load_protocol
    from cascade.evaluate.results import append_rows, table
    from cascade.evaluate.yardsticks import load_yardsticks
    from cascade.launchers import Part
    from cascade.pipelines.placement import pick_device

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    protocol = load_protocol(options.protocol)
    part = Part.of_environment()
    if part.number > 0 and options.model is None:
        return 0  # --pictures are measured once
    named_device = part.device(options.device)
    device = pick_device(named_device)
    asks = bool(set(protocol.metrics) & PROMPTED) or protocol.prompts.inline or options.model
    # Reconstructions, for one, have keys and no prompts.
    prompts = protocol.read_prompts(options.prompts) if asks or options.prompts else []
    real = None
    if options.real is not None:
        real = open_set(options.real, protocol.size, protocol.resize, protocol.real_format)
    features = options.features
    if features is None and protocol.features.kind == "clip":
        features = options.clip
    yardsticks = load_yardsticks(
        protocol, features=features, clip=options.clip, lpips=options.lpips, device=device
    )
    judge = Judge(protocol, yardsticks, prompts, real)
    if part.number == 0 and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out}: is a file; name a folder")
    folder, model, sampling = options.pictures, str(options.pictures), None
    if options.model is not None:
        maker = maker_of(
            options.model,
            protocol,
            unet=options.unet,
            device=named_device,
            dtype=options.dtype,
            int8=bool(options.int8),
        )
        if options.cost is not None and part.number == 0:
            cost_of(maker, file=options.cost)
        drawn = draw_pictures(
            maker, prompts, protocol, options.out / "pictures", part, options.batch_size
        )
        if part.number > 0:
            print(f"process {part.number} of {part.count} made its share; process 0 measures")
            return 0
        drawn.wait()
        folder, model, sampling = drawn.folder, drawn.model, maker.sampling()
    pictures = open_set(
        folder, protocol.size, protocol.resize, protocol.picture_format, protocol.generated_size
    )
    if options.model is not None:  # a model's folder may hold pictures of other prompts as well
        pictures = pictures.select([prompt.key for prompt in prompts])
    results = judge(pictures, model=options.name or model, sampling=sampling)
    path = options.out / "results.jsonl"
    print(table(results), flush=True)
    append_rows(path, results.rows())
    print(f"wrote {len(results.figures)} lines to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
