r"""Prompt agreement of the recipes that benchmarks/recipes.py trained.

``python benchmarks/recipes_agreement.py --runs runs/recipes`` puts the Stage C of each finished run
into the demonstration, draws the same prompts with the same seeds, and prints how often the
demonstration's CLIP finds a picture's prompt among 100. The prompts are of held-out combinations of
style and concept; real pictures and shuffled ones are the yardstick's own marks.

``--runs`` is what ``--out`` was there; ``--shards`` holds the held-out pictures. Students of a
U-Net are put into a model of their own kind::

    python benchmarks/recipes_agreement.py --recipes configs/demo_koala/switches.yaml \
        --runs runs/koala_switches --model runs/demo_koala/model --yardstick weights/demo/text
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.recipes import Recipe, read_recipes  # noqa: E402
from cascade.checkpoints.files import load_network, read_metadata  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.clip_scorer import ClipScorer  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from cascade.evaluate.retrieval import (  # noqa: E402
    Agreement,
    agreement,
    derangement,
    true_ranks,
)
from cascade.pipelines.cascade import CascadePipeline  # noqa: E402
from cascade.pipelines.trained import DIFFUSION_KEY  # noqa: E402
from cascade.pipelines.unet import UNetPipeline  # noqa: E402
from cascade.pipelines.unet_plan import UNetSettings  # noqa: E402
from stages.stage_c import StageC  # noqa: E402
from train.fit import DONE_FILE  # noqa: E402
from train.study.demo_figures import Asked, ask, pixels_of  # noqa: E402
from train.study.held_out import read_folder, read_splits  # noqa: E402

_log = logging.getLogger(__name__)
BATCH_SIZE = 50


@dataclass(frozen=True)
class Wish:
    """How the runs' networks are sampled; None: as the model says, or as they were trained."""

    sampler: str | None
    guidance: float | None


