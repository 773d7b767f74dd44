"""How much of a U-Net's output comes from its inner levels.

``python benchmarks/unet_levels.py runs/demo_koala/unet --calibration configs/demo_koala/unet.yaml``
silences the middle and each block of the way up in turn (what it hands on becomes zero) and prints
the squared change of the output, as a share of the output, over noisings of real latents spread
over the schedule. A level whose silence changes nothing was not learned: whatever was trained looks
at the finer levels' skips alone, and a student without the level is as good as its teacher. Beside
it the deviation of what the first kernel of each of these blocks makes: where it grows far beyond 1
the norm behind it divides all that varies by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.checkpoints.load import build  # noqa: E402
from cascade.checkpoints.part_files import find_network  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.errors import run_main  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from stages.unet.unet import UNet  # noqa: E402
from train.distill.calibration import Calibration, calibrate  # noqa: E402
from train.distill.importance import output_error  # noqa: E402

CPU = torch.device("cpu")


@contextmanager
def silenced(block: nn.Module) -> Iterator[None]:
    """Let a block hand on zeros; the skips of the way down stay as they are."""
    # What it hands on comes first, then the features that were asked for.
    handle = block.register_forward_hook(
        lambda _, __, output: (torch.zeros_like(output[0]), *output[1:])
    )
    try:
        yield
    finally:
        handle.remove()


def inner_blocks(network: UNet) -> dict[str, nn.Module]:
    """Return the middle and the blocks of the way up but the last, by name."""
    middle = {} if network.mid_block is None else {"mid_block": network.mid_block}
    ups = list(network.up_blocks)[:-1]
    return {**middle, **{f"up_blocks.{index}": block for index, block in enumerate(ups)}}


def first_kernel(block: nn.Module) -> nn.Module:
    """Return the first convolution that reads the block's stream."""
    return cast(nn.Module, block.get_submodule("resnets.0.conv1"))


def measure(network: UNet, calibration: Calibration) -> dict[str, tuple[float, float]]:
    """Return each inner block's share of the output, and its first kernel's deviation."""
    predict = calibration.predictor(CPU, torch.float32, 16)
    deviations: dict[str, list[float]] = {}
    handles = [
        first_kernel(block).register_forward_hook(
            lambda _, __, output, name=name: deviations.setdefault(name, []).append(
                float(output.std())
            )
        )
        for name, block in inner_blocks(network).items()
    ]
    whole: Tensor = predict(network)
    for handle in handles:
        handle.remove()
    found = {}
    for name, block in inner_blocks(network).items():
        with silenced(block):
            change = output_error(predict(network), whole)
        found[name] = (change, sum(deviations[name]) / len(deviations[name]))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    parser = Parser(prog="python benchmarks/unet_levels.py", description=__doc__)
    parser.add_argument("unets", nargs="+", help="U-Nets, as make-student takes a teacher")
    parser.add_argument("--calibration", required=True, help="as of make-student --recipe auto")
    parser.add_argument("--count", type=int, default=64, help="noisings")
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    print("| U-Net | silenced | changes the output by | first kernel's deviation |")
    print("| --- | --- | --- | --- |")
    for name in options.unets:
        found = find_network(name, "unet")
        network = cast(UNet, build(found.opened, found.published, dtype=torch.float32))
        calibration = calibrate(
            options.calibration, network.config, count=options.count, latent_size=32
        )
        for block, (change, deviation) in measure(network, calibration).items():
            print(f"| {name} | {block} | {change:.1e} | {deviation:.2f} |")
    print(f"\n{calibration.described}, seed 0; commit {commit()}; {machine(CPU)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
