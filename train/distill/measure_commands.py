"""``python -m train.distill reencode-bias`` and ``feature-basis``: a teacher is measured."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.errors import UserError

if TYPE_CHECKING:
    import torch

    from train.data.cached import CachedBatch
    from train.encode import FrozenPaths

_BIAS = """Measure at which noise a U-Net's estimates of pictures are a target for Stage C. Each
estimate is decoded, and compressed again; the spread of the result over that of the truth is drawn
against time and log-SNR. Training trusts the estimate where that ratio is near 1."""
_BASIS = """Measure the principal components of a U-Net's features of clean pictures, so that few
numbers a position need to be kept for alignment."""


def add_measure_commands(commands: Any) -> None:
    """Add both commands."""
    bias = commands.add_parser(
        "reencode-bias",
        help="where a U-Net's estimates are a target for Stage C",
        description=_BIAS,
        allow_abbrev=False,
    )
    _add_common(bias)
    bias.add_argument("--compressor", required=True, help="semantic compressor, or a model")
    bias.add_argument(
        "--out",
        type=Path,
        required=True,
        help="file of the curve; both .json, which training reads, and .png are written",
    )
    bias.add_argument(
        "--timesteps",
        type=int,
        nargs="+",
        default=[0, 25, 50, 100, 150, 200, 300, 400, 500, 600, 700, 800, 900, 999],
        help="of the teacher, 0 to 999",
    )
    bias.add_argument(
        "--text", help="text encoder whose states the teacher is told of the captions (default: no)"
    )
    bias.add_argument(
        "--text-hidden", choices=("pre_norm", "post_norm", "penultimate"), default="pre_norm"
    )
    bias.add_argument(
        "--text-sees-padding", action="store_true", help="as in python -m train.data precompute"
    )
    bias.add_argument("--seed", type=int, default=0, help="of the noise")
    bias.add_argument(
        "--min-ratio", type=float, default=0.9, help="drawn into the picture (default 0.9)"
    )
    basis = commands.add_parser(
        "feature-basis",
        help="principal components of a U-Net's features",
        description=_BASIS,
        allow_abbrev=False,
    )
    _add_common(basis)
    basis.add_argument("--out", type=Path, required=True, help="new .safetensors file")
    basis.add_argument("--components", type=int, default=64, help="how many (default 64)")
    basis.add_argument("--site", help="place of the U-Net (default: as training takes it)")
    basis.add_argument("--timestep", type=int, default=200, help="of little noise (default 200)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="U-Net: a file, a folder or a hub id")
    parser.add_argument("--autoencoder", help="its autoencoder (default: of --teacher's folder)")
    parser.add_argument("--data", required=True, help="shards of pictures: glob or brace pattern")
    parser.add_argument(
        "--image-size", type=int, required=True, help="side that the teacher was trained on"
    )
    parser.add_argument("--pictures", type=int, default=1024, help="how many (default 1024)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="of the U-Net; must be that of the run that reads the file",
    )
    parser.add_argument(
        "--teacher-text", help="text encoder of a teacher of SD's kind, for no caption"
    )


def check_measure_options(options: argparse.Namespace) -> None:
    """Refuse numbers that measure nothing.

    Raises:
        UserError: Naming the option.
    """
    for name in ("image_size", "pictures", "batch_size"):
        value = getattr(options, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    timesteps = options.timesteps if options.command == "reencode-bias" else [options.timestep]
    outside = [timestep for timestep in timesteps if not 0 <= timestep <= 999]
    if outside:
        raise UserError(f"timestep {outside[0]}: timesteps lie in 0 to 999")
    if len(set(timesteps)) < 2 and options.command == "reencode-bias":
        raise UserError("--timesteps: a curve has two or more")


def measure(options: argparse.Namespace) -> int:
    """Run either command."""
    from cascade.pipelines.placement import pick_device
    from train.distill.picture_teacher import PictureTeacher, PictureTeacherConfig

    check_measure_options(options)
    device = pick_device(options.device)
    config = PictureTeacherConfig(
        unet=options.teacher,
        autoencoder=options.autoencoder or options.teacher,
        image_size=options.image_size,
        dtype=options.dtype,
        text=options.teacher_text,
    )
    teacher = PictureTeacher(config)
    if options.command == "feature-basis":
        return _feature_basis(options, teacher, device)
    return _reencode_bias(options, teacher, device)


def _reencode_bias(options: argparse.Namespace, teacher: Any, device: torch.device) -> int:
    from cascade.checkpoints.part_files import find_network, weights_hash
    from cascade.text.encoder import TextConfig
    from train.distill.bias_curve import measure_bias
    from train.distill.bias_picture import bias_picture
    from train.encode import FrozenPaths, load_frozen

    found = find_network(options.compressor, "compressor")
    states = TextConfig(options.text_hidden, masks_padding=not options.text_sees_padding)
    frozen = FrozenPaths(text=options.text, text_states=states)
    batches = _batches(options, frozen, device)
    compressor = load_frozen(found, device)
    teacher.load(device)
    curve = measure_bias(
        teacher,
        compressor.encode,
        batches,
        options.timesteps,
        compressor=weights_hash(found.path),
        captions=options.text is not None,
        seed=options.seed,
    )
    target = options.out.with_suffix(".json")
    target.parent.mkdir(parents=True, exist_ok=True)
    curve.write(target)
    bias_picture(curve, options.min_ratio).save(options.out.with_suffix(".png"))
    for point in curve.points:
        print(
            f"timestep {point.timestep:3d}, log-SNR {point.log_snr:6.2f}: ratio "
            f"{point.ratio:.3f}, distance {point.distance:.3f}"
        )
    print(
        f"through the autoencoder alone: ratio {curve.roundtrip_ratio:.3f}, distance "
        f"{curve.roundtrip_distance:.3f}; {curve.pictures} pictures; wrote {target} and .png"
    )
    return 0


def _feature_basis(options: argparse.Namespace, teacher: Any, device: torch.device) -> int:
    from train.distill.feature_target import BasisFit, FeatureSource, FeatureTarget
    from train.encode import FrozenPaths

    target = FeatureTarget(teacher.config, site=options.site, timestep=options.timestep)
    source = FeatureSource(target, teacher)
    batches = _batches(options, FrozenPaths(), device)
    teacher.load(device)
    fit, pictures = BasisFit(source.channels), 0
    for batch in batches:
        fit.add(source.of_pixels(batch.require("pixels")))
        pictures += len(batch)
    basis, share = fit.basis(options.components)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    basis.write(options.out, source)
    print(
        f"{source.site}: {options.components} of {source.channels} channels hold {share:.1%} of "
        f"the variance of {pictures} pictures; wrote {options.out}"
    )
    return 0


def _batches(
    options: argparse.Namespace, frozen: FrozenPaths, device: torch.device
) -> Iterator[CachedBatch]:
    """Return the pictures, squares of ``--image-size``, on a device, with their text states."""
    from train.data.config import DataConfig
    from train.data.open import open_data

    data = open_data(
        DataConfig(
            shards=options.data,
            batch_size=options.batch_size,
            mode="exact",
            size=options.image_size,
            max_broken_share=1.0,
        ),
        frozen,
    )

    def serve() -> Iterator[CachedBatch]:
        left = options.pictures
        if data.encode is not None:
            data.encode.load(device)
        for batch in data.loader_from(0, 0, 1):
            if data.encode is not None:
                data.encode.fill(batch)
            batch.pixels = batch.require("pixels").to(device)
            yield batch
            left -= len(batch)
            if left <= 0:
                return

    return serve()
