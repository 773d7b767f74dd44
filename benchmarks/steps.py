r"""Steps against quality: a plain stage at few and many steps, and its student for few beside it.

``python benchmarks/steps.py --few runs/demo/stage_c_few`` draws held-out prompts with the plain
Stage C of ``--model``, with and without guidance, and with the student of ``--few`` (without it,
with the one in the model's folder), and prints how often the demonstration's CLIP finds a
picture's prompt among 100 (agreement), the Frechet distance of CLIP's features from those of the
real pictures of the split, and how far the pictures are from those that the plain stage draws of
the same noise in the most steps, guided (PSNR of the pixels). ``--stage stage_b`` does the same of
Stage B, on pictures whose Stage C is the model's plain one. Of several students, one for each seed
of training, a row is their mean and standard deviation.

Passes are runs of the stage's network for one picture. Distances of a few hundred pictures are
biased upwards, all of a table by the same: compare them with each other alone.
"""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.checkpoints.files import load_network  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.clip_scorer import ClipScorer  # noqa: E402
from cascade.evaluate.distances import frechet_distance, gaussian_of, matrix_root  # noqa: E402
from cascade.evaluate.retrieval import (  # noqa: E402
    agreement,
    derangement,
    true_ranks,
)
from cascade.pipelines.cascade import CascadePipeline  # noqa: E402
from cascade.pipelines.spec import Stage, StageSampling  # noqa: E402
from stages.stage_b import StageB  # noqa: E402
from stages.stage_c import StageC  # noqa: E402
from train.assemble import sampling_said  # noqa: E402
from train.study.demo_figures import Asked, ask, pixels_of  # noqa: E402
from train.study.held_out import Split, read_folder, read_splits  # noqa: E402
from train.study.provenance import commit, machine  # noqa: E402

_log = logging.getLogger(__name__)
BATCH_SIZE = 25
NUM_CANDIDATES = 100


@dataclass(frozen=True)
class Way:
    """One way to sample the stage: a row of the table."""

    name: str
    networks: tuple[StageB | StageC, ...]
    """One, or one of each seed of training."""
    sampling: StageSampling

    @property
    def passes(self) -> int:
        """Runs of the network for one picture."""
        return self.sampling.steps * (2 if self.sampling.is_guided_by_passes else 1)


def ways_of(
    plain: tuple[StageB | StageC, StageSampling],
    few: tuple[tuple[StageB | StageC, ...], StageSampling] | None,
    steps: Sequence[int],
    few_steps: Sequence[int],
    guidance: float | None,
    few_guidance: Sequence[float] = (),
    few_times: Sequence[float] = (),
) -> Iterator[Way]:
    """Yield the rows: the plain network without and with guidance, then the student.

    Args:
        plain: The plain network, and how its model samples it.
        few: The students, and how their files say that they are sampled; None: there are none.
        steps: Of the plain network.
        few_steps: Of the student.
        guidance: Of the plain network; None: its model's.
        few_guidance: What the student is told, one after the other; none: what its file says.
        few_times: Where the student's steps lie in one row more; none: no such row.
    """
    network, own = plain
    scale = own.guidance if guidance is None else guidance
    for scale_now in dict.fromkeys((1.0, scale)):
        for count in steps:
            asked = replace(own, steps=count, times=(), guidance=scale_now)
            yield Way("plain", (network,), asked)
    if few is None:
        return
    students, own = few
    name = "student" if len(students) == 1 else f"{len(students)} students"
    for scale in few_guidance or (own.guidance,):
        for count in few_steps:
            times = own.times if count == own.steps else ()
            yield Way(name, students, replace(own, steps=count, times=times, guidance=scale))
        if few_times:
            count, times = len(few_times) - 1, tuple(few_times)
            yield Way(name, students, replace(own, steps=count, times=times, guidance=scale))


