"""Figures for papers: their width, fonts that can be read, and nothing on top of anything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from commandline import Command, refused

from workbench import figures
from workbench.errors import InputError
from workbench.layouts import INCH, LAYOUTS, PAPER, laid_out, wrapped

LONG = "a long title of an axis that says at length what the numbers are, and in which unit"


def grid(n: int, columns: int, *, tight: bool = False, names: bool = False) -> go.Figure:
    """Panels with a line, or a row a name, each."""
    result = figures.panels([f"panel {at}" for at in range(n)], columns=columns, height=220, legend=True, tight=tight)
    for at in range(n):
        y = [f"name {row}" for row in range(12)] if names else np.arange(12)
        result.add_scatter(x=np.arange(12), y=y, name="mean of everything" if at % 2 else "x", **figures.axes(at))
    result.update_xaxes(title=LONG)
    result.update_yaxes(title="score")
    return result


def sizes(value: Any, inside: str = "") -> Iterator[float]:
    """Sizes of all fonts in a part of a figure, in pixels."""
    if isinstance(value, dict):
        for name, one in value.items():
            if inside.endswith("font") and name == "size":
                yield one
            yield from sizes(one, name)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from sizes(one, inside)


@pytest.mark.parametrize("layout", PAPER)
@pytest.mark.parametrize(
    ("n", "columns", "tight"), [(1, 1, False), (2, 2, False), (6, 3, True), (7, 6, True), (4, 2, False)]
)
def test_size_fonts_and_places(layout: str, n: int, columns: int, tight: bool):
    figure = grid(n, columns, tight=tight)
    before = figure.to_json()
    paper = laid_out(figure, layout)
    assert figure.to_json() == before
    assert paper.layout.width == round(PAPER[layout].width * INCH) and paper.layout.height <= 14 * INCH
    points = [size * 72 / INCH for size in sizes(paper.to_plotly_json())]
    assert points and min(points) >= 7 and max(points) == pytest.approx(PAPER[layout].font)
    plot = paper.layout.width - paper.layout.margin.l - paper.layout.margin.r
    inner = paper.layout.height - paper.layout.margin.t - paper.layout.margin.b
    boxes = []
    for at in range(n):
        number = str(at + 1) if at else ""
        x, y = paper.layout[f"xaxis{number}"].domain or (0, 1), paper.layout[f"yaxis{number}"].domain or (0, 1)
        assert 0 <= x[0] < x[1] <= 1 and 0 <= y[0] < y[1] <= 1
        assert (x[1] - x[0]) * plot >= 60 and (y[1] - y[0]) * inner >= 40
        title = paper.layout.annotations[at]
        assert title.text.startswith("panel") and (title.x, title.y) == pytest.approx(((x[0] + x[1]) / 2, y[1]))
        boxes.append((*x, *y))
    for one in range(n):
        for other in range(one):
            (left, right, low, high), (a, b, c, d) = boxes[one], boxes[other]
            assert right <= a + 1e-9 or b <= left + 1e-9 or high <= c + 1e-9 or d <= low + 1e-9


def test_a_title_that_all_panels_have_is_said_once_a_column():
    paper = laid_out(grid(6, 3, tight=True), "text")
    xs, ys = ([paper.layout[f"{name}axis{number}"] for number in ("", 2, 3, 4, 5, 6)] for name in "xy")
    n_columns = len({axis.domain for axis in xs})
    said = [axis.title.text for axis in xs if axis.title.text]
    assert n_columns == 2 and len(said) == 2 and said[0].replace("<br>", " ") == LONG
    shown = [axis.showticklabels is not False for axis in ys]
    assert shown == [True, False] * 3 == [bool(axis.title.text) for axis in ys]


def test_rows_of_names_keep_their_height():
    lines, names = (laid_out(grid(1, 1, names=named), "column").layout.height for named in (False, True))
    assert names > lines
    inner = grid(1, 1, names=True).layout
    assert names >= 0.8 * (inner.height - inner.margin.t - inner.margin.b)


def test_lines_are_thinner_and_colours_stay():
    figure = figures.panels([""])
    figures.line(figure, [0, 1], [1, 2], [0, 1], [2, 3], name="x")
    paper = laid_out(figure, "column")
    assert paper.data[1].line.width < figure.data[1].line.width and paper.data[1].marker.size < 5
    assert paper.data[1].line.color == figure.data[1].line.color
    np.testing.assert_array_equal(paper.data[1].y, figure.data[1].y)


def test_colour_scales_and_dense_labels():
    names = [f"n{at}" for at in range(60)]
    figure = figures.panels([""], height=17 * 60)
    figure.add_trace(figures.amounts(np.eye(60), names, names, hover=""))
    figures.amount_scale(figure, "divergence beyond chance")
    figure.update_xaxes(tickmode="linear", dtick=1)
    paper = laid_out(figure, "column")
    assert paper.layout.xaxis.dtick > 1 and "<br>" in paper.layout.coloraxis.colorbar.title.text
    assert paper.layout.margin.r > 60 and paper.layout.coloraxis.colorbar.len <= paper.layout.height


def test_wrapped():
    assert wrapped("one two three", 60, 10) == "one two<br>three" and wrapped(None, 10, 10) is None
    assert wrapped("<b>one two three</b>", 10, 10) == "<b>one two three</b>"  # markup stays whole
    assert str(wrapped("&lt;script&gt; and more text", 60, 10)).startswith("&lt;script&gt;<br>")
    assert wrapped("one<br>two", 1000, 10) == "one<br>two"


def test_screen_is_the_figure_itself_and_others_are_refused():
    figure = grid(1, 1)
    assert laid_out(figure, "screen") is figure and set(LAYOUTS) == {"screen", *PAPER}
    with pytest.raises(InputError, match="layout is 'a4'; expected one of screen, column, text, page"):
        laid_out(figure, "a4")


def test_layout_on_the_command_line(workbench: Command, demo_trace, tmp_path):
    asked = ("analyze", "load", demo_trace, "--figure", tmp_path / "f.html", "--layout")
    assert workbench(*asked, "column").code == 0 and '"width":312' in (tmp_path / "f.html").read_text()
    refused(workbench(*asked, "a4", "--overwrite"), "--layout 'a4'", "screen, column, text, page")
    refused(workbench("analyze", "load", demo_trace, "--layout", "text"), "--layout text is of a figure", "--figure")


def test_pdf_has_the_width_of_the_column(tmp_path):
    try:
        figures.find_browser()
    except InputError:
        pytest.skip("no Chrome or Chromium here")
    pytest.importorskip("kaleido")
    figures.save(grid(2, 2), tmp_path / "f.svg", layout="column")
    assert 'width="312"' in (tmp_path / "f.svg").read_text()[:400]
    figures.save(grid(2, 2), tmp_path / "f.pdf", layout="column")
    box = (tmp_path / "f.pdf").read_bytes().partition(b"/MediaBox [")[2].partition(b"]")[0]
    assert float(box.split()[2]) == pytest.approx(3.25 * 72, abs=1)