class CascadeRuns:
    """Draws with the demonstration, whose Stage C is a run's."""

    network = "stage_c"
    title = "Stage C"

    def __init__(self, model: Path, wish: Wish) -> None:
        """Load what all runs share."""
        self._pipeline = CascadePipeline.from_folder(model, device="cpu", dtype="float32")
        self._wish = wish

    def put_in(self, path: Path) -> None:
        """Draw with a run's Stage C from now on, as it was trained."""
        pipeline, wish = self._pipeline, self._wish
        pipeline.stage_c = load_network(path, expect=StageC, dtype=torch.float32)
        trained = json.loads(read_metadata(path)[DIFFUSION_KEY])
        if wish.sampler is not None:
            trained["sampler"] = wish.sampler
        if wish.guidance is not None:
            trained["guidance"] = wish.guidance
        spec = pipeline.spec
        pipeline.spec = replace(spec, stage_c=replace(spec.stage_c, **trained), stage_c_few=None)

    def draw(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Return the pixels of prompts: (B, 3, H, W)."""
        return self._pipeline(prompts, seeds=seeds, batch_size=BATCH_SIZE, progress=False).pixels

    def told(self) -> str:
        """Return how the last run's was sampled."""
        sampling = self._pipeline.spec.stage_c
        return f"{sampling.sampler}, guidance {sampling.guidance:g}"


class UNetRuns:
    """Draws with a model whose U-Net is a run's."""

    network = "unet"
    title = "U-Net"

    def __init__(self, model: Path, wish: Wish) -> None:
        """Take the model that lends the text encoder and the autoencoder."""
        self._model, self._wish = model, wish
        self._pipeline: UNetPipeline | None = None

    def put_in(self, path: Path) -> None:
        """Draw with a run's U-Net from now on."""
        self._pipeline = UNetPipeline.from_pretrained(
            self._model, unet=path, device="cpu", dtype="float32"
        )

    def draw(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Return the pixels of prompts: (B, 3, H, W)."""
        assert self._pipeline is not None, "put_in() comes first"
        wish = self._wish
        settings = UNetSettings(seeds=seeds, sampler=wish.sampler, guidance=wish.guidance)
        return self._pipeline(prompts, settings, batch_size=BATCH_SIZE, progress=False).pixels

    def told(self) -> str:
        """Return how the last run's was sampled."""
        assert self._pipeline is not None, "put_in() comes first"
        sampling, wish = self._pipeline.spec.sampling, self._wish
        guidance = sampling.guidance if wish.guidance is None else wish.guidance
        return f"{wish.sampler or sampling.sampler}, guidance {guidance:g}"


def measure(drawing: CascadeRuns | UNetRuns, scorer: ClipScorer, asked: Asked) -> Agreement:
    """Draw every prompt, prompt k with seed k, and ask the yardstick."""
    vectors = []
    for first in range(0, len(asked.prompts), BATCH_SIZE):
        prompts = asked.prompts[first : first + BATCH_SIZE]
        seeds = list(range(first, first + len(prompts)))
        vectors.append(scorer.embed_pictures(drawing.draw(prompts, seeds)))
    return agreement(true_ranks(torch.cat(vectors), asked.vectors, asked.candidates))


def row(name: str, seeds: int, found: Sequence[Agreement]) -> str:
    """Return a line of the table: shares over all runs, and of each."""
    first, five = ([getattr(one, part) for one in found] for part in ("top_1", "top_5"))
    cells = []
    for rates in (first, five):
        share = sum(one.hits for one in rates) / sum(one.trials for one in rates)
        each = ", ".join(f"{100 * one.rate:.0f}" for one in rates)
        cells += [f"{100 * share:.1f} %" + (f" ({each})" if len(rates) > 1 else "")]
    return "| " + " | ".join([name, str(seeds), *cells]) + " |"


def finished(runs: Path, recipe: Recipe, seeds: Sequence[int], network: str) -> list[Path]:
    """Return what a recipe's finished runs have exported."""
    folders = [runs / recipe.folder / f"seed_{seed}" for seed in seeds]
    return [one / f"{network}.safetensors" for one in folders if (one / DONE_FILE).is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table."""
    parser = Parser(prog="python benchmarks/recipes_agreement.py", description=__doc__)
    parser.add_argument("--recipes", type=Path, default=ROOT / "configs/recipes/switches.yaml")
    parser.add_argument("--only", nargs="+", help="names of recipes (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/recipes"))
    parser.add_argument("--model", type=Path, default=ROOT / "weights/demo")
    parser.add_argument("--yardstick", type=Path, help="CLIP's folder (default: MODEL/text)")
    parser.add_argument("--shards", type=Path, default=Path("data/demo/test_combo"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--sampler", help="of Stage C or the U-Net (default: the model's)")
    parser.add_argument("--guidance", type=float, help="of the same (default: the model's)")
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compared = read_recipes(options.recipes)
    recipes = [one for one in compared.recipes if options.only is None or one.name in options.only]
    kind = CascadeRuns if compared.kind == "stage_c" else UNetRuns
    drawing = kind(options.model, Wish(options.sampler, options.guidance))
    [split] = read_splits(read_folder(options.shards), options.prompts, 0).values()
    scorer = ClipScorer.from_folder(options.yardstick or options.model / "text")
    asked = ask(split, scorer, 100, torch.Generator().manual_seed(0))
    real = scorer.embed_pictures(pixels_of(split, [split.entries[i].key for i in split.asked]))
    shuffled = real[derangement(len(real), torch.Generator().manual_seed(0))]
    print(f"| {kind.title} | runs | first of 100 | in the first five |\n| --- | --- | --- | --- |")
    for name, vectors in (("real pictures", real), ("shuffled", shuffled)):
        marks = agreement(true_ranks(vectors, asked.vectors, asked.candidates))
        print(row(name, 0, [marks]))
    done = {one.name: finished(options.runs, one, options.seeds, kind.network) for one in recipes}
    if not any(done.values()):
        raise UserError(f"{options.runs}: no finished run; make some: benchmarks/recipes.py")
    for name, paths in done.items():
        found = []
        for path in paths:
            drawing.put_in(path)
            found.append(measure(drawing, scorer, asked))
        if found:
            print(row(name, len(found), found), flush=True)
    print(
        f"\n{len(asked.prompts)} prompts of {split.name}, seeds of pictures 0 to "
        f"{len(asked.prompts) - 1}; {drawing.told()}; commit {commit()}; "
        f"{machine(torch.device('cpu'))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
