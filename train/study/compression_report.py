"""A compression study's report: reconstruction, generation and speed against the bytes of latents.

It is a function of the rows alone, so that it can be written again at any time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.checkpoints.files import atomic_write_text
from train.study.curves import PLOTS
from train.study.doubts import fairness_blocks, figure_blocks
from train.study.grids import grid_of
from train.study.knee import DEFINITION, LEAST_POINTS, Knee, find_knee
from train.study.page import Block, Heading, Paragraph, Picture, Table, to_html, to_markdown
from train.study.plots import Axes, Line, Point, plot_lines
from train.study.rates import CompressionConfig
from train.study.report import (
    HTML_FILE,
    MARKDOWN_FILE,
    arm_blocks,
    failure_blocks,
    source_blocks,
    spread_sentence,
)
from train.study.rows import (
    UNIT_TITLES,
    Row,
    figure_title,
    mean_and_spread,
    metric_names,
    some_figure,
    values_of,
)
from train.study.settings import ArmConfig, arm_folder

_BYTES = "bytes of a picture's latent (float16)"
ORIGINALS_FOLDER = "shared/originals"


@dataclass(frozen=True)
class _Kind:
    """One kind of pictures that is judged."""

    title: str
    prefix: str
    """Of its plots' files."""
    names: tuple[str, ...]
    """Of its figures."""
    views: Mapping[str, Sequence[Row]]
    """Arm -> its seeds' rows, with ``metrics`` of this kind."""

    @property
    def rows(self) -> list[Row]:
        """The rows of all arms."""
        return [row for rows in self.views.values() for row in rows]


