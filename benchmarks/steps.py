r"""Steps against quality: a plain stage at few and many steps, and its student for few beside it.

``python benchmarks/steps.py --few runs/demo/stage_c_few`` draws held-out prompts with the plain
Stage C of ``--model``, with and without guidance, and with the student of ``--few`` (without it,
with the one in the model's folder), and prints how often the demonstration's CLIP finds a
picture's prompt among 100 (agreement), and the Frechet distance of CLIP's features from those of
the real pictures of the split. ``--stage stage_b`` does the same of Stage B, on pictures whose
Stage C is the model's plain one.

Passes are runs of the stage's network for one picture. Distances of a few hundred pictures are
biased upwards, all of a table by the same: compare them with each other alone.
"""

from __future__ import annotations

import logging
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
    Agreement,
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
    network: StageB | StageC
    sampling: StageSampling

    @property
    def passes(self) -> int:
        """Runs of the network for one picture."""
        return self.sampling.steps * (2 if self.sampling.is_guided_by_passes else 1)


def ways_of(
    plain: tuple[StageB | StageC, StageSampling],
    few: tuple[StageB | StageC, StageSampling] | None,
    steps: Sequence[int],
    few_steps: Sequence[int],
    guidance: float | None,
    few_guidance: Sequence[float] = (),
    few_times: Sequence[float] = (),
) -> Iterator[Way]:
    """Yield the rows: the plain network without and with guidance, then the student.

    Args:
        plain: The plain network, and how its model samples it.
        few: The student, and how its file says that it is sampled; None: there is none.
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
            yield Way("plain", network, asked)
    if few is None:
        return
    network, own = few
    for scale in few_guidance or (own.guidance,):
        for count in few_steps:
            times = own.times if count == own.steps else ()
            yield Way("student", network, replace(own, steps=count, times=times, guidance=scale))
        if few_times:
            count, times = len(few_times) - 1, tuple(few_times)
            yield Way("student", network, replace(own, steps=count, times=times, guidance=scale))


def embeddings(
    pipeline: CascadePipeline, stage: Stage, way: Way, scorer: ClipScorer, asked: Asked, seed: int
) -> tuple[Tensor, float]:
    """Draw every prompt, prompt k with seed ``seed + k``; return CLIP's features and the seconds.

    The seconds are those of the stage for one picture.
    """
    setattr(pipeline, stage, way.network)
    plain = replace(pipeline.spec, stage_b_few=None, stage_c_few=None)
    pipeline.spec = replace(plain, **{stage: way.sampling})  # type: ignore[arg-type]
    vectors, seconds = [], 0.0
    for first in range(0, len(asked.prompts), BATCH_SIZE):
        prompts = asked.prompts[first : first + BATCH_SIZE]
        seeds = [seed + first + index for index in range(len(prompts))]
        output = pipeline(prompts, seeds=seeds, batch_size=BATCH_SIZE, progress=False)
        vectors.append(scorer.embed_pictures(output.pixels))
        seconds += output.seconds[stage]
    return torch.cat(vectors), seconds / len(asked.prompts)


def row(name: str, steps: str, guidance: str, passes: str, found: Agreement, more: str) -> str:
    """Return a line of the table."""
    shares = [f"{100 * one.rate:.1f} %" for one in (found.top_1, found.top_5)]
    return "| " + " | ".join([name, steps, guidance, passes, *shares, more]) + " |"


def find_student(
    few: Path | None, pipeline: CascadePipeline, stage: Stage
) -> tuple[StageB | StageC, StageSampling] | None:
    """Return the student and how it is sampled; None: there is none.

    Raises:
        UserError: The file does not say how it is sampled.
    """
    if few is None:
        if getattr(pipeline.spec, f"{stage}_few") is None:
            return None
        few = pipeline.folder / f"{stage}_few.safetensors"
    path = few / f"{stage}.safetensors" if few.is_dir() else few
    sampling = sampling_said(str(path))
    if sampling is None:
        raise UserError(f"{path}: no student of train step_distil: it does not say its steps")
    kind: type[StageB] | type[StageC] = StageC if stage == "stage_c" else StageB
    return load_network(path, expect=kind, dtype=pipeline.dtypes.of(stage)), sampling


def real_features(scorer: ClipScorer, split: Split) -> Tensor:
    """Return the features of all real pictures of a split."""
    keys = [entry.key for entry in split.entries if entry.key in split.pixels]
    parts = [keys[first : first + 200] for first in range(0, len(keys), 200)]
    return torch.cat([scorer.embed_pictures(pixels_of(split, part)) for part in parts])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    parser = Parser(prog="python benchmarks/steps.py", description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "weights/demo")
    parser.add_argument("--few", type=Path, help="the student's file, or its run's folder")
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
    few = find_student(options.few, pipeline, stage)
    scorer = ClipScorer.from_folder(options.model / "text")
    asked = ask(split, scorer, NUM_CANDIDATES, torch.Generator().manual_seed(0))
    real = gaussian_of(real_features(scorer, split))
    root = matrix_root(real.covariance)
    mine = scorer.embed_pictures(pixels_of(split, [split.entries[i].key for i in split.asked]))
    shuffled = mine[derangement(len(mine), torch.Generator().manual_seed(0))]
    columns = ("network", "steps", "guidance", "passes", "first of 100", "first five", "Frechet")
    print(f"| {' | '.join(columns)} | s |")
    print("| --- " * (len(columns) + 1) + "|")
    for name, vectors in (("real pictures", mine), ("shuffled", shuffled)):
        marks = agreement(true_ranks(vectors, asked.vectors, asked.candidates))
        far = f"{frechet_distance(real, gaussian_of(vectors), root):.4f} | "
        print(row(name, "", "", "", marks, far))
    plain = (getattr(pipeline, stage), getattr(pipeline.spec, stage))
    started_s = time.perf_counter()
    asks = (options.guidance, options.few_guidance, options.few_times)
    for way in ways_of(plain, few, options.steps, options.few_steps, *asks):
        vectors, seconds = embeddings(pipeline, stage, way, scorer, asked, options.seed)
        found = agreement(true_ranks(vectors, asked.vectors, asked.candidates))
        more = f"{frechet_distance(real, gaussian_of(vectors), root):.4f} | {seconds:.3f}"
        sampling = way.sampling
        at = f" ({', '.join(f'{time:g}' for time in sampling.times)})" if sampling.times else ""
        numbers = (f"{sampling.steps}{at}", f"{sampling.guidance:g}", str(way.passes))
        print(row(way.name, *numbers, found, more), flush=True)
    print(
        f"\n{len(asked.prompts)} prompts of {split.name} against {real.count} real pictures; seeds "
        f"{options.seed} to {options.seed + len(asked.prompts) - 1}; {stage} as "
        f"{options.dtype}; commit {commit()}; {machine(torch.device('cpu'))}; "
        f"{time.perf_counter() - started_s:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
