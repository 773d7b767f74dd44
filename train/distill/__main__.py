"""Students of a teacher, its pictures, and what it is worth to a cascade.

``python -m train.distill {make-student,generate,reencode-bias,feature-basis}``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.command import Parser, parse_all
from cascade.cpu_memory import tune_cpu_memory
from cascade.errors import UserError, run_main
from stages.unet.compress import PUBLISHED
from train.distill.generate_options import add_generate
from train.distill.measure_commands import add_measure_commands, measure

if TYPE_CHECKING:
    from train.distill.auto import AutoChoice
    from train.distill.make_student import Teacher

_MAKE = """Remove blocks and layers of a teacher's U-Net; what stays inherits its weights. Writes
student.safetensors, which loads as any U-Net, report.txt, which says of every tensor where it comes
from or that it is left out, and recipe.yaml, which makes the same student again."""
_MAKE_MORE = f"""Published recipes: {", ".join(PUBLISHED)}. A recipe of your own is a YAML file: see
configs/distill/my_student.yaml."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="python -m train.distill", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser(
        "make-student",
        help="remove blocks and layers of a U-Net",
        description=_MAKE,
        epilog=_MAKE_MORE,
        allow_abbrev=False,
    )
    make.add_argument(
        "--teacher",
        required=True,
        help="a U-Net: a file in any layout, a folder of diffusers, or a hub id",
    )
    make.add_argument(
        "--recipe", required=True, help="a published recipe, a YAML file of your own, or auto"
    )
    make.add_argument("--out", type=Path, required=True, help="new folder")
    make.add_argument(
        "--model-out",
        type=Path,
        help="new folder for the teacher's whole model with the student in it, as diffusers has it",
    )
    _add_auto(make)
    add_generate(commands)
    add_measure_commands(commands)
    return parse_all(parser, argv)


def _add_auto(make: argparse.ArgumentParser) -> None:
    auto = make.add_argument_group("--recipe auto", "remove what the output misses least")
    auto.add_argument("--max-params", metavar="N", help="parameters: 700M, or 30%% of its own")
    auto.add_argument(
        "--max-latency", metavar="SHARE", help="duration of a call: 50%% of the teacher's, here"
    )
    auto.add_argument(
        "--calibration",
        metavar="FILE",
        help="the YAML of a training, for its data; safetensors with latents, text_hidden and, as "
        "SDXL, text_pooled and sizes; or random",
    )
    auto.add_argument("--calibration-size", type=int, metavar="N", help="how many (default 8)")
    auto.add_argument(
        "--latent-size",
        type=int,
        metavar="SIDE",
        help="of random latents (default: 128 for SDXL, else 64; 8 pixels each)",
    )
    auto.add_argument("--batch-size", type=int, metavar="N", help="latents in one call (default 4)")
    auto.add_argument("--repeats", type=int, metavar="N", help="timed calls (default 5)")
    auto.add_argument("--device", help="auto, cpu, cuda, mps (default cpu)")
    auto.add_argument("--dtype", help="number format of what is measured (default float32)")


_AUTO_ONLY = (
    "max_params",
    "max_latency",
    "calibration",
    "calibration_size",
    "latent_size",
    "batch_size",
    "repeats",
    "device",
    "dtype",
)


def _check_auto(options: argparse.Namespace) -> None:
    """Refuse options that belong to another recipe, and an automatic one without its own."""
    given = [name for name in _AUTO_ONLY if getattr(options, name) is not None]
    if options.recipe != "auto":
        if given:
            flag = given[0].replace("_", "-")
            raise UserError(
                f"--{flag} is for --recipe auto, not for {options.recipe}: leave it out"
            )
        return
    if (options.max_params is None) == (options.max_latency is None):
        raise UserError("--recipe auto: give --max-params or --max-latency, one of them")
    if options.calibration is None:
        raise UserError(
            "--recipe auto: give --calibration FILE, the YAML of a training or a safetensors file "
            "of latents with their text, or --calibration random, which is less faithful"
        )
    for name in ("calibration_size", "latent_size", "batch_size", "repeats"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if options.latent_size is not None and options.calibration != "random":
        raise UserError("--latent-size is for --calibration random: a file's latents have one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command."""
    options = parse(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "generate":
        tune_cpu_memory()
        from train.distill.generate import generate

        return generate(options)
    if options.command != "make-student":
        return measure(options)
    return _make_student(options)


def _make_student(options: argparse.Namespace) -> int:
    """Make a student."""
    _check_auto(options)
    # torch takes a second to import: only when there is something to do.
    from train.distill.make_student import (
        check_new,
        load_teacher,
        make_student,
        metadata_of,
        write_student,
    )
    from train.distill.model_folder import open_model, write_model
    from train.distill.plans import NamedRecipe, read_recipe

    check_new(options.out)
    named = None if options.recipe == "auto" else read_recipe(options.recipe)
    model = None
    if options.model_out is not None:
        check_new(options.model_out, "--model-out")
        model = open_model(options.teacher)
    teacher = load_teacher(options.teacher)
    measured: Sequence[str] = ()
    importance: Sequence[str] = ()
    if named is None:
        choice = _choose_automatically(teacher, options)
        named = NamedRecipe("auto", choice.recipe)
        measured, importance = ("", *choice.summary), ("", *choice.importance)
    student = make_student(teacher, named)
    content = None if model is None else model.unet_config(student.network.config)
    summary = write_student(teacher, named, student, options.out, (*measured, *importance))
    print("\n".join([*summary, *measured, "", f"wrote {options.out}"]))
    if model is not None and content is not None:
        metadata = metadata_of(teacher, named, student.plan)
        write_model(model, student.network, content, options.model_out, metadata)
        print(f"wrote {options.model_out}")
    return 0


def _choose_automatically(teacher: Teacher, options: argparse.Namespace) -> AutoChoice:
    """Measure the teacher and choose what goes."""
    from cascade.pipelines.placement import pick_device, pick_dtype
    from train.distill.auto import Bench, Budget, choose_recipe, parse_parameters, parse_share
    from train.distill.calibration import calibrate

    config = teacher.network.config
    device = pick_device(options.device or "cpu")
    dtype = pick_dtype(options.dtype or "float32", device)
    count = sum(parameter.numel() for parameter in teacher.network.parameters())
    if options.max_params is not None:
        budget = Budget(parameters=parse_parameters(options.max_params, count))
    else:
        budget = Budget(latency=parse_share(options.max_latency))
    calibration = calibrate(
        options.calibration,
        config,
        count=options.calibration_size or 8,
        latent_size=options.latent_size or (64 if config.text_pooled_channels is None else 128),
    )
    bench = Bench(calibration, device, dtype, options.batch_size or 4, options.repeats or 5)
    # Its file's tensors stay as they are: the student inherits those.
    return choose_recipe(teacher.copy_on(device, dtype), budget, bench)


if __name__ == "__main__":
    sys.exit(run_main(main))
