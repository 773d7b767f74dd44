r"""Training recipes side by side: the same data, samples and seeds.

``python benchmarks/recipes.py --out runs/recipes`` trains every recipe of
``configs/recipes/switches.yaml`` with every seed, one after the other, and prints a table: the loss
on held-out pictures at the end, and the samples and seconds after which a recipe has reached what
the baseline reaches at its end, as a share of the baseline's. That loss is the published one
whatever a recipe trains on (``train/callbacks/validation.py``). Seconds are of training alone, and
only mean something on a machine that does nothing else.

``--recipes configs/demo_koala/switches.yaml`` compares what students of a U-Net learn from.

An interrupted comparison goes on with the same command; runs that are done are not made again.
``--tables-only`` prints what there is.

First make the demonstration's shards and cache (``configs/demo/make.sh``), and the held-out
pictures' cache::

    python -m train.data precompute --shards "data/demo/test_combo/*.tar" \
        --out runs/recipes/cache --text weights/demo/text \
        --compressor weights/demo/compressor.safetensors
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cascade.checkpoints.files import atomic_write_text, load_network  # noqa: E402
from cascade.command import Parser, parse_all  # noqa: E402
from cascade.config import load_yaml  # noqa: E402
from cascade.errors import UserError, run_main  # noqa: E402
from cascade.evaluate.provenance import commit, machine  # noqa: E402
from stages.stage_c import StageC  # noqa: E402
from train.callbacks.validation import VALIDATION_FILE  # noqa: E402
from train.data.open import open_data  # noqa: E402
from train.draws import StepDraws  # noqa: E402
from train.encode import FrozenPaths  # noqa: E402
from train.fit import DONE_FILE  # noqa: E402
from train.posthoc_ema import average  # noqa: E402
from train.systems.stage_c import StageCRun, StageCSystem  # noqa: E402

_log = logging.getLogger(__name__)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (0.02, 0.05, 0.1, 0.15, 0.2)
"""Averages that are tried where a recipe stores snapshots."""


@dataclass(frozen=True)
class Recipe:
    """A named set of options over the baseline."""

    name: str
    options: dict[str, Any]

    @property
    def folder(self) -> str:
        """Return a name for its runs."""
        return "".join(one if one.isalnum() or one in "-." else "_" for one in self.name)


@dataclass(frozen=True)
class Curve:
    """What one run was judged by."""

    samples: list[int]
    seconds: list[float]
    losses: list[float]
    commit: str


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    kind: str
    """What ``python -m train`` trains."""
    base: str
    """The baseline's configuration file."""
    recipes: list[Recipe]


def read_recipes(path: Path) -> Comparison:
    """Read what is compared.

    Raises:
        UserError: A recipe is like one that does not come before it.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    found: dict[str, Recipe] = {}
    for name, values in content["recipes"].items():
        like = values.get("like")
        if like is not None and like not in found:
            raise UserError(f"{path}: {name} is like {like}, which does not come before it")
        before = found[like].options if like is not None else {}
        found[name] = Recipe(name, {**before, **values["set"]})
    return Comparison(content.get("kind", "stage_c"), content["base"], list(found.values()))


def train_one(
    compared: Comparison, recipe: Recipe, seed: int, out: Path, more: Sequence[str]
) -> None:
    """Train one recipe with one seed, or go on with it; its output goes to a file beside it.

    Raises:
        UserError: The run failed.
    """
    folder = out / recipe.folder / f"seed_{seed}"
    if (folder / DONE_FILE).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "train", compared.kind]
    command += ["--config", compared.base, "--resume"]
    options = {**recipe.options, "run.out": folder, "run.seed": seed, "data.seed": seed}
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    _log.info("%s, seed %d", recipe.name, seed)
    with open(folder.parent / f"seed_{seed}.log", "a", encoding="utf-8") as log:
        done = subprocess.run(
            [*command, *more], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ
        )
    if done.returncode:
        raise UserError(f"{recipe.name}, seed {seed}: the run failed; see {log.name}")
    note = {"commit": commit(), "machine": machine(DEVICE)}
    atomic_write_text(folder / "where.json", json.dumps(note) + "\n")


def read_curve(out: Path, recipe: Recipe, seed: int) -> Curve | None:
    """Return a finished run's losses; None: it is not finished."""
    folder = out / recipe.folder / f"seed_{seed}"
    if not (folder / DONE_FILE).is_file():
        return None
    lines = (folder / VALIDATION_FILE).read_text(encoding="utf-8").splitlines()
    # A run that was killed makes some steps again: the last row of a step counts.
    rows = {row["step"]: row for row in map(json.loads, lines)}
    ordered = [rows[step] for step in sorted(rows)]
    where = json.loads((folder / "where.json").read_text(encoding="utf-8"))
    return Curve(
        samples=[row["samples"] for row in ordered],
        seconds=[row["seconds"] for row in ordered],
        losses=[row["val_loss"] for row in ordered],
        commit=where["commit"],
    )


