"""What a model costs to run, and what training it cost: ``python -m cascade.evaluate cost``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.command import Parser
from cascade.errors import UserError

if TYPE_CHECKING:
    from cascade.evaluate.cost import InferenceCost
    from cascade.evaluate.generate import PictureMaker

PROMPT = "a 3D render of a red apple"


def make_cost_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="python -m cascade.evaluate cost",
        description="What a model costs to run, and what its training cost by its runs' ledgers.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder, file or name on the hub")
    parser.add_argument("--unet", type=Path, metavar="FILE", help="in place of the model's own")
    parser.add_argument(
        "--protocol", type=Path, metavar="FILE", help="size and sampling; default the model's own"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="batches; default 2")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="of the model (default auto)")
    parser.add_argument(
        "--ledgers", type=Path, nargs="+", default=[], metavar="RUN", help="runs that made it"
    )
    parser.add_argument(
        "--teacher", type=Path, nargs="+", default=[], metavar="RUN", help="runs of its teacher"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what --model costs there")
    parser.add_argument("--price", type=float, metavar="X", help="of a device hour, in any money")
    return parser


def show_cost(options: argparse.Namespace) -> int:
    """Measure, add up, print."""
    for name in ("batch_size", "warm_up", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if options.price is not None and not 0 <= options.price < float("inf"):
        raise UserError(f"--price is {options.price:g}; a price is not negative, and finite")
    if options.model is None and not options.ledgers:
        raise UserError("nothing to measure: give --model, --ledgers, or both")
    if options.json is not None and options.model is None:
        raise UserError("--json writes what a model costs to run: give --model")
    if options.teacher and not options.ledgers:
        raise UserError("--teacher stands beside the runs of a model: give these with --ledgers")
    from cascade.evaluate.training_cost import cost_table, training_cost

    # What is wrong with a ledger is told now, not after the measurement.
    training = training_cost(options.ledgers, options.teacher)
    if options.model is not None:
        print(_inference(options))
    if options.ledgers:
        print(cost_table(training, options.price))
    return 0


def cost_of(
    maker: PictureMaker,
    *,
    batch_size: int = 1,
    warm_up: int = 2,
    repeats: int = 10,
    file: Path | None = None,
) -> InferenceCost:
    """Measure what a model's pictures cost.

    Args:
        maker: The model, and how it is asked.
        batch_size: Pictures made together.
        warm_up: Batches before the clock runs.
        repeats: Batches on the clock.
        file: JSON file to write as well.
    """
    from cascade.checkpoints.files import atomic_write_text
    from cascade.evaluate.cost import measure_inference
    from cascade.evaluate.generate import Item, Refused
    from cascade.evaluate.provenance import commit, machine

    pipeline = maker.load()
    items = [Item(str(seed), PROMPT, seed) for seed in range(batch_size)]

    def draw() -> Mapping[str, float]:
        pictures = []
        for _, made in maker.make(items, batch_size=batch_size):
            if isinstance(made, Refused):
                raise UserError(f"{maker.options.model}: a picture is none, for {made.reason}")
            pictures.append(made)
        stages = pictures[0].seconds
        return {name: sum(picture.seconds[name] for picture in pictures) for name in stages}

    cost = measure_inference(pipeline, draw, batch_size, warm_up=warm_up, repeats=repeats)
    if file is not None:
        where = {"commit": commit(), "machine": machine(pipeline.device)}
        text = json.dumps({**dataclasses.asdict(cost), **where}, indent=1)
        atomic_write_text(file, text + "\n")
    return cost


def _inference(options: argparse.Namespace) -> str:
    from cascade.evaluate.drawn import maker_of
    from cascade.evaluate.protocol import load_protocol
    from cascade.evaluate.provenance import commit, machine

    protocol = None if options.protocol is None else load_protocol(options.protocol)
    maker = maker_of(
        options.model, protocol, unet=options.unet, device=options.device, dtype=options.dtype
    )
    pipeline = maker.load()
    count = options.batch_size
    cost = cost_of(
        maker,
        batch_size=count,
        warm_up=options.warm_up,
        repeats=options.repeats,
        file=options.json,
    )
    head = (
        f"{pipeline.spec.name} {pipeline.weights_hash}, {pipeline.dtypes}, batch {count}, "
        f"{options.repeats} repeats after {options.warm_up}; commit {commit()}, "
        f"{machine(pipeline.device)}"
    )
    return f"{head}\n\n{inference_table(cost)}\n"


def inference_table(cost: InferenceCost) -> str:
    """Return parameters, FLOPs and seconds by part, and memory and energy under them."""
    from cascade.evaluate.results import markdown_table, number_text

    names = list(dict.fromkeys([*cost.parameters, *cost.flops, *cost.seconds]))
    lines = []
    for name in sorted(names, key=lambda name: name == "all"):
        parameters, flops = cost.parameters.get(name), cost.flops.get(name)
        if name == "all":
            parameters, flops = sum(cost.parameters.values()), sum(cost.flops.values())
        seconds = cost.seconds.get(name)
        lines.append(
            [
                name,
                "-" if parameters is None else f"{parameters:,}",
                "-" if flops is None else f"{flops / 1e9:,.3f}",
                "-" if seconds is None else number_text(seconds.median),
                "-"
                if seconds is None
                else f"{number_text(seconds.lower)} to {number_text(seconds.upper)}",
            ]
        )
    columns = ["part", "parameters", "GFLOPs", "seconds, median", "quartiles"]
    peak, energy = cost.peak_memory_bytes, cost.energy_j
    return "\n".join(
        [
            markdown_table(columns, lines),
            "",
            f"weights: {cost.weights_bytes / 2**20:,.0f} MiB; peak memory above them: "
            f"{'unknown' if peak is None else f'{peak / 2**20:,.0f} MiB'}; energy of a batch: "
            f"{'unknown' if energy is None else f'{energy:,.1f} J'}",
        ]
    )
