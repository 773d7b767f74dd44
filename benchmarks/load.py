"""Seconds and memory of loading Stable Cascade lite, here and in diffusers, in one run.

``python benchmarks/load.py`` writes a random model of the published sizes (Stage C 1B, Stage B 700M
and Stage A, bfloat16, 3.5 GB) twice: as the authors' single files, and as diffusers' folders. It is
loaded

* here, from the files, with ``cascade.checkpoints.load.load_any``,
* here, from the folders: keys and values, which are one tensor here, are two there and are copied,
* with diffusers' ``from_pretrained(torch_dtype=torch.bfloat16)`` from the folders. Its default is
  its economical way (``low_cpu_mem_usage``) where accelerate is installed.

No text encoder is loaded: diffusers leaves that to transformers. Each loading has a process of its
own, in turn. What is equal for all: the files are in the page cache; imports, and a
first loading of a tiny model, come before the clock and the memory's zero; afterwards a number of
every page of every weight is read, because a memory-mapped weight that nobody read is not in memory
and was not waited for. Seconds and memory are those after that reading; on a busy machine the
seconds of a processor say more than those of the clock.

Memory is the peak of the resident set (VmHWM), once as a whole and once above what the process had
before. It counts anonymous memory and mapped pages of files alike; the state at the end is told
apart, since the system can drop mapped pages, and shares them among processes.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cascade.checkpoints.files import build_on_meta
from cascade.command import Parser, parse_all
from cascade.errors import UserError, run_main
from cascade.tools.convert import family_for
from cascade.tools.diffusers_names import diffusers_config
from stages.stage_a import StageA, StageAConfig
from stages.stage_b import StageB, StageBConfig
from stages.stage_c import StageC, StageCConfig

ROOT = Path(__file__).resolve().parents[1]
SIDES = {"files": "here", "folders": "here, folders", "diffusers": "diffusers"}
"""Titles of the loaders of ``benchmarks/load_once.py``."""
THEIRS = "diffusers"
NETWORKS = {"prior_lite": StageC, "decoder_lite": StageB, "vqgan": StageA}
FULL = {
    "prior_lite": StageCConfig.lite(),
    "decoder_lite": StageBConfig.lite(),
    "vqgan": StageAConfig(),
}
SMALL = {
    "prior_lite": StageCConfig(
        cond_channels=64,
        hidden_channels=(64, 64),
        num_heads=(1, 1),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        text_channels=32,
        text_pooled_channels=32,
        image_channels=16,
    ),
    "decoder_lite": StageBConfig(
        cond_channels=64,
        hidden_channels=(16, 64),
        num_heads=(0, 1),
        down_blocks=(1, 1),
        up_blocks=(1, 1),
        up_repeats=(1, 1),
        text_pooled_channels=32,
        dropout=(0.0, 0.0),
    ),
    "vqgan": StageAConfig(
        channels=(8, 16), encoder_blocks=(1, 1), decoder_blocks=(2, 1), codebook_size=16
    ),
}
_SHOWN = ("torch", "safetensors", "diffusers", "accelerate")
_NOISE_VALUES = 1 << 22
_SPARE_BYTES = 1 << 30
_MB = 1e-6
_COLUMNS = (
    ("seconds", "ready_s", 1.0),
    ("least", "least", 1.0),
    ("processor", "cpu_s", 1.0),
    ("returned", "load_s", 1.0),
    ("peak MB", "peak_bytes", _MB),
    ("above start", "above", _MB),
    ("of weights", "share", 1.0),
    ("anonymous", "anonymous_bytes", _MB),
    ("mapped", "mapped_bytes", _MB),
)
"""Medians, but for the least seconds; "returned" is when the loader returned, before all weights
were read; "anonymous" and "mapped" are those at the end."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    small: bool
    repeats: int
    seed: int
    keep: Path | None


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = Parser(
        prog="benchmarks/load.py",
        description="Seconds and memory of loading Stable Cascade lite, here and in diffusers.",
    )
    parser.add_argument("--small", action="store_true", help="a tiny model: a test of this script")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="a side; default 5")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="a new folder for the model, which stays (default: a temporary one, which does not)",
    )
    found = parse_all(parser, sys.argv[1:] if arguments is None else arguments)
    if found.repeats < 1:
        raise UserError(f"--repeats {found.repeats}: at least 1 is needed")
    return Options(found.small, found.repeats, found.seed, found.keep)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model, load it on both sides, print the figures, remove the model."""
    options = parse(arguments)
    _check_system()
    if options.keep is None:
        with tempfile.TemporaryDirectory(prefix="cascade-load-") as folder:
            _compare(options, Path(folder))
        return
    if options.keep.exists():
        raise UserError(f"{options.keep}: is there already; name a new folder")
    options.keep.mkdir(parents=True)
    _compare(options, options.keep)
    print(f"the model is in {options.keep}")


def _check_system() -> None:
    from cascade.evaluate.process_memory import is_measurable

    if not is_measurable():
        raise UserError("memory is read from Linux's /proc, which is not here")
    try:
        importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError('diffusers is not installed; pip install -e ".[test]"') from error


# The model


def write_model(folder: Path, configs: dict[str, Any], seed: int) -> int:
    """Write random networks in bfloat16, as single files and as folders of diffusers.

    The metadata is that of published files, which say nothing of the network.

    Returns:
        The bytes of the single files.

    Raises:
        UserError: If the disk is too full.
    """
    noise = torch.randn(_NOISE_VALUES, generator=torch.Generator().manual_seed(seed))
    noise = (0.02 * noise).to(torch.bfloat16)
    folder.mkdir(exist_ok=True)
    total = 0
    for name, config in configs.items():
        network: nn.Module = build_on_meta(NETWORKS[name], config, name)
        size = sum(2 * tensor.numel() for tensor in network.state_dict().values())
        if shutil.disk_usage(folder).free < 2 * size + _SPARE_BYTES:
            raise UserError(f"{folder}: {name} needs {2 * size / 1e9:.1f} GB; the disk is too full")
        state = {key: _random(value, noise) for key, value in network.state_dict().items()}
        layouts = family_for(network).to_layout
        (folder / name).mkdir()
        paths = {
            "original": folder / f"{name}.safetensors",
            "diffusers": folder / name / "diffusion_pytorch_model.safetensors",
        }
        for layout, path in paths.items():
            save_file(layouts[layout](state, config), path, metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(diffusers_config(config)))
        total += paths["original"].stat().st_size
    return total


def _random(like: Tensor, noise: Tensor) -> Tensor:
    """Return noise of a shape; one block of it over and over, since only its amount matters."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    count = like.numel()
    return noise.repeat(math.ceil(count / len(noise)))[:count].view(like.shape).clone()