def reached(curve: Curve, loss: float, axis: Sequence[float]) -> float | None:
    """Return where a curve first comes down to a loss, between its points; None: nowhere."""
    for index, value in enumerate(curve.losses):
        if value <= loss:
            if index == 0:
                return axis[0]
            before = curve.losses[index - 1]
            share = (before - loss) / (before - value)
            return axis[index - 1] + share * (axis[index] - axis[index - 1])
    return None


def posthoc_losses(base: str, recipe: Recipe, seed: int, out: Path) -> dict[float, float]:
    """Return length -> loss of the averages that a run's snapshots make."""
    folder = out / recipe.folder / f"seed_{seed}"
    options = [f"{key}={value}" for key, value in recipe.options.items()]
    run = load_yaml(StageCRun, base, options)
    assert run.validation is not None, "the baseline is judged"
    frozen = FrozenPaths(text=run.text, compressor=run.compressor)
    data = open_data(run.validation.data(run.data), frozen, pixels=False)
    assert data.null_text is not None, "Stage C reads text"
    system = StageCSystem(run, data.null_text)
    found = {}
    for length in LENGTHS:
        file = folder / f"posthoc_{length:g}.safetensors"
        average(folder, "stage_c", length, file, dtype=torch.float32)
        system.network = load_network(file, expect=StageC)
        errors: list[torch.Tensor] = []
        batches = iter(data.loader_from(0, 0, 1))
        while sum(map(len, errors)) < run.validation.samples:
            draws = StepDraws(run.validation.seed, len(errors))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                errors.append(system.validation_errors(next(batches), draws)[0])
        found[length] = float(torch.cat(errors).mean())
        file.unlink()
    return found


def table(recipes: Sequence[Recipe], curves: dict[str, list[Curve]]) -> list[str]:
    """Return the rows of the table, best first; the baseline's own end is what all are held to."""
    baseline = curves[recipes[0].name]
    goal = statistics.mean(curve.losses[-1] for curve in baseline)
    samples = statistics.mean(curve.samples[-1] for curve in baseline)
    seconds = statistics.mean(curve.seconds[-1] for curve in baseline)
    rows = [
        "| recipe | seeds | validation loss at the end | samples to the baseline's loss "
        "| seconds to it | seconds of the run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def end(recipe: Recipe) -> float:
        return statistics.mean(curve.losses[-1] for curve in curves[recipe.name])

    for recipe in sorted((one for one in recipes if curves.get(one.name)), key=end):
        runs = curves[recipe.name]
        ends = [curve.losses[-1] for curve in runs]
        spread = f" ± {statistics.stdev(ends):.4f}" if len(ends) > 1 else ""
        cells = [recipe.name, str(len(runs)), f"{statistics.mean(ends):.4f}{spread}"]
        for axis, whole in (("samples", samples), ("seconds", seconds)):
            at = [reached(curve, goal, getattr(curve, axis)) for curve in runs]
            got = [one / whole for one in at if one is not None]
            if len(got) == len(runs):
                cells.append(f"{statistics.mean(got):.2f}")
            else:
                cells.append(f"not reached by {len(runs) - len(got)}")
        cells.append(f"{statistics.mean(curve.seconds[-1] for curve in runs):.0f}")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the table."""
    parser = Parser(prog="python benchmarks/recipes.py", description=__doc__)
    parser.add_argument("--recipes", type=Path, default=ROOT / "configs/recipes/switches.yaml")
    parser.add_argument("--only", nargs="+", help="names of recipes (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    parser.add_argument("--set", nargs="+", default=[], help="more options of every run: KEY=VALUE")
    options = parse_all(parser, sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    compared = read_recipes(options.recipes)
    recipes = compared.recipes
    unknown = set(options.only or ()) - {one.name for one in recipes}
    if unknown:
        names = ", ".join(one.name for one in recipes)
        raise UserError(f"--only {min(unknown)}: no such recipe; there are {names}")
    chosen = [one for one in recipes if options.only is None or one.name in options.only]
    out = options.out.resolve()
    more = [f"--{one}" for one in options.set]
    # Seed by seed, so that an interrupted comparison has all recipes with the seeds it has.
    for seed in options.seeds:
        for recipe in chosen:
            if not options.tables_only:
                train_one(compared, recipe, seed, out, more)
    curves: dict[str, list[Curve]] = {}
    for recipe in recipes:
        found = (read_curve(out, recipe, seed) for seed in options.seeds)
        curves[recipe.name] = [curve for curve in found if curve is not None]
    if not curves[recipes[0].name]:
        raise UserError(f"{out}: the baseline, {recipes[0].name}, has no finished run")
    print("\n".join(table(recipes, curves)))
    for recipe in recipes:
        if "posthoc_ema.every_steps" not in recipe.options:
            continue
        for seed in options.seeds[: len(curves[recipe.name])]:
            losses = posthoc_losses(compared.base, recipe, seed, out)
            shown = ", ".join(f"{length:g}: {loss:.4f}" for length, loss in losses.items())
            print(f"\n{recipe.name}, seed {seed}, by length: {shown}")
    commits = sorted({curve.commit for runs in curves.values() for curve in runs})
    print(f"\nseeds {options.seeds}; commit {', '.join(commits)}; {machine(torch.device('cpu'))}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
