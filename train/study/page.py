"""A report as blocks, written as Markdown with files beside it, and as one HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the report's own."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; numbers to the right, words to the left."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    """Leading columns that hold words."""


@dataclass(frozen=True)
class Picture:
    """A plot (SVG) or a picture (PNG) of the report's folder."""

    file: str
    """Path in the folder."""
    caption: str


Block = Heading | Paragraph | Table | Picture

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; display: block;
  overflow-x: auto; }
th, td { border-bottom: 1px solid #d0d7de; padding: 0.3rem 0.7rem; text-align: right;
  font-variant-numeric: tabular-nums; }
.word { text-align: left; }
th { border-bottom: 2px solid #57606a; }
figure { margin: 1.5rem 0; }
figure svg, figure img { max-width: 100%; height: auto; }
figcaption { color: #57606a; font-size: 0.9rem; }
"""


def to_markdown(blocks: Sequence[Block]) -> str:
    """Return the report as Markdown; pictures are links to files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.file})"
    lines = [
        block.head,
        tuple("---" if i < block.words else "---:" for i in range(len(block.head))),
    ]
    rows = [*lines, *block.rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )


def to_html(blocks: Sequence[Block], folder: Path, title: str) -> str:
    """Return the report as one HTML file that needs no other: plots and pictures are inside.

    Args:
        blocks: The report.
        folder: Where its pictures' files are.
        title: Of the page.
    """
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _html(block: Block, folder: Path) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Picture):
        caption = f"<figcaption>{html.escape(block.caption)}</figcaption>"
        return f"<figure>{_inline(folder / block.file, block.caption)}{caption}</figure>"

    def line(cells: Sequence[str], tag: str) -> str:
        classes = [' class="word"' if i < block.words else "" for i in range(len(cells))]
        drawn = zip(cells, classes, strict=True)
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in drawn)

    head = line(block.head, "th")
    rows = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in block.rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def _inline(path: Path, caption: str) -> str:
    if path.suffix == ".svg":
        text = path.read_text(encoding="utf-8")
        return text[text.index("<svg") :]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
