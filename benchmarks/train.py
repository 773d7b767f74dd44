"""Seconds of a training step of Stage C, here and in a plain loop over diffusers' network.

``python benchmarks/train.py`` trains on random latents and text states, at the demonstration's size
and at the published lite size: noise, forward pass, v loss, backward pass, clipped gradients,
AdamW. "Here" is the loss, network and optimizer that ``python -m train stage_c`` runs with AdamW,
which is fused; "diffusers" is ``StableCascadeUNet`` in a loop of a dozen lines with torch's AdamW
as it comes, in the same number format, with the same weights, inputs and noise. Both losses of the
first step are printed: the same work gives the same loss. Blocks of steps alternate between the two
in one process.

MFU is the share of the machine's peak that the network's own operations take (counted by torch on
the meta device, so that both are divided by the same count); the peak is the data sheet's for known
GPUs, else the best of a few large matrix products of this run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.checkpoints.files import build_on_meta  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.config import load_yaml  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.flops import FlopCounter  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from cascade.tools.convert import family_for  # noqa: E402
from cascade.tools.diffusers_names import diffusers_config  # noqa: E402
from stages.stage_c import StageC, StageCCondition, StageCConfig  # noqa: E402
from train.draws import StepDraws  # noqa: E402
from train.flops import peak_flops  # noqa: E402
from train.losses.denoising import DiffusionConfig, denoising_loss, noise_batch  # noqa: E402
from train.optim import make_optimizer  # noqa: E402
from train.settings import OptimConfig  # noqa: E402
from train.systems.stage_c import StageCRun  # noqa: E402

SIZES = ("demo", "lite")
_TOKENS = {"demo": 36, "lite": 77}
_LATENT_SIDE = {"demo": 6, "lite": 24}
_WARM_UP = 2
_OPTIM = OptimConfig(lr=1e-4, warmup_steps=1)
_DIFFUSION = DiffusionConfig(prediction="v", weight="constant")

Step = Callable[[int], float]


@dataclass(frozen=True)
class Work:
    """What both sides train on; the same at every step but for the noise."""

    latents: Tensor  # (B, 16, h, w)
    text_hidden: Tensor  # (B, L, D)
    text_pooled: Tensor  # (B, P)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="benchmarks/train.py",
        description="A training step of Stage C here and over diffusers' network.",
    )
    parser.add_argument("--sizes", default="demo", help="of demo, lite; comma-separated")
    parser.add_argument(
        "--batch-size", type=int, default=0, help="default: 64 for demo, 4 for lite"
    )
    parser.add_argument("--blocks", type=int, default=5, help="blocks of steps a side; default 5")
    parser.add_argument("--steps", type=int, default=3, help="steps a block; default 3")
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="hold one side at a time, built anew for each of its blocks: half the memory",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parse_all(parser, sys.argv[1:] if arguments is None else arguments)
    options.sizes = options.sizes.split(",")
    for size in options.sizes:
        if size not in SIZES:
            raise UserError(f"--sizes {size!r}: of {', '.join(SIZES)}")
    for name in ("blocks", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each size and print its table."""
    options = parse(arguments)
    device = torch.device(options.device)
    print(f"A step of Stage C; seed {options.seed}, commit {commit()}, {machine(device)}")
    peak = peak_flops(device, torch.bfloat16)
    print(f"peak in bfloat16: {peak / 1e12:.2f} TFLOP/s")
    for size in options.sizes:
        for line in compare(size, options, device, peak):
            print(line, flush=True)
        gc.collect()


def config_of(size: str) -> StageCConfig:
    """Return the network of a size."""
    if size == "lite":
        return replace(StageCConfig.lite(), dropout=0.0)  # what is dropped differs between sides
    sizes = load_yaml(StageCRun, ROOT / "configs" / "demo" / "stage_c.yaml").model
    assert sizes is not None, "the demonstration's file names its sizes"
    return replace(sizes.plain(), qk_norm=False)  # diffusers knows no QK-norm