@dataclass(frozen=True)
class Drawn:
    """What one network drew of all prompts."""

    vectors: Tensor
    """CLIP's features, (N, D)."""
    pixels: Tensor
    """uint8 (N, 3, H, W)."""
    seconds: float
    """Of the stage for one picture."""


def draw(
    pipeline: CascadePipeline,
    stage: Stage,
    network: StageB | StageC,
    sampling: StageSampling,
    scorer: ClipScorer,
    asked: Asked,
    seed: int,
) -> Drawn:
    """Draw every prompt, prompt k with seed ``seed + k``."""
    setattr(pipeline, stage, network)
    plain = replace(pipeline.spec, stage_b_few=None, stage_c_few=None)
    pipeline.spec = replace(plain, **{stage: sampling})  # type: ignore[arg-type]
    vectors, pixels, seconds = [], [], 0.0
    for first in range(0, len(asked.prompts), BATCH_SIZE):
        prompts = asked.prompts[first : first + BATCH_SIZE]
        seeds = [seed + first + index for index in range(len(prompts))]
        output = pipeline(prompts, seeds=seeds, batch_size=BATCH_SIZE, progress=False)
        vectors.append(scorer.embed_pictures(output.pixels))
        pixels.append((output.pixels * 255).round().clamp(0, 255).byte())
        seconds += output.seconds[stage]
    return Drawn(torch.cat(vectors), torch.cat(pixels), seconds / len(asked.prompts))


def psnr(pixels: Tensor, others: Tensor) -> float:
    """Return the mean over pictures of the peak signal-to-noise ratio, in dB; at most 99.

    Args:
        pixels: uint8 (N, 3, H, W).
        others: The same.
    """
    errors = (pixels.float() - others.float()).square().flatten(1).mean(dim=1)
    return float((10 * (255**2 / errors).log10()).clamp(max=99.0).mean())


def row(cells: Sequence[str]) -> str:
    """Return a line of the table."""
    return f"| {' | '.join(cells)} |"


def mean_and_spread(values: Sequence[float], number: str) -> str:
    """Return the mean, of several values with their standard deviation.

    Args:
        values: Of one seed of training each.
        number: How one is written, such as ``{:.1f} %``.
    """
    words = number.format(statistics.fmean(values))
    if len(values) == 1:
        return words
    return f"{words} ± {number.format(statistics.stdev(values)).removesuffix(' %')}"


def find_students(
    few: Sequence[Path], pipeline: CascadePipeline, stage: Stage
) -> tuple[tuple[StageB | StageC, ...], StageSampling] | None:
    """Return the students and how they are sampled; None: there are none.

    Raises:
        UserError: A file does not say how it is sampled, or another than the first.
    """
    if not few:
        if getattr(pipeline.spec, f"{stage}_few") is None:
            return None
        few = [pipeline.folder / f"{stage}_few.safetensors"]
    kind: type[StageB] | type[StageC] = StageC if stage == "stage_c" else StageB
    students: list[StageB | StageC] = []
    said: list[StageSampling] = []
    for one in few:
        path = one / f"{stage}.safetensors" if one.is_dir() else one
        sampling = sampling_said(str(path))
        if sampling is None:
            raise UserError(f"{path}: no student of train step_distil: it does not say its steps")
        said.append(sampling)
        if sampling != said[0]:
            raise UserError(f"{path}: is sampled otherwise than {few[0]}; compare them one by one")
        students.append(load_network(path, expect=kind, dtype=pipeline.dtypes.of(stage)))
    return tuple(students), said[0]


