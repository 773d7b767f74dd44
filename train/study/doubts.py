"""What a reader must know to believe a report: of how many pictures, how sure, how equal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cascade.evaluate.results import number_text
from train.study.page import Block, Heading, Paragraph, Table
from train.study.settings import Unit

Row = Mapping[str, Any]
TOLERANCE = 0.1
"""Part of a budget that an arm may miss before the report says so."""


def figure_blocks(
    figures: Sequence[Mapping[str, Mapping[str, Any]]], kind: str = ""
) -> list[Block]:
    """Return a table of what each figure is made of, and what its measure warns of.

    Args:
        figures: ``metrics`` of all judged rows, of one kind of pictures.
        kind: What these are called, where there are two.
    """
    names = dict.fromkeys(name for one in figures for name in one)
    rows, notes = [], dict[str, None]()
    for name in names:
        found = [one[name] for one in figures if name in one]
        halves = [half for one in found if (half := _half_width(one)) is not None]
        rows.append(
            (
                found[0]["label"],
                f"{found[0]['num_pictures']:,}",
                f"{found[0]['num_reference']:,}" if found[0]["num_reference"] else "",
                f"± {number_text(statistics.median(halves))}" if halves else "not told",
                found[0]["uncertainty"],
            )
        )
        notes |= dict.fromkeys(note for one in found for note in one["notes"])
    if not rows:
        return []
    head = ("figure", "pictures or prompts", "of the reference", "of one model", "which is")
    return [
        Heading(f"What a figure is made of{f': {kind.lower()}' if kind else ''}"),
        Paragraph(
            "How far one model's figure may be off for the pictures that were drawn (the median "
            "over all models); what seeds do comes on top, and is in the tables."
        ),
        Table(head, tuple(rows), 5),
        *(Paragraph(f"Note: {note}.") for note in notes),
    ]


def _half_width(figure: Mapping[str, Any]) -> float | None:
    if figure["spread"] is not None:
        return float(figure["spread"])
    if figure["low"] is None or figure["high"] is None:
        return None
    return float(figure["high"] - figure["low"]) / 2


def fairness_blocks(rows: Sequence[Row], unit: Unit) -> list[Block]:
    """Return where arms spent more or less than they may, and where machines were unlike.

    Args:
        rows: Of the study.
        unit: Of its budget.
    """
    judged = [row for row in rows if row["status"] == "judged"]
    off: dict[tuple[str, float], list[float]] = {}
    for row in judged:
        spent = row["spent"][unit]
        share = None if spent is None else spent / (row["budget"] * row["fraction"])
        if share is not None and abs(share - 1) > TOLERANCE:
            off.setdefault((row["arm"], row["budget"]), []).append(share)
    blocks: list[Block] = []
    if off:
        told = "; ".join(
            f"{arm} with {budget:,g}: {', '.join(f'{share:.0%}' for share in shares)}"
            for (arm, budget), shares in off.items()
        )
        blocks.append(
            Paragraph(
                f"Not equal: these spent more than {TOLERANCE:.0%} less or more than what was "
                f"theirs, since steps are planned by what a few took: {told}."
            )
        )
    machines = {one["machine"] for row in judged for one in row["trained"]}
    machines |= {row["machine"] for row in judged}
    if len(machines) > 1:
        blocks.append(
            Paragraph(
                "Runs were made on unlike machines, as results.jsonl says of each: their seconds "
                "and latencies do not compare."
            )
        )
    return blocks
