"""Data tools: ``python -m train.data write ...`` and ``python -m train.data precompute ...``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade.errors import run_main


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m train.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="a folder with captions.jsonl to shards")
    write.add_argument("--from", dest="source", type=Path, required=True, help="folder or zip file")
    write.add_argument("--out", type=Path, required=True, help="folder for the shards")
    write.add_argument("--name", help="name of the shards (default: the source's)")
    write.add_argument("--split", help="take only rows of this split")
    write.add_argument("--size", type=int, help="side of the square pictures in pixels")
    write.add_argument(
        "--background-variants",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of the pictures with alpha that get a copy on a named colour",
    )
    write.add_argument("--shard-size", type=int, default=1000, help="pictures a shard")
    write.add_argument("--seed", type=int, default=0)
    write.add_argument("--force", action="store_true", help="overwrite shards of the same name")
    cache = commands.add_parser("precompute", help="run frozen networks over shards once")
    cache.add_argument("--shards", required=True, help="glob or brace pattern")
    cache.add_argument("--out", type=Path, required=True, help="cache folder")
    cache.add_argument("--text", help="text encoder's folder: cache text states")
    cache.add_argument(
        "--text-hidden",
        choices=("pre_norm", "post_norm"),
        default="pre_norm",
        help="hidden states before or after the final norm",
    )
    cache.add_argument("--text-pad-to", type=int, help="tokens to pad to (default: the window)")
    cache.add_argument("--image", help="CLIP's folder: cache embeddings of the pictures")
    cache.add_argument("--stage-a", help="Stage A's file: cache its latents")
    cache.add_argument("--compressor", help="compressor's file: cache Stage C latents")
    cache.add_argument("--batch-size", type=int, default=64)
    cache.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named tool."""
    options = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "write":
        from train.data.write import WriteOptions, write_shards

        report = write_shards(
            WriteOptions(
                source=options.source,
                out=options.out,
                name=options.name,
                split=options.split,
                size=options.size,
                background_variants=options.background_variants,
                shard_size=options.shard_size,
                seed=options.seed,
                force=options.force,
            )
        )
        skipped = f", {len(report.broken)} skipped" if report.broken else ""
        print(f"{report.written} pictures in {report.shards} shards in {options.out}{skipped}")
        return 0
    from cascade.text.encoder import TextConfig
    from train.data.precompute import precompute

    precompute(
        options.shards,
        options.out,
        text=options.text,
        text_config=TextConfig(hidden=options.text_hidden, pad_to=options.text_pad_to),
        stage_a=options.stage_a,
        compressor=options.compressor,
        image=options.image,
        batch_size=options.batch_size,
        device=options.device,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
