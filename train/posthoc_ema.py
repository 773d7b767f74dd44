"""Make an average of any length after the run: ``python -m train.posthoc_ema --run OUT ...``.

The run must have been trained with ``posthoc_ema`` in its configuration. Lengths are relative
standard deviations: 0.1 averages over about a tenth of the run.

Reference: Karras et al., 2023, arXiv:2312.02696, algorithm 3.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from cascade.checkpoints.files import atomic_path, read_metadata
from cascade.checkpoints.written_tensors import save_tensors
from cascade.command import Parser, parse_all
from cascade.errors import UserError, run_main
from train.callbacks.posthoc_ema import FOLDER, LENGTH_KEY, STEP_KEY, exponent

_log = logging.getLogger(__name__)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Snapshot:
    """A stored average."""

    path: Path
    step: int
    length: float


def find_snapshots(run: Path, name: str) -> list[Snapshot]:
    """Return the stored averages of a network, by step.

    Raises:
        UserError: There are none.
    """
    found = []
    for path in sorted((run / FOLDER).glob(f"{name}_*.safetensors")):
        metadata = read_metadata(path)
        if LENGTH_KEY in metadata:
            found.append(Snapshot(path, int(metadata[STEP_KEY]), float(metadata[LENGTH_KEY])))
    if not found:
        raise UserError(
            f"{run / FOLDER}: no stored averages of {name}; train with posthoc_ema: "
            "{every_steps: 1000} in the run's configuration"
        )
    return sorted(found, key=lambda one: (one.step, one.length))


def solve(snapshots: Sequence[Snapshot], length: float, step: int) -> Floats:
    """Return each snapshot's factor in the average of ``length`` that ends at ``step``.

    The factors make the least squared difference of the averages' profiles.
    """
    steps = np.array([one.step for one in snapshots], dtype=np.float64)
    gammas = np.array([exponent(one.length) for one in snapshots])
    wanted_step, wanted_gamma = np.array([float(step)]), np.array([exponent(length)])
    gram = _overlap(steps[:, None], gammas[:, None], steps[None], gammas[None])
    right = _overlap(steps[:, None], gammas[:, None], wanted_step[None], wanted_gamma[None])
    return np.asarray(np.linalg.solve(gram, right)[:, 0])


def _overlap(step_a: Floats, gamma_a: Floats, step_b: Floats, gamma_b: Floats) -> Floats:
    """Return the inner product of two profiles ``t^gamma`` on [0, step], each of integral 1."""
    ratio = step_a / step_b
    power = np.where(step_a < step_b, gamma_b, -gamma_a)
    longest = np.maximum(step_a, step_b)
    top = (gamma_a + 1.0) * (gamma_b + 1.0) * ratio**power
    return np.asarray(top / ((gamma_a + gamma_b + 1.0) * longest))


def average(
    run: Path, name: str, length: float, out: Path, *, step: int | None = None, dtype: torch.dtype
) -> int:
    """Write the average of ``length`` that ends at ``step`` (None: at the last snapshot).

    Returns:
        The step.

    Raises:
        UserError: No snapshots, none at the step, or an impossible length.
    """
    snapshots = find_snapshots(run, name)
    last = snapshots[-1].step if step is None else step
    steps = sorted({one.step for one in snapshots})
    if last not in steps:
        raise UserError(f"--step {last}: stored are {', '.join(map(str, steps))}")
    used = [one for one in snapshots if one.step <= last]
    try:
        factors = solve(used, length, last)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    total: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for snapshot, factor in zip(used, factors.tolist(), strict=True):
        with safe_open(snapshot.path, framework="pt") as file:
            for key in file.keys():
                value = file.get_tensor(key)
                if not value.is_floating_point():
                    kept[key] = value  # of the last
                elif key in total:
                    total[key].add_(value, alpha=factor)
                else:
                    total[key] = value.double() * factor
    metadata = read_metadata(used[-1].path)
    metadata |= {"weights": "posthoc_ema", LENGTH_KEY: f"{length:g}"}
    state = {key: value.to(dtype).contiguous() for key, value in total.items()} | kept
    with atomic_path(out) as temporary:
        save_tensors(state, temporary, metadata)
    return last


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, average, say what was written."""
    parser = Parser(prog="python -m train.posthoc_ema", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--name", default="stage_c", help="which network (default: %(default)s)")
    parser.add_argument("--length", type=float, required=True, help="share of the run, up to 0.28")
    parser.add_argument("--step", type=int, help="where the average ends (default: at the last)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of --out"
    )
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    step = average(
        options.run,
        options.name,
        options.length,
        options.out,
        step=options.step,
        dtype=getattr(torch, options.dtype),
    )
    _log.info("wrote %s: length %g, up to step %d", options.out, options.length, step)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
