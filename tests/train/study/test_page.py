from __future__ import annotations

import pytest

from train.study.page import Heading, Paragraph, Picture, Table, to_html, to_markdown
from train.study.plots import Axes, Line, Point, pareto, plot_front, plot_lines

LINES = [
    Line("one & two", (Point(1.0, (0.5, 0.7)), Point(2.0, (0.8,))), 0),
    Line("three", (Point(1.0, (0.1,)), Point(2.0, (0.2, 0.4))), 1, 1),
]


def test_the_front_holds_what_no_other_beats_at_both():
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 7.0), (3.0, 6.0), (0.5, 1.0), (4.0, 7.0)]
    assert pareto(points, True) == [(0.5, 1.0), (1.0, 5.0), (3.0, 7.0)]
    assert pareto(points, False) == [(0.5, 1.0)]
    assert pareto([(1.0, 5.0), (2.0, 4.0)], False) == [(1.0, 5.0), (2.0, 4.0)]


@pytest.mark.parametrize("plot", ["lines", "front"])
def test_plots_are_the_same_bytes_each_time_and_say_what_they_show(plot, tmp_path):
    files = [tmp_path / "a" / "plot.svg", tmp_path / "b" / "plot.svg"]
    for file in files:
        if plot == "lines":
            plot_lines(file, LINES, Axes("samples spent", "agreement"))
        else:
            plot_front(file, LINES, Axes("samples spent", "agreement"), higher_is_better=True)
    one, other = (file.read_text() for file in files)
    assert one == other
    for text in ("one &amp; two", "three", "samples spent", "agreement"):
        assert text in one


def test_a_page_is_whole_in_one_file_and_escapes_what_it_says(tmp_path):
    plot_lines(tmp_path / "plots" / "x.svg", LINES, Axes("x", "y"))
    plot_lines(tmp_path / "plots" / "y.svg", LINES, Axes("x", "y"))
    blocks = [
        Heading("A < B", 1),
        Paragraph("so & so"),
        Table(("arm", "n"), (("a|b", "1"),)),
        Picture("plots/x.svg", "first"),
        Picture("plots/y.svg", "second"),
    ]
    page = to_html(blocks, tmp_path, "A < B")
    assert "<h1>A &lt; B</h1>" in page and "so &amp; so" in page
    assert '<td class="word">a|b</td><td>1</td>' in page
    assert page.count("<svg") == 2 and 'src="plots' not in page
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    markdown = to_markdown(blocks)
    assert "| a\\|b | 1 |" in markdown and "![first](plots/x.svg)" in markdown