def write_compression_report(
    config: CompressionConfig,
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
    study = config.study
    whole = {
        arm.name: [
            row
            for row in rows
            if row["arm"] == arm.name and row["fraction"] == 1.0 and row["status"] == "judged"
        ]
        for arm in study.arms
    }
    blocks: list[Block] = [Heading(f"Compression study: {study.name}", 1)]
    if study.description:
        blocks.append(Paragraph(study.description))
    blocks.append(_asked(config, rows))
    blocks += fairness_blocks(rows, study.budget.unit)
    kinds = _kinds(config, whole)
    blocks += _knees(config, kinds, whole)
    blocks += _rates(config, whole)
    for kind in kinds:
        blocks += _figures(config, kind, whole, rows)
    blocks += _speed(config, whole)
    for kind in kinds:
        blocks += _plots(config, kind, whole, out)
    blocks += _speed_plots(config, whole, out)
    blocks += _pictures(config, whole, out)
    blocks += arm_blocks(study, given)
    for kind in kinds:
        blocks += figure_blocks([row["metrics"] for row in kind.rows], kind.title)
    blocks += failure_blocks(rows)
    blocks += source_blocks(rows)
    blocks += _reconstruction_source(rows)
    atomic_write_text(out / MARKDOWN_FILE, to_markdown(blocks))
    atomic_write_text(out / HTML_FILE, to_html(blocks, out, f"Compression study: {study.name}"))


def _asked(config: CompressionConfig, rows: Sequence[Row]) -> Block:
    study = config.study
    unit = UNIT_TITLES[study.budget.unit]
    seeds = ", ".join(str(seed) for seed in study.seeds)
    wanted = len(study.arms) * len(study.seeds)
    done = len({(row["arm"], row["seed"]) for row in rows})
    state = "" if done == wanted else f" {done} of {wanted} runs are finished so far."
    return Paragraph(
        f"Each rate trains its own compressor and Stage B, and then its own Stage C, with "
        f"{study.budget.amounts[0]:,g} {unit} in all. Seeds: {seeds}. "
        f"{spread_sentence(study)}{state}"
    )


def _kinds(config: CompressionConfig, whole: Mapping[str, Sequence[Row]]) -> list[_Kind]:
    inside = {
        name: [{"metrics": row["reconstruction"]["metrics"]} for row in rows]
        for name, rows in whole.items()
    }
    judged = [row for rows in whole.values() for row in rows]
    again = [row for rows in inside.values() for row in rows]
    found = [
        _Kind(
            "Reconstruction",
            "reconstruction",
            tuple(dict.fromkeys(name for row in again for name in row["metrics"])),
            inside,
        ),
        _Kind("Generation", "generation", tuple(metric_names(config.study, judged)), whole),
    ]
    return [kind for kind in found if kind.names]


def _bytes(rows: Sequence[Row]) -> int:
    return int(rows[0]["latents"]["bytes"])


def _by_bytes(
    config: CompressionConfig, whole: Mapping[str, Sequence[Row]]
) -> list[tuple[ArmConfig, Sequence[Row]]]:
    """Return the arms that were judged, from the fewest bytes to the most."""
    judged = [(arm, whole[arm.name]) for arm in config.study.arms if whole[arm.name]]
    return sorted(judged, key=lambda pair: _bytes(pair[1]))


def _curves(
    config: CompressionConfig, whole: Mapping[str, Sequence[Row]]
) -> dict[int, list[tuple[ArmConfig, Sequence[Row]]]]:
    """Return the curves: by the channels of the latents, most rates first."""
    found: dict[int, list[tuple[ArmConfig, Sequence[Row]]]] = {}
    for arm, rows in _by_bytes(config, whole):
        rate = config.on_curve.get(arm.name)
        if rate is not None:
            found.setdefault(rate.channels, []).append((arm, rows))
    return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


# The knee


def _knees(
    config: CompressionConfig, kinds: Sequence[_Kind], whole: Mapping[str, Sequence[Row]]
) -> list[Block]:
    curves = _curves(config, whole)
    if not curves:
        return []
    channels, curve = next(iter(curves.items()))
    names = {_bytes(rows): arm.name for arm, rows in curve}
    table, sentences = [], []
    for kind in kinds:
        for index, name in enumerate(kind.names):
            points = _points(kind, name, curve)
            higher = some_figure(kind.rows, name)["better"] == "higher"
            knee = find_knee(points, higher_is_better=higher)
            distance = "" if knee.distance is None else f"{knee.distance:.2f}"
            title = f"{kind.title}: {figure_title(kind.rows, name)}"
            if knee.x is None:
                found, place, where = "", "no clear knee", f"no clear knee ({knee.why})"
            else:
                found = f"{knee.x:,.0f}"
                what = "best, both ends are worse" if knee.is_peak else "knee"
                if knee.alike:
                    others = ", ".join(names[int(x)] for x in knee.alike)
                    what = f"best with {others}, not told apart; both ends are worse"
                place = f"{names[int(knee.x)]} ({what})"
                where = f"{names[int(knee.x)]} ({what}; {found} bytes)"
            table.append((title, place, knee.why, found, distance))
            if index == 0:
                sentences.append(f"{title}: {where}.")
    head = ("figure", "knee", "why none", "bytes", "above the chord, or the better end")
    least = "" if len(curve) >= LEAST_POINTS else f" It has {len(curve)} rates only."
    return [
        Heading("The knee"),
        Paragraph(" ".join(sentences)),
        Table(head, tuple(table), 3),
        Paragraph(f"{DEFINITION} The curve is that of {channels} channels.{least}"),
    ]


def _points(kind: _Kind, name: str, arms: Sequence[tuple[ArmConfig, Sequence[Row]]]) -> list[Point]:
    points = []
    for arm, rows in arms:
        values = values_of(kind.views[arm.name], name)
        if values:
            points.append(Point(_bytes(rows), tuple(values)))
    return points


# Tables


def _rates(config: CompressionConfig, whole: Mapping[str, Sequence[Row]]) -> list[Block]:
    side = config.sweep.image_size
    pixels = 3 * side**2
    table = []
    for arm, rows in _by_bytes(config, whole):
        channels, height, width = rows[0]["latents"]["shape"]
        size = _bytes(rows)
        table.append(
            (
                arm.name,
                f"{height}x{width}",
                str(channels),
                f"{size:,}",
                f"{pixels / size:,.1f}",
                f"{side / math.sqrt(height * width):.3g}",
            )
        )
    if not table:
        return []
    head = ("arm", "grid", "channels", "bytes of latent", "pixel bytes for one", "px a cell")
    return [
        Heading("The rates"),
        Paragraph(
            f"Pictures of {side}x{side} px are {pixels:,} bytes (8 bits a value); latents are "
            "counted as they are cached, in float16."
        ),
        Table(head, tuple(table)),
    ]


def _figures(
    config: CompressionConfig,
    kind: _Kind,
    whole: Mapping[str, Sequence[Row]],
    rows: Sequence[Row],
) -> list[Block]:
    table = []
    for arm, judged in _by_bytes(config, whole):
        cells = [arm.name, f"{_bytes(judged):,}", f"{len(judged)} of {len(config.study.seeds)}"]
        for name in kind.names:
            values = values_of(kind.views[arm.name], name)
            cells.append(mean_and_spread(values) if values else "")
        table.append(tuple(cells))
    failed = {row["arm"] for row in rows if row["status"] == "failed"}
    for arm in config.study.arms:
        if not whole[arm.name] and arm.name in failed:
            table.append((arm.name, "", "failed", *([""] * len(kind.names))))
    real = [some_figure(kind.rows, name)["real"] for name in kind.names]
    if any(value is not None for value in real):
        cells = ["" if value is None else f"{value:.4g}" for value in real]
        table.append(("real pictures", "", "", *cells))
    head = ("arm", "bytes", "seeds", *(figure_title(kind.rows, name) for name in kind.names))
    return [Heading(kind.title), Table(head, tuple(table))]


def _speed(config: CompressionConfig, whole: Mapping[str, Sequence[Row]]) -> list[Block]:
    trainings = list(
        dict.fromkeys(
            step.name for arm in config.study.arms for step in arm.steps if step.train is not None
        )
    )
    table = []
    for arm, rows in _by_bytes(config, whole):
        cells = [arm.name, f"{_bytes(rows):,}"]
        for name in trainings:
            there = [row["training"][name] for row in rows if name in row["training"]]
            cells.append(_median(there, "samples", ",.0f"))
            cells.append(_median(there, "samples_per_second", ",.1f"))
        cells.append(f"{statistics.median(1 / row['cost']['latency_s'] for row in rows):,.3g}")
        # An arm of a U-Net beside the curve has no Stage C.
        stage_c = [row["stage_seconds"].get("stage_c") for row in rows]
        known = [seconds for seconds in stage_c if seconds is not None]
        cells.append(f"{1000 * statistics.median(known):,.3g}" if known else "")
        table.append(tuple(cells))
    if not table:
        return []
    head = ["arm", "bytes"]
    for name in trainings:
        head += [f"{name}: samples", f"{name}: samples/s"]
    head += ["sampling: pictures/s", "of it Stage C, ms a picture"]
    return [
        Heading("Speed"),
        Paragraph(
            "Medians over seeds. Training is counted by its ledgers, without set-up and looking; "
            "sampling is one picture at a time, warm, with the protocol's steps."
        ),
        Table(tuple(head), tuple(table)),
    ]


def _median(costs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    values = [cost[key] for cost in costs if cost[key] is not None]
    return format(statistics.median(values), form) if values else ""


# Plots and pictures


def _plots(
    config: CompressionConfig, kind: _Kind, whole: Mapping[str, Sequence[Row]], out: Path
) -> list[Block]:
    blocks: list[Block] = []
    for name in kind.names:
        title = figure_title(kind.rows, name)
        lines = _lines(config, kind, name, whole)
        if not lines:
            continue
        curve = next(iter(_curves(config, whole).values()), [])
        higher = some_figure(kind.rows, name)["better"] == "higher"
        knee = find_knee(_points(kind, name, curve), higher_is_better=higher)
        file = f"{PLOTS}/{kind.prefix}_{arm_folder(name)}.svg"
        plot_lines(out / file, lines, _axes(title, knee))
        blocks.append(Picture(file, f"{kind.title}: {title} against {_BYTES}"))
    return [Heading(f"{kind.title} against the rate"), *blocks] if blocks else []


def _axes(title: str, knee: Knee) -> Axes:
    if knee.x is None:
        return Axes(_BYTES, title, log_x=True)
    what = "best" if knee.is_peak else "knee"
    return Axes(_BYTES, title, log_x=True, marked_x=knee.x, marked=f"{what}: {knee.x:,.0f} bytes")


def _lines(
    config: CompressionConfig, kind: _Kind, name: str, whole: Mapping[str, Sequence[Row]]
) -> list[Line]:
    lines: list[Line] = []
    curves = _curves(config, whole)
    for channels, arms in curves.items():
        points = _points(kind, name, arms)
        if points:
            lines.append(Line(f"{channels} channels", tuple(points), len(lines)))
    for arm, rows in _by_bytes(config, whole):
        if arm.name not in config.on_curve:
            points = _points(kind, name, [(arm, rows)])
            if points:
                lines.append(Line(arm.name, tuple(points), len(lines)))
    return lines


def _speed_plots(
    config: CompressionConfig, whole: Mapping[str, Sequence[Row]], out: Path
) -> list[Block]:
    def speed(row: Row) -> dict[str, dict[str, float]]:
        found = {"sampling": {"value": 1 / row["cost"]["latency_s"]}}
        for name, cost in row["training"].items():
            if cost["samples_per_second"] is not None:
                found[name] = {"value": cost["samples_per_second"]}
        return found

    views = {name: [{"metrics": speed(row)} for row in rows] for name, rows in whole.items()}
    names = dict.fromkeys(
        name for rows in views.values() for row in rows for name in row["metrics"]
    )
    kind = _Kind("Speed", "speed", tuple(names), views)
    blocks: list[Block] = []
    for name in kind.names:
        title = "sampling, pictures/s" if name == "sampling" else f"training {name}, samples/s"
        file = f"{PLOTS}/speed_{arm_folder(name)}.svg"
        plot_lines(out / file, _lines(config, kind, name, whole), Axes(_BYTES, title, log_x=True))
        blocks.append(Picture(file, f"{title} against {_BYTES}"))
    return [Heading("Speed against the rate"), *blocks] if blocks else []


def _pictures(
    config: CompressionConfig, whole: Mapping[str, Sequence[Row]], out: Path
) -> list[Block]:
    """Return sheets: one row an arm, the same pictures and the same prompts."""
    blocks: list[Block] = []
    order = _by_bytes(config, whole)
    inside = {arm.name: out / rows[0]["reconstruction"]["pictures"] for arm, rows in order}
    if inside and (out / ORIGINALS_FOLDER).is_dir():
        inside = {"original": out / ORIGINALS_FOLDER, **inside}
    made = {arm.name: out / rows[0]["pictures"] for arm, rows in order}
    for folders, file, caption in (
        (inside, "reconstructions.png", "reconstructions of the same held-out pictures"),
        (made, "pictures.png", "pictures of the same prompts and seeds"),
    ):
        if folders and grid_of(folders, config.study.grid_prompts, out / file):
            blocks.append(Picture(file, f"{caption}, from the fewest bytes to the most"))
    return [Heading("Pictures"), *blocks] if blocks else []


def _reconstruction_source(rows: Sequence[Row]) -> list[Block]:
    hashes = sorted(
        {row["reconstruction"]["protocol_hash"] for row in rows if row["status"] == "judged"}
    )
    if not hashes:
        return []
    return [Paragraph(f"Reconstructions are judged by the protocol {', '.join(hashes)}.")]