def real_features(scorer: ClipScorer, split: Split) -> Tensor:
    """Return the features of all real pictures of a split."""
    keys = [entry.key for entry in split.entries if entry.key in split.pixels]
    parts = [keys[first : first + 200] for first in range(0, len(keys), 200)]
    return torch.cat([scorer.embed_pictures(pixels_of(split, part)) for part in parts])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    parser = Parser(prog="python benchmarks/steps.py", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "weights/demo")
    parser.add_argument(
        "--few",
        type=Path,
        nargs="+",
        default=[],
        help="the student's file, or its run's folder; several: one of each seed of training",
    )
    parser.add_argument("--stage", choices=("stage_b", "stage_c"), default="stage_c")
    parser.add_argument("--shards", type=Path, default=Path("data/demo/test_combo"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's picture")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 20])
    parser.add_argument("--few-steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--guidance", type=float, help="of the plain stage (default: the model's)")
    parser.add_argument(
        "--few-guidance", type=float, nargs="+", default=[], help="what the student is told"
    )
    parser.add_argument(
        "--few-times", type=float, nargs="+", default=[], help="times of one row more, 1 to 0"
    )
    parser.add_argument("--dtype", default="float32", help="number format of the stages")
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stage: Stage = options.stage
    [split] = read_splits(read_folder(options.shards), options.prompts, 0).values()
    pipeline = CascadePipeline(options.model, device="cpu", dtype=options.dtype, few=frozenset())
    few = find_students(options.few, pipeline, stage)
    scorer = ClipScorer.from_folder(options.model / "text")
    asked = ask(split, scorer, NUM_CANDIDATES, torch.Generator().manual_seed(0))
    real = gaussian_of(real_features(scorer, split))
    root = matrix_root(real.covariance)
    mine = scorer.embed_pictures(pixels_of(split, [split.entries[i].key for i in split.asked]))
    shuffled = mine[derangement(len(mine), torch.Generator().manual_seed(0))]
    columns = ["network", "steps", "guidance", "passes", "first of 100", "first five", "Frechet"]
    print(row([*columns, "PSNR", "s"]))
    print("| --- " * (len(columns) + 2) + "|")

    def judged(vectors: Tensor) -> tuple[float, float, float]:
        marks = agreement(true_ranks(vectors, asked.vectors, asked.candidates))
        far = frechet_distance(real, gaussian_of(vectors), root)
        return 100 * marks.top_1.rate, 100 * marks.top_5.rate, far

    for name, vectors in (("real pictures", mine), ("shuffled", shuffled)):
        first, five, far = judged(vectors)
        print(row([name, "", "", "", f"{first:.1f} %", f"{five:.1f} %", f"{far:.4f}", "", ""]))
    started_s = time.perf_counter()
    plain = (getattr(pipeline, stage), getattr(pipeline.spec, stage))
    asks = (options.guidance, options.few_guidance, options.few_times)
    ways = list(ways_of(plain, few, options.steps, options.few_steps, *asks))
    longest = max((way for way in ways if way.name == "plain"), key=lambda way: way.passes)
    pictures = (scorer, asked, options.seed)
    reference = draw(pipeline, stage, plain[0], longest.sampling, *pictures)
    for way in ways:
        sampling, found = way.sampling, []
        for network in way.networks:
            drawn = reference
            if way is not longest:
                drawn = draw(pipeline, stage, network, sampling, *pictures)
            near = psnr(drawn.pixels, reference.pixels)
            found.append((*judged(drawn.vectors), near, drawn.seconds))
        at = f" ({', '.join(f'{time:g}' for time in sampling.times)})" if sampling.times else ""
        numbers = [way.name, f"{sampling.steps}{at}", f"{sampling.guidance:g}", str(way.passes)]
        written = ("{:.1f} %", "{:.1f} %", "{:.4f}", "{:.1f}", "{:.3f}")
        measured = [
            mean_and_spread(values, number)
            for values, number in zip(zip(*found, strict=True), written, strict=True)
        ]
        if way is longest:
            measured[3] = "itself"
        print(row([*numbers, *measured]), flush=True)
    print(
        f"\n{len(asked.prompts)} prompts of {split.name} against {real.count} real pictures; seeds "
        f"{options.seed} to {options.seed + len(asked.prompts) - 1}; {stage} as "
        f"{options.dtype}; commit {commit()}; {machine(torch.device('cpu'))}; "
        f"{time.perf_counter() - started_s:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