# The comparison


def _compare(options: Options, folder: Path) -> None:
    size = write_model(folder / "model", SMALL if options.small else FULL, options.seed)
    write_model(folder / "warm_up", SMALL, options.seed)
    print(
        f"Loading {'a tiny random' if options.small else 'a random'} Stable Cascade lite "
        f"({', '.join(NETWORKS)}; {size / 1e9:.3g} GB in bfloat16) on the CPU"
    )
    print(f"seed {options.seed}, {options.repeats} repeats each, in turn; {_machine()}", flush=True)
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for repeat in range(options.repeats):
        for side in list(SIDES) if repeat % 2 == 0 else list(SIDES)[::-1]:
            _read_files(folder)
            figures[side].append(_run(side, folder))
    for line in report(figures):
        print(line)


def _machine() -> str:
    versions = [f"Python {platform.python_version()}"]
    for name in _SHOWN:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"commit {_commit()}; {platform.platform()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads; {', '.join(versions)}"
    )


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _read_files(folder: Path) -> None:
    """Bring the weights into the page cache, so that no side waits for the disk."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def _run(side: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load_once", side]
    command += [str(folder / "model"), str(folder / "warm_up")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"loading {side} failed: {last}")
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def report(figures: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return the lines of a table: medians, and the ratios to diffusers."""
    lines = [f"{'':13}" + "".join(f"{title:>12}" for title, _, _ in _COLUMNS)]
    medians: dict[str, dict[str, float]] = {}
    for side, runs in figures.items():
        values = {name: [run[name] for run in runs] for name in runs[0]}
        values["above"] = [run["peak_bytes"] - run["before_bytes"] for run in runs]
        median = {name: statistics.median(found) for name, found in values.items()}
        median["least"] = min(values["ready_s"])
        median["share"] = median["above"] / median["weight_bytes"]
        medians[side] = median
        cells = [f"{median[name] * scale:12.{_digits(scale)}f}" for _, name, scale in _COLUMNS]
        lines.append(f"{SIDES[side]:13}" + "".join(cells))
    theirs = medians.pop(THEIRS)
    for side, median in medians.items():
        lines.append(
            f"ratio {SIDES[side]} / {SIDES[THEIRS]}: "
            f"seconds {median['ready_s'] / theirs['ready_s']:.2f} "
            f"(least {median['least'] / theirs['least']:.2f}, "
            f"of a processor {median['cpu_s'] / theirs['cpu_s']:.2f}), "
            f"peak memory {median['peak_bytes'] / theirs['peak_bytes']:.2f} "
            f"(above start {median['above'] / theirs['above']:.2f})"
        )
    return lines


def _digits(scale: float) -> int:
    return 0 if scale == _MB else 2


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(run_main(main))
