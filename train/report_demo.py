"""Measure the demonstration cascade: ``python -m train.report_demo --shards data/demo``.

Prints the figures of the model card and writes them to the folder of ``--out``:
``report.md``, ``report.json`` and ``sheet.png``. Pictures that the model makes are kept under
``--out``, so an interrupted run goes on where it stopped when the same command is run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_write_bytes, atomic_write_text
from cascade.checkpoints.hub import ModelFiles
from cascade.command import Parser, parse_all
from cascade.config import not_among
from cascade.errors import UserError, run_main
from cascade.evaluate.clip_scorer import ClipScorer
from cascade.evaluate.sheet import SheetLayout, contact_sheet
from cascade.images import pixels_to_images, save_png
from cascade.pipelines.cascade import GPU_BATCH_SIZE, CascadePipeline
from cascade.pipelines.placement import pick_device, pick_dtype
from cascade.pipelines.unet import UNetPipeline
from cascade.pipelines.unet_parts import is_unet
from cascade.pipelines.unet_plan import UNetSettings
from train.study.demo_figures import (
    Figures,
    measure_agreement,
    measure_reconstruction,
    measure_sizes,
)
from train.study.demo_markdown import to_markdown
from train.study.held_out import Split, read_folder, read_splits
from train.study.pictures import PictureStore
from train.study.provenance import describe_run

_log = logging.getLogger(__name__)

CARD_MARKS = ("<!-- figures -->", "<!-- /figures -->")
PARTS = ("sizes", "reconstruction", "retrieval", "sheet")
DEMO_YARDSTICK = Path("weights/demo/text")
SHEET_PROMPTS = Path(__file__).parents[1] / "configs" / "demo" / "sheet_prompts.txt"


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="python -m train.report_demo",
        description="Measure a demonstration on held-out pictures: the cascade, or a U-Net.",
        epilog="Run the same command again to go on with an interrupted run.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, default=Path("weights/demo"), help="model folder")
    parser.add_argument(
        "--unet", type=Path, metavar="FILE", help="this U-Net in place of the model's own"
    )
    parser.add_argument(
        "--yardstick",
        type=Path,
        metavar="FOLDER",
        help="CLIP with both towers that judges prompt agreement (default: the model's own text, "
        "of a U-Net weights/demo/text)",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        help="folder with the shards of all splits (searched for *.tar); "
        "needed for reconstruction and retrieval",
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="figures to make, of %(default)s (default: all)"
    )
    parser.add_argument(
        "--prompts", type=int, default=200, help="prompts asked of each split (default 200)"
    )
    parser.add_argument(
        "--candidates", type=int, default=100, help="prompts to choose among (default 100)"
    )
    parser.add_argument(
        "--sheet-prompts", type=Path, default=SHEET_PROMPTS, help="text file, a prompt a line"
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds everything (default 0)")
    parser.add_argument(
        "--batch-size",
        type=int,
        help="pictures made together; with 1, the default on a CPU, a picture is bit by bit the "
        "one that sample.py makes of its prompt and seed",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument(
        "--dtype", default="auto", help="auto, float32, bfloat16, float16 (default auto)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="output folder")
    parser.add_argument(
        "--card",
        type=Path,
        metavar="README.md",
        help="also put the figures between the two 'figures' marks of this model card, and the "
        "sheet beside it",
    )
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line and check its numbers.

    Raises:
        UserError: For an unknown option, naming the nearest, and for a number without sense.
    """
    options = parse_all(make_parser(), argv)
    if options.batch_size is None:
        options.batch_size = 1 if pick_device(options.device).type == "cpu" else GPU_BATCH_SIZE
    for name, smallest in (("prompts", 2), ("candidates", 2), ("batch_size", 1), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise UserError(f"--{name.replace('_', '-')} must be at least {smallest}")
    return options


def parse_parts(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list, in the order of :data:`PARTS`.

    Raises:
        UserError: For a name that is none of them.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise not_among("--parts: no part", name, PARTS)
    if not names:
        raise UserError(f"--parts names nothing; valid: {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in names)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file: a prompt a line, without blank lines and comments.

    Raises:
        UserError: If there are none.
    """
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    return prompts


def fill_card(card: str, figures: str, where: str) -> str:
    """Return a model card with ``figures`` between its two marks.

    Raises:
        UserError: If the marks are not there, once each, in order.
    """
    parts = card.split(CARD_MARKS[0])
    if len(parts) != 2 or parts[1].count(CARD_MARKS[1]) != 1:
        raise UserError(f"{where}: needs the lines {CARD_MARKS[0]} and {CARD_MARKS[1]}, once each")
    after = parts[1].split(CARD_MARKS[1])[1]
    return f"{parts[0]}{CARD_MARKS[0]}\n\n{figures}\n{CARD_MARKS[1]}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parts = parse_parts(options.parts)
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.card is not None:  # a card without marks: now, not in an hour
        fill_card(options.card.read_text(encoding="utf-8"), "", str(options.card))
    started_s = time.monotonic()
    dtype = pick_dtype(options.dtype, device)
    provenance = describe_run(
        "train.report_demo", argv, options.seed, options.model, device, dtype, options.unet
    )
    figures = measure(options, parts)
    text = to_markdown(figures, provenance, options.candidates)
    content = {"provenance": asdict(provenance), **asdict(figures)}
    atomic_write_text(options.out / "report.md", text)
    atomic_write_text(options.out / "report.json", json.dumps(content, indent=2) + "\n")
    if options.card is not None:
        # As it is now: somebody may have written in it while this was measured.
        card = options.card.read_text(encoding="utf-8")
        atomic_write_text(options.card, fill_card(card, text, str(options.card)))
        if "sheet" in parts:
            atomic_write_bytes(
                options.card.parent / "sheet.png", (options.out / "sheet.png").read_bytes()
            )
    print(text)
    print(f"wrote {options.out}/report.md in {time.monotonic() - started_s:.0f} s")
    return 0


def measure(options: argparse.Namespace, parts: Sequence[str]) -> Figures:
    """Make the figures of the named parts."""
    figures = Figures()
    if "sizes" in parts:
        figures.sizes = measure_sizes(options.model)
    if parts == ("sizes",):
        return figures
    splits: dict[str, Split] = {}
    if "reconstruction" in parts or "retrieval" in parts:
        splits = _read_shards(options.shards, options.prompts, options.seed)
    measured = _measured(options)
    store = measured.store
    if "reconstruction" in parts:
        figures.reconstruction = measure_reconstruction(
            splits,
            measured.through_autoencoder,
            store if measured.has_stage_b else None,
            options.seed,
        )
    if "retrieval" in parts:
        scorer = ClipScorer.from_folder(measured.yardstick, pick_device(options.device))
        figures.retrieval = []
        for split in splits.values():
            _log.info("prompt agreement of %s", split.name)
            figures.retrieval += measure_agreement(
                split, scorer, store, options.candidates, options.seed
            )
    if "sheet" in parts:
        figures.sheet = _draw_sheet(options, store)
    return figures


def _read_shards(folder: Path | None, num_prompts: int, seed: int) -> dict[str, Split]:
    if folder is None:
        raise UserError("--shards is needed for reconstruction and retrieval: name the folder")
    return read_splits(read_folder(folder), num_prompts, seed)


@dataclass(frozen=True)
class _Measured:
    """A model as the report asks it."""

    store: PictureStore
    through_autoencoder: Callable[[Tensor], Tensor]
    """Pixels to the reconstruction of Stage A, or of a U-Net's autoencoder."""
    has_stage_b: bool
    yardstick: Path


def _measured(options: argparse.Namespace) -> _Measured:
    if is_unet(ModelFiles((options.model,))):
        return _measured_unet(options)
    if options.unet is not None:
        raise UserError("--unet: the model is a cascade, which has none")
    pipeline = CascadePipeline(options.model, device=options.device, dtype=options.dtype)

    def through_stage_a(pixels: Tensor) -> Tensor:
        return pipeline.reconstruct(pixels, through="a").pixels

    return _Measured(
        _make_store(pipeline, options),
        through_stage_a,
        has_stage_b=True,
        yardstick=options.yardstick or options.model / "text",
    )


def _measured_unet(options: argparse.Namespace) -> _Measured:
    pipeline = UNetPipeline.from_pretrained(
        options.model, unet=options.unet, device=options.device, dtype=options.dtype
    )

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        settings = UNetSettings(seeds=list(seeds))
        return pipeline(prompts, settings, batch_size=len(prompts), progress=False).pixels

    @torch.inference_mode()
    def reconstruct(pixels: Tensor) -> Tensor:
        return pipeline.decode(pipeline.autoencoder.encode(pixels.to(pipeline.device))).cpu()

    folder = options.out / "pictures" / f"{pipeline.weights_hash}-{pipeline.dtypes}"
    store = PictureStore(
        folder,
        generate,
        lambda pixels, seeds: reconstruct(pixels),
        options.batch_size,
        "reconstructed",
    )
    return _Measured(
        store, reconstruct, has_stage_b=False, yardstick=options.yardstick or DEMO_YARDSTICK
    )


def _make_store(pipeline: CascadePipeline, options: argparse.Namespace) -> PictureStore:
    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        together = len(prompts)
        return pipeline(prompts, seeds=seeds, batch_size=together, progress=False).pixels

    def reconstruct(pixels: Tensor, seeds: Sequence[int]) -> Tensor:
        return pipeline.reconstruct(pixels, seeds=seeds).pixels

    dtype = str(pipeline.dtypes)
    folder = options.out / "pictures" / f"{pipeline.weights_hash}-{dtype}"
    return PictureStore(folder, generate, reconstruct, options.batch_size)


def _draw_sheet(options: argparse.Namespace, store: PictureStore) -> list[str]:
    prompts = read_prompts(options.sheet_prompts)
    pixels = store.generated(prompts, [options.seed] * len(prompts))
    layout = SheetLayout(cell_px=max(128, pixels.shape[-1]))
    sheet = contact_sheet(pixels_to_images(pixels), prompts, layout)
    save_png(sheet, options.out / "sheet.png")
    return prompts


if __name__ == "__main__":
    sys.exit(run_main(main))
