"""Train one network: ``python -m train stage_c --config configs/demo/stage_c.yaml``.

Every key of the configuration can be set on the command line: ``--optim.lr 3e-4``.
``--resume`` goes on from the newest whole checkpoint of the run's folder, or starts if there is
none: the same command begins a run and goes on with it however it ended.
``--data.mode exact`` or ``resampled`` streams a set of any size; ``python -m train.data check``
looks at it first.
``--preset configs/presets/24gb.yaml`` lays a preset for a GPU's memory over the file: batch,
accumulation, optimizer and what saves memory. Keys of the command line come last.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from cascade.command import Parser
from cascade.config import apply_overrides, from_dict, parse_overrides, read_yaml
from cascade.config_help import describe_keys
from cascade.errors import UserError, run_main

_log = logging.getLogger(__name__)

_PRESET_SECTIONS = ("run", "data", "optim")
_PRESETS = Path(__file__).parents[1] / "configs" / "presets"
KINDS = (
    "clip",
    "stage_a",
    "compressor",
    "stage_b",
    "stage_c",
    "step_distil",
    "previewer",
    "autoencoder_kl",
    "unet",
    "unet_kd",
    "cascade_kd",
    "stage_b_kd",
    "stage_a_decoder",
)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m train",
        description="Train one network of a cascade, or a U-Net.",
        epilog="Any key of the configuration is an option too: --optim.lr 3e-4 --run.max_steps 10. "
        "After a network, --help lists them: python -m train stage_c --help",
    )
    parser.add_argument("kind", choices=KINDS, help="which network")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--preset", help="what is laid over it: a name of configs/presets, as 24gb, or a YAML file"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the run's newest checkpoint; start if there is none",
    )
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line into our options and overrides of the configuration."""
    options, rest = _parser().parse_known_args(argv)
    return options, parse_overrides(rest)


def _preset_file(preset: str) -> Path:
    own = {one.stem: one for one in sorted(_PRESETS.glob("*.yaml"))}
    if preset in own:
        return own[preset]
    if not Path(preset).is_file():
        raise UserError(f"--preset {preset}: no such file; there are {', '.join(own)}")
    return Path(preset)


def lay_over(data: dict[str, object], preset: str) -> None:
    """Let a preset's keys take the place of a run's own, and say which.

    Raises:
        UserError: The preset names what a network is or learns.
    """
    for section, keys in read_yaml(_preset_file(preset)).items():
        own = data.setdefault(section, {})
        if section not in _PRESET_SECTIONS or not isinstance(keys, dict):
            raise UserError(f"{preset}: {section}: a preset has the sections run, data and optim")
        if not isinstance(own, dict):
            raise UserError(f"{preset}: {section} is no section of the run's file")
        for key, value in keys.items():
            if key in own and own[key] != value:
                _log.info("%s: %s.%s is %s instead of %s", preset, section, key, value, own[key])
            own[key] = value


def kinds() -> dict[str, tuple[type[Any], Callable[..., None]]]:
    """Return each kind's configuration and what trains it."""
    # Lightning and transformers take seconds to import: only when a kind is known.
    from train import cascade_kd_runs, runs, stage_kd_runs, step_runs, unet_runs

    return {
        "clip": (runs.ClipRun, runs.train_clip),
        "stage_a": (runs.StageARun, runs.train_stage_a),
        "autoencoder_kl": (runs.AutoencoderKLRun, runs.train_autoencoder_kl),
        "compressor": (runs.CompressorRun, runs.train_compressor),
        "stage_b": (runs.StageBRun, runs.train_stage_b),
        "stage_c": (runs.StageCRun, runs.train_stage_c),
        "step_distil": (step_runs.StepDistilRun, step_runs.train_step_distil),
        "previewer": (runs.PreviewerRun, runs.train_previewer),
        "unet": (unet_runs.UNetRun, unet_runs.train_unet),
        "unet_kd": (unet_runs.UNetRun, unet_runs.train_unet_kd),
        "cascade_kd": (cascade_kd_runs.CascadeKDRun, cascade_kd_runs.train_cascade_kd),
        "stage_b_kd": (stage_kd_runs.StageBKDRun, stage_kd_runs.train_stage_b_kd),
        "stage_a_decoder": (stage_kd_runs.StageADecoderRun, stage_kd_runs.train_stage_a_decoder),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, fit."""
    argv = sys.argv[1:] if argv is None else argv
    kind = next(iter(argv), "")
    if kind in KINDS and ("--help" in argv or "-h" in argv):
        _parser().print_help()
        print(f"\nkeys of {kind}:\n{describe_keys(kinds()[kind][0])}")
        return 0
    options, overrides = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_class, start = kinds()[options.kind]
    data, where = read_yaml(options.config), options.config
    if options.preset is not None:
        lay_over(data, options.preset)
        where = f"{options.config} with {options.preset}"
    apply_overrides(data, overrides)
    config = from_dict(run_class, data, where, told=overrides)
    from train.launch import check_processes, global_rank
    from train.run_lock import held

    check_processes(config.run)
    # From before the first look at what is there to after the last write.
    with held(Path(config.run.out)) if global_rank() == 0 else nullcontext():
        start(config, resume=options.resume)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
