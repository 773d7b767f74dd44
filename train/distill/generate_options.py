"""The options of ``python -m train.distill generate``; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_WHAT = """Write a teacher's pictures of many prompts as shards, with what made each in its json.
Started by accelerate launch, torchrun or srun, every process makes its share on its own GPU. The
same command goes on where a killed one was; a folder made with other settings is refused."""
_MORE = """--config FILE names any of these options as keys (configs/teachers/); the command line
goes before it. What the teacher's pictures cost goes to OUT/ledger.jsonl, as rows of the phase
teacher. Train on them alone with data.shards, or beside real ones with data.mix."""
COMMAND_ONLY = ("command", "config", "part", "estimate", "device_tflops")
"""Options that are no keys of a configuration."""


def add_generate(commands: Any) -> None:
    """Add the command; options that are not given are None."""
    make = commands.add_parser(
        "generate",
        help="a teacher's pictures as shards",
        description=_WHAT,
        epilog=_MORE,
        allow_abbrev=False,
    )
    make.add_argument("--config", type=Path, metavar="FILE", help="YAML file of these options")
    make.add_argument("--teacher", metavar="MODEL", help="a cascade or a U-Net: folder, file, hub")
    make.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line; .jsonl, .csv or .parquet; or shards, for their captions",
    )
    make.add_argument("--column", metavar="NAME", help="of a table: where the prompts are")
    make.add_argument("--limit", type=int, metavar="N", help="take the first N distinct prompts")
    make.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="bring the prompts into an order drawn from this seed, so that --limit takes some of "
        "every kind (default: as they stand; of shards, the captions of the first ones)",
    )
    make.add_argument("--out", metavar="SHARDS", help="folder for the shards")
    make.add_argument("--name", help="name of the shards (default: teacher)")
    make.add_argument(
        "--pictures-per-prompt", type=int, metavar="N", help="each of a seed of its own (default 1)"
    )
    make.add_argument("--seed", type=int, metavar="N", help="of the whole set (default 0)")
    make.add_argument("--shard-size", type=int, metavar="N", help="pictures a shard (default 256)")
    make.add_argument("--format", choices=("png", "jpg"), help="of the pictures (default png)")
    make.add_argument(
        "--keep-latents",
        action="store_const",
        const=True,
        help="keep what the teacher drew, so that precompute need not encode it",
    )
    _add_sampling(make)
    make.add_argument("--batch-size", type=int, metavar="N", help="default: 1 on a CPU, 4 on a GPU")
    make.add_argument("--device", help="auto, cpu, cuda, mps (default auto)")
    make.add_argument("--dtype", help="number format, as for sample.py (default auto)")
    make.add_argument(
        "--part",
        metavar="I/N",
        help="do the I-th of N shares, counted from 0 (default: as the launcher says)",
    )
    make.add_argument(
        "--estimate",
        action="store_true",
        help="make one picture, print what a million would cost, and stop",
    )
    make.add_argument(
        "--device-tflops",
        type=float,
        metavar="X",
        help="with --estimate: what a device reaches in TFLOP/s, such as 395 (40%% of an H200)",
    )


def _add_sampling(make: argparse.ArgumentParser) -> None:
    how = make.add_argument_group("how the teacher draws (default: as its makers chose)")
    how.add_argument("--size", metavar="PX", help="a side, or WIDTHxHEIGHT")
    how.add_argument("--steps", type=int, metavar="N", help="of a U-Net, or of Stage C")
    how.add_argument("--guidance", type=float, metavar="X", help="the same; 1 is off")
    how.add_argument("--sampler", metavar="NAME", help="as for sample.py")
    how.add_argument("--spacing", metavar="NAME", help="U-Nets: where the timesteps lie")
    how.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    how.add_argument("--unet", metavar="FILE", help="run this U-Net in place of the teacher's own")
    how.add_argument(
        "--lora", dest="loras", action="append", metavar="FILE", help="merge it; may be repeated"
    )
    how.add_argument("--steps-b", type=int, metavar="N", help="cascades: steps of Stage B")
    how.add_argument("--guidance-b", type=float, metavar="X", help="cascades: of Stage B")
    how.add_argument("--dialect", choices=("official", "diffusers"), help="of published cascades")
    how.add_argument("--variant", metavar="NAME", help="number format to download, such as fp16")
