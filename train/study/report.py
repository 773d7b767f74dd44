"""A budget study's report: tables, curves, Pareto plots and pictures, each number with its source.

It is a function of the rows alone, so that it can be written again at any time.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from cascade.checkpoints.files import atomic_write_text
from train.study.curves import PLOTS, curve_blocks
from train.study.doubts import fairness_blocks, figure_blocks
from train.study.grids import grid_of
from train.study.page import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown
from train.study.plots import Axes, Line, Point, plot_front
from train.study.rows import (
    UNIT_TITLES,
    Row,
    figure_title,
    judged_rows,
    mean_and_spread,
    mean_cost,
    metric_names,
    rows_of,
    some_figure,
    values_of,
)
from train.study.settings import StudyConfig

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
_COSTS = (
    ("latency_s", "latency, s a picture"),
    ("peak_memory_mib", "memory with the weights, MiB"),
)


def write_report(
    config: StudyConfig,
    rows: Sequence[Row],
    out: Path,
    *,
    given: Mapping[str, Mapping[str, str]],
) -> None:
    """Write ``report.md``, ``report.html`` and the plots.

    Args:
        config: The study.
        rows: Of ``results.jsonl``; those of runs that are not finished are missing.
        out: The study's folder.
        given: What the weights that arms are given had cost, by file.
    """
    blocks: list[Block] = [Heading(f"Study: {config.name}", 1)]
    if config.description:
        blocks.append(Paragraph(config.description))
    blocks += _asked(config, rows)
    blocks += fairness_blocks(rows, config.budget.unit)
    blocks += _whole(config, rows)
    blocks += curve_blocks(config, rows, out)
    blocks += _pareto(config, rows, out)
    blocks += _pictures(config, rows, out)
    blocks += arm_blocks(config, given)
    blocks += figure_blocks([row["metrics"] for row in rows if row["status"] == "judged"])
    blocks += failure_blocks(rows)
    blocks += source_blocks(rows)
    atomic_write_text(out / MARKDOWN_FILE, to_markdown(blocks))
    atomic_write_text(out / HTML_FILE, to_html(blocks, out, f"Study: {config.name}"))


def spread_sentence(config: StudyConfig) -> str:
    """Return what the spreads of a study's tables are of."""
    if len(config.seeds) > 1:
        return "Means and standard deviations are over seeds."
    return "One seed: what another would give is not known."


def _asked(config: StudyConfig, rows: Sequence[Row]) -> list[Block]:
    unit = UNIT_TITLES[config.budget.unit]
    amounts = " and ".join(f"{amount:,g}" for amount in config.budget.amounts)
    seeds = ", ".join(str(seed) for seed in config.seeds)
    teacher = {
        "apart": "What a teacher computes, in a training or to draw pictures, is told apart and "
        "is not in the budget.",
        "counted": "What a teacher computes, in a training or to draw pictures, is in the budget "
        "of the arm that learns from it.",
    }[config.budget.teacher]
    wanted = len(config.arms) * len(config.seeds) * len(config.budget.amounts)
    done = {(row["arm"], row["budget"], row["seed"]) for row in rows}
    state = "" if len(done) == wanted else f" {len(done)} of {wanted} runs are finished so far."
    commands = (
        "" if config.budget.unit == "device_seconds" else " Commands between trainings are free."
    )
    return [
        Paragraph(
            f"Every arm may spend {amounts} {unit}. Seeds: {seeds}. {teacher} Judging, and the "
            f"set-up of a run, are nobody's cost.{commands}{state}"
        )
    ]


def _whole(config: StudyConfig, rows: Sequence[Row]) -> list[Block]:
    """Return a table for each budget: what an arm reaches with all of it."""
    blocks: list[Block] = []
    names = metric_names(config, rows)
    for amount in config.budget.amounts:
        unit = UNIT_TITLES[config.budget.unit]
        blocks.append(Heading(f"With {amount:,g} {unit}"))
        table = []
        for arm in config.arms:
            every = rows_of(rows, arm.name, amount, 1.0)
            judged = [row for row in every if row["status"] == "judged"]
            cells = [arm.name, f"{len(judged)} of {len(config.seeds)}"]
            for name in names:
                values = values_of(judged, name)
                cells.append(mean_and_spread(values) if values else "failed" if every else "")
            spent = [row["spent"] for row in judged]
            teachers = [row["teacher"] for row in judged]
            cells += [
                mean_cost(spent, "samples", ",.0f"),
                mean_cost(spent, "flops", ".3g"),
                mean_cost(spent, "device_seconds", ",.0f"),
                mean_cost(teachers, "flops", ".3g"),
                mean_cost(teachers, "device_seconds", ",.0f"),
            ]
            if config.price_per_device_hour is not None:
                seconds = [one["device_seconds"] for one in spent]
                price = config.price_per_device_hour
                cells.append(f"{statistics.mean(seconds) / 3600 * price:,.2f}" if seconds else "")
            table.append(tuple(cells))
        real = [some_figure(rows, name)["real"] for name in names]
        if any(value is not None for value in real):
            cells = ["" if value is None else f"{value:.4g}" for value in real]
            padding = [""] * (len(table[0]) - 2 - len(names))
            table.append(("real pictures", "", *cells, *padding))
        head = ["arm", "seeds", *(figure_title(rows, name) for name in names)]
        head += ["samples", "FLOPs", "device seconds", "teacher's FLOPs", "teacher's seconds"]
        if config.price_per_device_hour is not None:
            head.append("price")
        blocks.append(Table(tuple(head), tuple(table)))
    blocks.append(Paragraph(spread_sentence(config)))
    return blocks