def compare(size: str, options: argparse.Namespace, device: torch.device, peak: float) -> list[str]:
    """Time both sides in alternating blocks and return the lines of a table."""
    config = config_of(size)
    batch_size = options.batch_size or {"demo": 64, "lite": 4}[size]
    work = make_work(size, config, batch_size, options.seed, device)
    builders: dict[str, Callable[[], Step]] = {
        "here": lambda: our_step(make_network(config, options.seed, device), work, options.seed),
        "diffusers": lambda: their_step(
            make_network(config, options.seed, device), work, options.seed, device
        ),
    }
    parameters, flops = count(config, work)
    first: dict[str, float] = {}
    steps: dict[str, Step] = {}

    def warm(name: str) -> Step:
        """Return a side's step, built and run in where it is not there."""
        if name not in steps:
            if options.in_turn:
                steps.clear()
                gc.collect()
            step = builders[name]()
            first[name] = step(0)
            for number in range(1, _WARM_UP):
                step(number)
            steps[name] = step
        return steps[name]

    if not options.in_turn:
        for name in builders:
            warm(name)
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    number = _WARM_UP
    for block in range(options.blocks):
        for name in list(builders) if block % 2 == 0 else list(builders)[::-1]:
            step = warm(name)
            started_s = time.perf_counter()
            for offset in range(options.steps):
                step(number + offset)  # reads the loss, and so waits for the device
            seconds[name].append((time.perf_counter() - started_s) / options.steps)
            del step
        number += options.steps
    lines = [
        f"{size}: {parameters:,} parameters, batch {batch_size}, "
        f"latents {tuple(work.latents.shape[1:])}, {flops / 1e12:.3f} TFLOP a step",
        f"{'':10}{'step s':>10}{'least':>10}{'images/s':>10}{'MFU':>8}{'first loss':>12}",
    ]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median_s in medians.items():
        lines.append(
            f"{name:10}{median_s:10.3f}{min(seconds[name]):10.3f}{batch_size / median_s:10.2f}"
            f"{flops / median_s / peak:8.1%}{first[name]:12.5f}"
        )
    least = {name: min(values) for name, values in seconds.items()}
    lines.append(
        f"ratio here / diffusers: {medians['here'] / medians['diffusers']:.2f} "
        f"(least {least['here'] / least['diffusers']:.2f})"
    )
    return lines


def make_network(config: StageCConfig, seed: int, device: torch.device) -> StageC:
    """Return the network of a seed, without the zeros of its start."""
    torch.manual_seed(seed)
    network = StageC(config).to(device)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1 and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)  # they would hide differences
    return network


def make_work(
    size: str, config: StageCConfig, batch_size: int, seed: int, device: torch.device
) -> Work:
    """Draw random latents and text states."""
    generator = torch.Generator().manual_seed(seed)
    side = _LATENT_SIDE[size]

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    return Work(
        randn(batch_size, config.latent_channels, side, side),
        randn(batch_size, _TOKENS[size], config.text_channels),
        randn(batch_size, config.text_pooled_channels),
    )


def our_step(network: StageC, work: Work, seed: int) -> Step:
    """Return a step of what ``python -m train stage_c`` runs."""
    optimizer, _ = make_optimizer(network.parameters(), _OPTIM, 1000)
    cond = StageCCondition(text_hidden=work.text_hidden, text_pooled=work.text_pooled)
    device = work.latents.device.type

    def step(number: int) -> float:
        noised = noise_batch(work.latents, _DIFFUSION, StepDraws(seed, number))
        with torch.autocast(device, torch.bfloat16):
            predicted = network(noised.x_t, noised.network_time, cond)
        loss, _ = denoising_loss(predicted, noised)
        return finish(loss, network, optimizer)

    return step


def their_step(ours: StageC, work: Work, seed: int, device: torch.device) -> Step:
    """Return a step of a plain loop over diffusers' network with the same weights."""
    try:
        from diffusers.models.unets import StableCascadeUNet
    except ImportError as error:
        raise UserError('diffusers is not installed; pip install -e ".[test]"') from error

    config = {k: v for k, v in diffusers_config(ours.config).items() if k != "_class_name"}
    network = StableCascadeUNet(**config).to(device)
    network.load_state_dict(family_for(ours).to_layout["diffusers"](ours.state_dict(), ours.config))
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=_OPTIM.lr, betas=_OPTIM.betas, weight_decay=_OPTIM.weight_decay
    )
    no_image = None
    if ours.config.image_channels is not None:
        no_image = torch.zeros(len(work.latents), 1, ours.config.image_channels, device=device)

    def step(number: int) -> float:
        noised = noise_batch(work.latents, _DIFFUSION, StepDraws(seed, number))
        with torch.autocast(device.type, torch.bfloat16):
            predicted = network(
                sample=noised.x_t,
                timestep_ratio=noised.network_time,
                clip_text_pooled=work.text_pooled[:, None],
                clip_text=work.text_hidden,
                clip_img=no_image,
                return_dict=False,
            )[0]
        loss = nn.functional.mse_loss(predicted.float(), noised.target)
        return finish(loss, network, optimizer)

    return step


def finish(loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Go backward and step; return the loss, which waits for the device."""
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def count(config: StageCConfig, work: Work) -> tuple[int, float]:
    """Count parameters, and the operations of a forward and a backward pass, without either."""
    network: Any = build_on_meta(StageC, config, "the benchmark")
    like = [torch.empty(one.shape, device="meta") for one in (work.latents, work.text_hidden)]
    pooled = torch.empty(work.text_pooled.shape, device="meta")
    cond = StageCCondition(text_hidden=like[1], text_pooled=pooled)
    with FlopCounter() as counter:
        predicted = network(like[0], torch.empty(len(like[0]), device="meta"), cond)
        predicted.sum().backward()
    return sum(parameter.numel() for parameter in network.parameters()), counter.total


if __name__ == "__main__":
    raise SystemExit(run_main(main))
