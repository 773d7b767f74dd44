"""Seconds from the start of Python: to an import, to ``--help``, to the first picture.

``python -m benchmarks.start_up`` prints them; ``benchmarks/sampling.py`` does so among others. Each
is a process of its own, in turn, with the files in the page cache. The picture is the
demonstration's, with its text encoder, its own sampler and steps, saved as a PNG. diffusers does
the same with the same weights, from the folders that ``cascade.tools convert`` writes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.command import Parser, parse_all  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.cost import Spread, spread_of  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from cascade.sample_options import DEMO_MODEL  # noqa: E402

PLAIN, TORCH = "python alone", "import torch"
PACKAGE, IMPORT = "import cascade", "import of the pipeline"
HELP, PICTURE = "sample.py --help", "sample.py, first picture"
THEIR_IMPORT, THEIR_PICTURE = "diffusers: import", "diffusers: first picture"
_PROMPT = "a 3D render of a red apple"
_THEIR_MODULES = "diffusers.pipelines.stable_cascade.pipeline_stable_cascade"
_THEIRS = """
import json
import sys
from pathlib import Path
import torch
from diffusers import (
    DDIMScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline, StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
folder, prompt, px, steps_c, guidance_c, steps_b, guidance_b, out = sys.argv[1:]
second = Path(folder) / "decoder"
prior = StableCascadePriorPipeline.from_pretrained(Path(folder) / "prior")
decoder = StableCascadeDecoderPipeline(  # its folder names a library that diffusers has moved
    decoder=StableCascadeUNet.from_pretrained(second / "decoder"),
    tokenizer=prior.tokenizer,
    text_encoder=prior.text_encoder,
    scheduler=DDIMScheduler.from_pretrained(second / "scheduler"),
    vqgan=PaellaVQModel.from_pretrained(second / "vqgan"),
    latent_dim_scale=json.loads((second / "model_index.json").read_text())["latent_dim_scale"],
)
for one in (prior, decoder):
    one.set_progress_bar_config(disable=True)
told = prior(
    prompt, height=int(px), width=int(px), num_inference_steps=int(steps_c),
    guidance_scale=float(guidance_c), generator=torch.Generator().manual_seed(0),
)
image = decoder(
    told.image_embeddings, prompt, num_inference_steps=int(steps_b),
    guidance_scale=float(guidance_b), generator=torch.Generator().manual_seed(0),
).images[0]
image.save(out)
"""


@dataclass(frozen=True)
class StartUp:
    """Seconds of a process from its start to its end."""

    name: str
    seconds: Spread


def measure(repeats: int) -> list[StartUp]:
    """Run each process ``repeats`` times, in turn, and return what they took.

    Raises:
        UserError: A process failed, or the demonstration's model is not there.
    """
    with tempfile.TemporaryDirectory(prefix="cascade-start-") as folder:
        commands = _commands(Path(folder))
        for command in commands.values():  # brings files into the page cache
            _seconds(command)
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(repeats):
            for name, command in commands.items():
                taken[name].append(_seconds(command))
    return [StartUp(name, spread_of(values)) for name, values in taken.items()]


def _commands(folder: Path) -> dict[str, list[str]]:
    from cascade.pipelines.spec import load_spec
    from cascade.tools.convert import convert

    spec = load_spec(DEMO_MODEL)
    convert(_twin(folder / "twin"), "diffusers", folder / "diffusers", torch.float32)
    stages = (spec.stage_c, spec.stage_b)
    sampling = [str(value) for one in stages for value in (one.steps, one.guidance)]
    sample = str(ROOT / "sample.py")
    return {
        PLAIN: ["-c", "pass"],
        TORCH: ["-c", "import torch"],
        PACKAGE: ["-c", "import cascade"],
        IMPORT: ["-c", "import cascade.pipelines.cascade"],
        THEIR_IMPORT: ["-c", f"import {_THEIR_MODULES}"],
        HELP: [sample, "--help"],
        PICTURE: [sample, "--prompt", _PROMPT, "--seed", "0", "--out", str(folder / "ours")],
        THEIR_PICTURE: [
            *("-c", _THEIRS, str(folder / "diffusers"), _PROMPT),
            *(str(spec.image_size), *sampling, str(folder / "theirs.png")),
        ],
    }


def _twin(folder: Path) -> Path:
    """Write the demonstration with a random Stage C of its size such as diffusers has."""
    from benchmarks.sampling_models import comparable
    from cascade.checkpoints.files import load_network, save_network
    from cascade.pipelines.spec import load_spec, save_spec
    from stages.stage_c import StageC

    shutil.copytree(DEMO_MODEL, folder)
    path = folder / "stage_c.safetensors"
    save_network(path, StageC(comparable(load_network(path, expect=StageC).config)))
    spec = load_spec(folder)
    stage_c = replace(spec.stage_c, prediction="epsilon", schedule="cosine")
    save_spec(replace(spec, stage_c=stage_c), folder)
    return folder


def _seconds(arguments: Sequence[str]) -> float:
    """Return what a process of Python takes."""
    started_s = time.perf_counter()
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    taken_s = time.perf_counter() - started_s
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"python {' '.join(arguments)[:60]} failed: {last}")
    return taken_s


def table(found: Sequence[StartUp]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"{'start-up':28}{'median s':>10}{'quartiles':>18}"]
    for one in found:
        spread = one.seconds
        quartiles = f"{spread.lower:.2f} to {spread.upper:.2f}"
        lines.append(f"{one.name:28}{spread.median:10.2f}{quartiles:>18}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = Parser(prog="benchmarks/start_up.py", description="Seconds from Python's start.")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default 5")
    options = parse_all(parser, sys.argv[1:] if arguments is None else arguments)
    if options.repeats < 1:
        raise UserError("--repeats must be at least 1")
    print(f"commit {commit()}, {machine(torch.device('cpu'))}")
    for line in table(measure(options.repeats)):
        print(line)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
