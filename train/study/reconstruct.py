"""Pictures through a model's latents and back: ``python -m train.study.reconstruct --model M ...``.

Of a cascade that is the compressor, Stage B and Stage A; of a U-Net, or of a Stage C on an
autoencoder's latents, the autoencoder. What is measured is always what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cascade.checkpoints.files import atomic_write_text
from cascade.command import Parser, parse_all
from cascade.errors import UserError, run_main
from cascade.evaluate.generate import AnyPipeline, MakerOptions, PictureMaker
from cascade.evaluate.picture_sets import PictureSet, open_set
from cascade.evaluate.prompts import seed_of
from cascade.images import pixels_to_images, save_png
from cascade.pipelines.cascade import CascadePipeline

_log = logging.getLogger(__name__)

NOTE_FILE = "reconstruct.json"
"""Written last: shape and bytes of a picture's latents, and the seconds."""
PICTURES = "pictures"
LATENT_BYTES = 2
"""Of a number: caches and shards of latents keep float16."""


def make_parser() -> Parser:
    """Return the command line's parser."""
    parser = Parser(
        prog="python -m train.study.reconstruct",
        description="Pictures through a model's latents and back, as PNG files by key.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder, file or name on the hub")
    parser.add_argument("--real", type=Path, required=True, help="pictures, or .tar shards")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, required=True, help="side of the pictures, in pixels")
    parser.add_argument("--count", type=int, help="pictures, drawn by their keys (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of Stage B's noise")
    parser.add_argument("--originals", type=Path, help="folder for the originals of the same keys")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default auto)")
    parser.add_argument("--dtype", default="auto", help="of the model (default auto)")
    return parser


def drawn_of(pictures: PictureSet, count: int | None, seed: int) -> PictureSet:
    """Return some of a set's pictures: those whose keys a hash ranks first."""
    if count is None or count >= len(pictures):
        return pictures
    ranked = sorted(
        pictures.keys, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()
    )
    return pictures.select(ranked[:count])


@torch.inference_mode()
def through(pipeline: AnyPipeline, pixels: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Send pictures through the latents that a model draws, and back.

    Args:
        pipeline: The model.
        pixels: ``(B, 3, H, W)`` in [0, 1].
        seeds: Of Stage B's noise, one each; what has no Stage B draws none.

    Returns:
        Pixels of the same shape, and the latents.
    """
    if isinstance(pipeline, CascadePipeline):
        made = pipeline.reconstruct(pixels, seeds=seeds)
        assert made.stage_c_latents is not None, "only Stage A alone has none"
        return made.pixels, made.stage_c_latents
    latents = pipeline.autoencoder.encode(pixels.to(pipeline.device))
    return pipeline.decode(latents).cpu(), latents.cpu()


def reconstruct(
    pipeline: AnyPipeline,
    pictures: PictureSet,
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 16,
    originals: Path | None = None,
) -> None:
    """Write each picture's reconstruction; what is there already is not made again.

    Args:
        pipeline: The model.
        pictures: The originals.
        out: Folder for ``pictures/KEY.png`` and the note.
        seed: With a picture's key the seed of Stage B's noise.
        batch_size: Pictures that go through together.
        originals: Folder for the originals, as PNG files too.
    """
    keys, start, seconds, made = pictures.keys, 0, 0.0, 0
    shape: tuple[int, ...] = ()
    for batch in pictures.batches(batch_size):
        names = keys[start : start + len(batch)]
        start += len(batch)
        if originals is not None:
            _save(batch.float() / 255, originals, names)
        if shape and all(_path(out / PICTURES, name).is_file() for name in names):
            continue
        began_s = time.perf_counter()
        seeds = [seed_of(name, seed) for name in names]
        pixels, latents = through(pipeline, batch.float() / 255, seeds)
        if shape:  # the first batch warms up
            seconds, made = seconds + time.perf_counter() - began_s, made + len(batch)
        shape = tuple(latents.shape[1:])
        _save(pixels, out / PICTURES, names)
    numbers = 1
    for side in shape:
        numbers *= side
    note = {
        "pictures": len(keys),
        "latent_shape": list(shape),
        "latent_bytes": numbers * LATENT_BYTES,
        "pictures_per_second": made / seconds if seconds > 0 else None,
        "weights": pipeline.weights_hash,
    }
    atomic_write_text(out / NOTE_FILE, json.dumps(note, indent=1) + "\n")
    _log.info("%d pictures through latents of %s", len(keys), "x".join(map(str, shape)))


def _save(pixels: Tensor, folder: Path, names: Sequence[str]) -> None:
    for name, image in zip(names, pixels_to_images(pixels), strict=True):
        path = _path(folder, name)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(image, path, {"prompt": name})


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.png"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, load, reconstruct."""
    options = parse_all(make_parser(), list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("size", "count", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    pictures = open_set(options.real, options.size, "bicubic")
    pictures = drawn_of(pictures, options.count, options.seed)
    pipeline = PictureMaker(
        MakerOptions(options.model, device=options.device, dtype=options.dtype)
    ).load()
    reconstruct(
        pipeline,
        pictures,
        options.out,
        seed=options.seed,
        batch_size=options.batch_size,
        originals=options.originals,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
