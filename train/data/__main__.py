"""Data tools: check shards before a run, write shards, cache what frozen networks make of them."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cascade.command import Parser
from cascade.config import apply_overrides, from_dict, parse_overrides
from cascade.errors import UserError, run_main
from train.data.config import DataConfig

if TYPE_CHECKING:
    from train.distill.feature_target import FeatureTarget

_CHECK = """Look at the first samples of every shard and print one table: pictures, sizes, captions,
broken members, what the filters leave out, what the shapes hold. Exit code 2 and one line when a
run could certainly not work on them; what a sample can't tell is a warning, and --all reads every
sample."""
_CHECK_MORE = """Any key of a run's data section is an option too: --size 1024 --buckets.step 64
--filters.min_size 512 --filters.min_scores '{aesthetic: 5}' --batch_size 32 --mode resampled.
Addresses: files, http(s)://, s3:// (package s3fs), gs:// (package gcsfs), several joined by '::';
'pipe:COMMAND' with --allow_pipe true and --mode resampled."""
_PRECOMPUTE = """Run frozen networks over pictures once. --out keeps a small set for data.mode
memory; --shards-out writes shards of latents for data.mode exact and resampled: the same command
goes on where a killed one was, and a folder made with other weights, size or number format is
refused."""
_PRECOMPUTE_MORE = """With --shards-out, keys of a run's data section are options too: --size 1024
(needed), --buckets.step 64, --filters.min_size 512, --allow_pipe true."""


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line into options and what is left, keys of a data section."""
    parser = Parser(prog="python -m train.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_check(commands)
    _add_write(commands)
    _add_precompute(commands)
    options, rest = parser.parse_known_args(argv)
    if rest and options.command == "write":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options, rest


def _add_check(commands: Any) -> None:
    check = commands.add_parser(
        "check",
        help="look at shards before a run",
        usage="python -m train.data check [SHARDS] [--config CONFIG] [--samples N | --all] "
        "[--ranks N] [--KEY VALUE ...]",
        description=f"{_CHECK} SHARDS is a glob or brace pattern; default: the --config's.",
        epilog=_CHECK_MORE,
        allow_abbrev=False,
    )
    check.add_argument("--config", type=Path, help="a run's YAML file, whose data section counts")
    much = check.add_mutually_exclusive_group()
    much.add_argument("--samples", type=int, default=64, help="samples of each shard (64)")
    much.add_argument(
        "--all",
        dest="samples",
        action="store_const",
        const=0,
        help="every sample of every shard, and the checksums of those that write has made",
    )
    check.add_argument("--ranks", type=int, help="devices (default: the --config's, or 1)")


def _add_write(commands: Any) -> None:
    write = commands.add_parser("write", help="pictures with captions to shards")
    write.add_argument(
        "--from",
        dest="source",
        type=Path,
        required=True,
        help="a folder or zip file with captions.jsonl, a folder of pictures each with a .txt of "
        "its name, a .jsonl file, or a .parquet file",
    )
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


def _add_precompute(commands: Any) -> None:
    cache = commands.add_parser(
        "precompute",
        help="run frozen networks over shards once",
        description=_PRECOMPUTE,
        epilog=_PRECOMPUTE_MORE,
        allow_abbrev=False,
    )
    cache.add_argument("--shards", required=True, help="glob or brace pattern")
    to = cache.add_mutually_exclusive_group(required=True)
    to.add_argument("--out", type=Path, help="cache folder of a set in memory")
    to.add_argument("--shards-out", type=Path, help="folder for shards of latents")
    cache.add_argument(
        "--text", help="text encoder's folder, or a model with one: cache text states"
    )
    cache.add_argument("--text-width", type=int, help="which of a model's two: its channels")
    cache.add_argument(
        "--text-hidden",
        choices=("pre_norm", "post_norm", "penultimate"),
        default="pre_norm",
        help="hidden states before or after the final norm, or before the last layer (SD: "
        "post_norm, SDXL: penultimate)",
    )
    cache.add_argument(
        "--text-sees-padding",
        action="store_true",
        help="keep padding in the text encoder's attention, as SD and SDXL do",
    )
    cache.add_argument(
        "--text-2", help="SDXL's second text encoder: cache the states of both side by side"
    )
    cache.add_argument("--text-2-width", type=int, help="which of a model's two: its channels")
    cache.add_argument("--text-pad-to", type=int, help="tokens to pad to (default: the window)")
    cache.add_argument("--image", help="CLIP's folder: cache embeddings of the pictures")
    cache.add_argument("--stage-a", help="Stage A's file, or a model: cache its latents")
    cache.add_argument(
        "--stage-a-scale", type=float, help="of a published Stage A: 0.43 (v3) or 0.3764 (v2)"
    )
    cache.add_argument("--compressor", help="compressor's file, or a model: cache its latents")
    cache.add_argument(
        "--autoencoder", help="a U-Net's autoencoder, or a model with one: cache its latents"
    )
    cache.add_argument(
        "--teacher-of",
        metavar="CONFIG",
        help="a cascade_kd run's file: cache the features of its teacher that its align names",
    )
    cache.add_argument(
        "--reuse",
        type=Path,
        metavar="FOLDER",
        help="with --out: another cache; its parts of the same pictures and weights are linked",
    )
    cache.add_argument("--batch-size", type=int, default=64)
    cache.add_argument("--device", default="cpu")
    cache.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="number format of shards of latents",
    )
    cache.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="with --shards-out: do the I-th of N parts of the shards, counted from 0",
    )


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    return int(number), int(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named tool."""
    options, rest = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "check":
        return _check(options, rest)
    if options.command == "write":
        return _write(options)
    return _precompute(options, rest)


def _check(options: argparse.Namespace, rest: list[str]) -> int:
    import warnings

    from train.data.check import CheckOptions, check
    from train.data.pictures import BOMB_WARNING

    warnings.filterwarnings("ignore", message=BOMB_WARNING)
    values: dict[str, Any] = {"batch_size": 1, "mode": "exact"}
    ranks, where = 1, "check"
    if options.config is not None:
        where, whole = str(options.config), _yaml(options.config)
        values = dict(whole.get("data") or {})
        run = whole.get("run") or {}
        found_devices = run.get("devices", 1) if isinstance(run, dict) else None
        if not isinstance(found_devices, int) or isinstance(found_devices, bool):
            raise UserError(f"{where}: run: a section with devices, a whole number, is needed")
        ranks = found_devices
    # A positional argument of argparse would take the value of the first key for itself.
    if rest and not rest[0].startswith("--"):
        values["shards"], *rest = rest
    apply_overrides(values, parse_overrides(rest))
    one_size = values.get("mode", "memory") == "memory"
    if one_size:  # a set in memory has the size of its pictures; a look at it needs some
        values.pop("folder", None)
        mix = values.get("mix") or []
        for one in mix if isinstance(mix, list) else ():
            if isinstance(one, dict):
                one.pop("folder", None)
        values["mode"] = "resampled" if mix else "exact"
    compares = "size" in values and not one_size
    if options.config is None or one_size:
        values.setdefault("size", 512)
    if "shards" not in values:
        raise UserError("check: name the shards, or a --config whose data section does")
    data = from_dict(DataConfig, values, where)
    names = [one.name for one in data.mix]
    for name, one in zip(["", *names], data.sets(), strict=True):
        if name:
            print(f"\nset {name}")
        ranks = options.ranks or ranks
        found = check(
            CheckOptions(one, options.samples, ranks, one_size, compares, of_mixture=bool(data.mix))
        )
        for line in found.table():
            print(line)
        found.require_usable()
    return 0


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; check the path")
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(whole, dict) or not isinstance(whole.get("data"), dict):
        raise UserError(f"{path}: has no data section")
    return whole


def _write(options: argparse.Namespace) -> int:
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


def _features_of(config: str) -> FeatureTarget:
    from cascade.config import load_yaml
    from train.systems.cascade_kd import CascadeKDRun

    run = load_yaml(CascadeKDRun, config)
    if run.teacher is None:
        raise UserError(f"{config}: names no teacher")
    return run.align.target(run.teacher)


def _precompute(options: argparse.Namespace, rest: list[str]) -> int:
    from cascade.text.encoder import TextConfig
    from train.encode import FrozenPaths

    frozen = FrozenPaths(
        text=options.text,
        text_states=TextConfig(
            hidden=options.text_hidden,
            pad_to=options.text_pad_to,
            masks_padding=not options.text_sees_padding,
        ),
        text_width=options.text_width,
        text_2=options.text_2,
        text_2_width=options.text_2_width,
        stage_a=options.stage_a,
        stage_a_scale=options.stage_a_scale,
        compressor=options.compressor,
        image=options.image,
        autoencoder=options.autoencoder,
        features=None if options.teacher_of is None else _features_of(options.teacher_of),
    )
    if options.reuse is not None and options.shards_out is not None:
        raise UserError("--reuse: goes with --out, whose parts are files of their own")
    if options.shards_out is not None:
        from train.data.latents import PrecomputeOptions, precompute_shards

        values: dict[str, Any] = {"shards": options.shards, "batch_size": options.batch_size}
        values["mode"] = "resampled"  # any source will do: each is read once, from its beginning
        apply_overrides(values, parse_overrides(rest))
        if "size" not in values:
            raise UserError("--size: missing; the side of the pictures that latents are made from")
        report = precompute_shards(
            PrecomputeOptions(
                data=from_dict(DataConfig, values, "precompute"),
                out=options.shards_out,
                frozen=frozen,
                dtype=options.dtype,
                part=options.part,
                device=options.device,
            )
        )
        before = f", {report.done_before} were there" if report.done_before else ""
        print(
            f"{report.samples} samples in {report.shards} shards in {options.shards_out}{before}, "
            f"{report.skipped} left out"
        )
        return 0
    if rest or options.part != (0, 1):
        raise UserError(f"{(*rest, '--part')[0]}: goes with --shards-out")
    from train.data.precompute import precompute

    precompute(
        options.shards,
        options.out,
        frozen,
        batch_size=options.batch_size,
        device=options.device,
        reuse=options.reuse,
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
