"""A step of the U-Nets here and in diffusers: seconds, memory, parameters, operations.

``python benchmarks/unet.py --models koala_700m,sd_tiny`` builds each U-Net with random weights of
the seed, and diffusers' ``UNet2DConditionModel`` over the very same tensors (each weight is in
memory once), and lets both predict the same noised latents, in turn, in one process. Before the
clock both predictions are compared.

Three sides: "here" is the step that ``UNetPipeline`` runs, for which the text's keys and values and
the size conditions were computed once for the picture; "here, unprepared" computes them in the step
as diffusers does; "diffusers" is a plain call under ``inference_mode``. Nothing else is set on any
side: no compilation, no memory format, the same threads.

MACs are half the operations that torch's formulas count for matrix products, convolutions and
attention on the meta device; norms and activations are not in them. Memory is the peak of a step
above what was there before it: of a GPU what the allocator gave, on a CPU the resident set.

Latents are picture sides divided by 8: 128 is 1024 pixels. On a CPU the default is 32, because a
step of SDXL at 128 takes minutes there; figures at one size say little of another, where attention
weighs otherwise.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.checkpoints.files import build_on_meta  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.cost import peak_memory, timed  # noqa: E402
from cascade.evaluate.flops import FlopCounter  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from cascade.pipelines.unet_spec import UNetSpec  # noqa: E402
from cascade.tools.convert_unet import unet_config_of  # noqa: E402
from stages.unet.config import NUM_SIZES, UNetConfig  # noqa: E402
from stages.unet.unet import UNet, UNetCondition, UNetPrepared  # noqa: E402

MODELS = {
    "sdxl": ("SDXL", UNetConfig.sdxl()),
    "koala_1b": ("KOALA-1B", UNetConfig.koala_1b()),
    "koala_700m": ("KOALA-700M", UNetConfig.koala_700m()),
    "sd_small": ("SD-Small", UNetConfig.sd_small()),
    "sd_tiny": ("SD-Tiny", UNetConfig.sd_tiny()),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THEIRS = "diffusers"
_TOKENS = 77
_STD = 0.02
_TIMESTEP = 601.0
_WARM_UP = 1

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Work:
    """What all sides are given."""

    latents: Tensor  # (B, 4, h, w)
    timesteps: Tensor  # (B,)
    cond: UNetCondition


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: For a model, number or device that can't be.
    """
    parser = Parser(
        prog="benchmarks/unet.py", description="A step of the U-Nets here and in diffusers."
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--latent", type=int, default=0, metavar="N", help="side: px / 8; default 128, on a CPU 32"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="a side; default 10")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and inputs")
    options = parse_all(parser, sys.argv[1:] if arguments is None else arguments)
    options.models = options.models.split(",")
    for name in options.models:
        if name not in MODELS:
            raise UserError(f"--models {name!r}: of {', '.join(MODELS)}")
    try:
        options.device = torch.device(options.device)
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    options.latent = options.latent or (32 if options.device.type == "cpu" else 128)
    for name in ("latent", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each model and print its rows."""
    options = parse(arguments)
    print(
        f"A step of a U-Net: batch {options.batch_size}, latents {options.latent}x{options.latent} "
        f"({8 * options.latent} px), {options.dtype}, {options.repeats} repeats a side in turn; "
        f"seed {options.seed}, commit {commit()}, {machine(options.device)}{_versions()}"
    )
    print(
        f"{'':11}{'':18}{'median s':>10}{'least s':>10}{'ratio':>8}{'of least':>10}"
        f"{'processor':>11}{'peak MB':>9}"
    )
    for name in options.models:
        for line in compare(name, options):
            print(line, flush=True)
        gc.collect()


def _versions() -> str:
    import diffusers

    return f", diffusers {diffusers.__version__}"


def compare(name: str, options: argparse.Namespace) -> list[str]:
    """Measure a model and return its rows."""
    title, config = MODELS[name]
    macs = macs_of(config, options)  # inference mode would hide operations from the counter
    with torch.inference_mode():
        return _compare(title, config, macs, options)


def _compare(title: str, config: UNetConfig, macs: float, options: argparse.Namespace) -> list[str]:
    """Time all sides in turn."""
    device, dtype = options.device, DTYPES[options.dtype]
    ours = random_unet(config, options.seed, device, dtype)
    theirs = same_in_diffusers(ours)
    work = make_work(config, options, dtype)
    steps = steps_of(ours, theirs, work)
    first = {side: step() for side, step in steps.items()}
    away = max(_away(one, first[THEIRS]) for one in first.values())
    peaks = {side: peak_memory(step, device) for side, step in steps.items()}
    for _ in range(_WARM_UP):
        for step in steps.values():
            step()
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    processor: dict[str, list[float]] = {side: [] for side in steps}
    for repeat in range(options.repeats):
        for side in list(steps) if repeat % 2 == 0 else list(steps)[::-1]:
            wall_s, processor_s = timed(steps[side], device)
            seconds[side].append(wall_s)
            processor[side].append(processor_s)
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    lines = [
        f"{title}: {parameters:,} parameters, {macs / 1e9:,.1f} GMACs; "
        f"predictions differ by {away:.1e} of their deviation at most"
    ]
    for side in steps:
        ratios = [
            statistics.median(seconds[side]) / statistics.median(seconds[THEIRS]),
            min(seconds[side]) / min(seconds[THEIRS]),
            statistics.median(processor[side]) / statistics.median(processor[THEIRS]),
        ]
        found = peaks[side]
        peak = "-" if found is None else f"{found / 1e6:.0f}"
        lines.append(
            f"{'':11}{side:18}{statistics.median(seconds[side]):10.4f}{min(seconds[side]):10.4f}"
            f"{ratios[0]:8.2f}{ratios[1]:10.2f}{ratios[2]:11.2f}{peak:>9}"
        )
    return lines


def random_unet(config: UNetConfig, seed: int, device: torch.device, dtype: torch.dtype) -> UNet:
    """Return a U-Net of random weights, none of them zero, made in their number format."""
    network = build_on_meta(UNet, config, "the benchmark").to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.normal_(std=_STD, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    return network.eval().requires_grad_(False)


def same_in_diffusers(ours: UNet) -> nn.Module:
    """Return diffusers' network over our network's own tensors.

    Raises:
        UserError: diffusers is not installed.
    """
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise UserError('diffusers is not installed; pip install -e ".[test]"') from error
    content = unet_config_of(ours.config, UNetSpec("benchmark").sample_size)
    with torch.device("meta"):
        theirs: Any = UNet2DConditionModel(
            **{key: value for key, value in content.items() if key != "_class_name"}
        )
    theirs.load_state_dict(ours.state_dict(), assign=True)
    network: nn.Module = theirs.eval().requires_grad_(False)
    return network


def make_work(config: UNetConfig, options: argparse.Namespace, dtype: torch.dtype) -> Work:
    """Draw latents and a text; the picture's sizes are those of its latents."""
    generator = torch.Generator().manual_seed(options.seed)
    count, side = options.batch_size, options.latent

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(options.device, dtype)

    hidden = randn(count, _TOKENS, config.text_channels)
    cond = UNetCondition(hidden)
    if config.text_pooled_channels is not None:
        px = 8.0 * side
        sizes = torch.tensor([px, px, 0.0, 0.0, px, px]).expand(count, NUM_SIZES)
        cond = UNetCondition(
            hidden, randn(count, config.text_pooled_channels), sizes.to(options.device)
        )
    timesteps = torch.full((count,), _TIMESTEP, device=options.device)
    return Work(randn(count, config.in_channels, side, side), timesteps, cond)


def steps_of(ours: UNet, theirs: nn.Module, work: Work) -> dict[str, Step]:
    """Return each side's step."""
    cond = work.cond
    prepared: UNetPrepared = ours.prepare(cond)
    added: dict[str, Any] = {}
    if cond.text_pooled is not None:
        added = {"added_cond_kwargs": {"text_embeds": cond.text_pooled, "time_ids": cond.sizes}}

    def call_theirs() -> Tensor:
        out: tuple[Tensor, ...] = theirs(
            work.latents,
            work.timesteps,
            encoder_hidden_states=cond.text_hidden,
            return_dict=False,
            **added,
        )
        return out[0]

    return {
        "here": lambda: ours(work.latents, work.timesteps, prepared),
        "here, unprepared": lambda: ours(work.latents, work.timesteps, cond),
        THEIRS: call_theirs,
    }


def _away(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().std())


def macs_of(config: UNetConfig, options: argparse.Namespace) -> float:
    """Count the multiply-accumulates of an unprepared step, on the meta device."""
    network = build_on_meta(UNet, config, "the benchmark")
    count, side = options.batch_size, options.latent
    with torch.device("meta"):
        latents = torch.empty(count, config.in_channels, side, side)
        cond = UNetCondition(torch.empty(count, _TOKENS, config.text_channels))
        if config.text_pooled_channels is not None:
            pooled = torch.empty(count, config.text_pooled_channels)
            cond = UNetCondition(cond.text_hidden, pooled, torch.empty(count, NUM_SIZES))
        timesteps = torch.empty(count)
    with FlopCounter() as counter:
        network(latents, timesteps, cond)
    return counter.total / 2


if __name__ == "__main__":
    raise SystemExit(run_main(main))