def _pareto(config: StudyConfig, rows: Sequence[Row], out: Path) -> list[Block]:
    """Return what a picture costs beside what it is worth, at the largest budget."""
    amount = max(config.budget.amounts)
    by_arm = {arm.name: judged_rows(rows, arm.name, amount, 1.0) for arm in config.arms}
    names = metric_names(config, rows)
    if not names or not any(by_arm.values()):
        return []
    blocks: list[Block] = [Heading("What a picture costs")]
    latency, memory = (title for _, title in _COSTS)
    head = ("arm", "parameters", "GFLOPs a picture", f"{latency} (quartiles)", memory)
    table = []
    for arm, judged in by_arm.items():
        if not judged:
            continue
        costs = [row["cost"] for row in judged]
        cells = [arm, f"{costs[0]['parameters']:,}", mean_cost(costs, "gflops", ",.3g")]
        quartiles = [cost["latency_quartiles_s"] for cost in costs]
        lower, upper = (statistics.mean(one) for one in zip(*quartiles, strict=True))
        latency, memory = (mean_cost(costs, key, ",.3g") for key, _ in _COSTS)
        cells += [f"{latency} ({lower:,.3g} to {upper:,.3g})", memory]
        table.append(tuple(cells))
    blocks.append(Table(head, tuple(table)))
    best = names[0]
    higher = some_figure(rows, best)["better"] == "higher"
    for key, title in _COSTS:
        lines = []
        for colour, (arm, judged) in enumerate(by_arm.items()):
            costs = [row["cost"][key] for row in judged if row["cost"].get(key) is not None]
            if costs:
                point = Point(statistics.mean(costs), tuple(values_of(judged, best)))
                lines.append(Line(arm, (point,), colour))
        if lines:
            file = f"{PLOTS}/{key}.svg"
            plot_front(
                out / file, lines, Axes(title, figure_title(rows, best)), higher_is_better=higher
            )
            blocks.append(
                Picture(file, f"{figure_title(rows, best)} against {title}; grey: the Pareto front")
            )
    return blocks


def _pictures(config: StudyConfig, rows: Sequence[Row], out: Path) -> list[Block]:
    """Return a sheet: the same prompts and seeds, one row an arm."""
    amount = max(config.budget.amounts)
    folders = {}
    for arm in config.arms:
        judged = judged_rows(rows, arm.name, amount, 1.0)
        drawn = [out / row["pictures"] for row in judged]
        there = [folder for folder in drawn if folder.is_dir()]  # rows can come without them
        if there:
            folders[arm.name] = there[0]
    file = "pictures.png"
    if not folders or not grid_of(folders, config.grid_prompts, out / file):
        return []
    caption = f"the same prompts and seeds at {amount:,g} {UNIT_TITLES[config.budget.unit]}"
    return [Heading("Pictures"), Picture(file, caption)]


def arm_blocks(config: StudyConfig, given: Mapping[str, Mapping[str, str]]) -> list[Block]:
    """Return what the arms are, and what they were given."""
    blocks: list[Block] = [Heading("The arms")]
    rows = []
    for arm in config.arms:
        steps = ", ".join(
            f"{step.name} ({step.share:.0%})" if step.train is not None else step.name
            for step in arm.steps
        )
        rows.append((arm.name, arm.description, steps, ", ".join(arm.given) or "nothing"))
    blocks.append(
        Table(("arm", "what it is", "steps (share of the budget)", "given"), tuple(rows), 4)
    )
    if given:
        blocks.append(
            Paragraph("What is given was trained before and is in no budget; it had cost:")
        )
        costs = tuple(
            (
                path,
                said.get("train_steps", "not said"),
                said.get("train_samples", "not said"),
                said.get("train_seconds", "not said"),
            )
            for path, said in given.items()
        )
        blocks.append(Table(("weights", "steps", "samples", "seconds"), costs))
    return blocks


def failure_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return which runs have failed and why; nothing where none has."""
    failed = {
        (row["arm"], row["budget"], row["seed"]): row["why"]
        for row in rows
        if row["status"] == "failed"
    }
    if not failed:
        return []
    table = tuple(
        (arm, f"{budget:,g}", str(seed), why) for (arm, budget, seed), why in failed.items()
    )
    return [Heading("Runs that failed"), Table(("arm", "budget", "seed", "why"), table, 4)]


def source_blocks(rows: Sequence[Row]) -> list[Block]:
    """Return where the numbers are from: one line for each protocol, commit and machine."""
    found: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row["status"] == "judged":
            trained = ", ".join(sorted({one["commit"] for one in row["trained"]}))
            key = (row["protocol_hash"], trained, row["commit"], row["machine"])
            found[key] = found.get(key, 0) + 1
    table = tuple((*key, str(count)) for key, count in sorted(found.items()))
    return [
        Heading("Where the numbers are from"),
        Paragraph(
            "Every row of results.jsonl names its protocol's hash, the commits that trained and "
            "judged it, and the machines. "
            "Figures of unlike protocols are refused in one report."
        ),
        Table(("protocol", "trained by commit", "judged by commit", "machine", "rows"), table, 4),
    ]
