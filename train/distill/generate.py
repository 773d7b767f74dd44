"""``python -m train.distill generate``: from the command line to the factory."""

from __future__ import annotations

import argparse
from pathlib import Path

from cascade.config import from_dict, read_yaml
from cascade.errors import UserError
from cascade.launchers import Part
from train.distill.factory import Factory
from train.distill.generate_config import GenerateConfig
from train.distill.generate_options import COMMAND_ONLY
from train.distill.generated_set import state_of
from train.distill.prompts import of_shards


def read_config(options: argparse.Namespace) -> GenerateConfig:
    """Return the configuration: the file's keys, and those of the command line over them.

    Raises:
        UserError: One is missing or wrong.
    """
    values = read_yaml(options.config) if options.config is not None else {}
    where = "generate" if options.config is None else str(options.config)
    for name, value in vars(options).items():
        if name not in COMMAND_ONLY and value is not None:
            values[name] = value
    if options.estimate:
        values.setdefault("out", "")  # where nothing is written
    for name in ("teacher", "prompts", "out"):
        if name not in values:
            raise UserError(f"--{name}: missing; see python -m train.distill generate --help")
    return from_dict(GenerateConfig, values, where)


def read_part(text: str | None) -> Part:
    """Return this process's share: the named one, or as the launcher says."""
    if text is None:
        return Part.of_environment()
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise UserError(f"--part {text}: write I/N, such as 0/4")
    return Part(int(number), int(count), int(number))


def generate(options: argparse.Namespace) -> int:
    """Make the shards, or print what they would cost."""
    if options.device_tflops is not None and not (options.estimate and options.device_tflops > 0):
        raise UserError("--device-tflops X: goes with --estimate, and is above 0")
    config = read_config(options)
    factory = Factory(config, read_part(options.part))
    width, height = factory.maker.size
    spec = factory.maker.spec
    print(
        f"{spec.name} (weights {factory.maker.weights_hash}, "
        f"licence: {spec.licence or 'not known here; ask its makers'}), {width}x{height}: "
        f"{factory.num_pictures:,} pictures of {len(factory.prompts):,} prompts in "
        f"{factory.num_shards:,} shards",
        flush=True,
    )
    notices = list(factory.maker.notices)
    if (
        config.shuffle is None
        and config.limit == len(factory.prompts)
        and of_shards(config.prompts)
    ):
        notices.append(
            f"the first {config.limit:,} captions of the shards, which may all be of one kind; "
            "--shuffle 0 takes as many of all"
        )
    for notice in notices:
        print(f"notice: {notice}", flush=True)
    if options.estimate:
        cost, num_bytes = factory.estimate()
        print("\n".join(cost.describe(num_bytes, options.device_tflops)))
        return 0
    report = factory.run()
    part = factory.part
    share = "" if part.count == 1 else f"part {part.number}/{part.count}: "
    before = f", {report.done_before} shards were there" if report.done_before else ""
    print(f"{share}{report.samples:,} pictures in {report.shards} shards{before}")
    state = state_of(Path(config.out), config.name)
    refused = ", ".join(f"{count} {reason}" for reason, count in state.refused.most_common())
    print(
        f"{config.out}: {state.shards} of {factory.num_shards} shards, {state.samples:,} pictures"
        + f"; refused: {refused}" * bool(refused)
        + f"; {state.duplicates} are in two shards, to the pixel, until the set is whole"
        * bool(state.duplicates)
    )
    return 0
