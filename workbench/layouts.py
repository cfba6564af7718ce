"""Figures for papers: widths and font sizes of the common templates.

| layout | width | font | where |
|---|---|---|---|
| `screen` | 1000 pixels | 12 pixels | a page |
| `column` | 3.25 inches | 8 points | one of two columns: ACL, ICML |
| `text` | 5.5 inches | 9 points | the only column: NeurIPS, ICLR |
| `page` | 6.75 inches | 9 points | across both columns |

Labels of ticks are a little smaller. Include the .pdf at its own size, so that fonts stay what they are. Panels that
would become too narrow move below each other, long titles are broken, and lines and markers get thinner; colours and
numbers stay.
"""

import math
import textwrap
from collections.abc import Iterable
from typing import Any, NamedTuple

import plotly.graph_objects as go

from workbench.errors import InputError


class Layout(NamedTuple):
    """Width in inches, size of the font in points."""

    width: float
    font: float


PAPER = {"column": Layout(3.25, 8), "text": Layout(5.5, 9), "page": Layout(6.75, 9)}
LAYOUTS = ("screen", *PAPER)

INCH = 96
"""Pixels, in SVG and in browsers."""
WIDTH, HEIGHT, FONT = 1000, 420, 12
"""What figures are drawn for, in pixels, where they don't say otherwise."""
LETTER = 0.55
"""Mean width of a letter, in font sizes."""
BROADER = 1.9
"""A panel may shrink to the width of the paper over that of the screen, times this, before it moves below another."""
TALLEST = 9 * INCH
"""Of the panels, where narrower ones can avoid more."""
THIN = 0.75
"""Lines and markers, relative to the screen."""


def laid_out(figure: go.Figure, layout: str) -> go.Figure:
    """A copy of a figure for a layout; for "screen" the figure itself. InputError for a layout that isn't there."""
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    if layout == "screen":
        return figure
    width, font = round(PAPER[layout].width * INCH), PAPER[layout].font / 72 * INCH
    shrink = font / FONT
    traces: Any = figure.data
    parts = [_shrunk(trace.to_plotly_json(), shrink) for trace in traces]
    copy: Any = go.Figure(parts, _shrunk(figure.layout.to_plotly_json(), shrink))
    on_screen: Any = figure.layout
    margin = copy.layout.margin.update({"l": 4.6 * font, "b": 3.8 * font})
    scales = [copy.layout[name].colorbar for name in copy.layout if name.startswith("coloraxis")]
    margin.r = 7 * font if any(scale.title.text or scale.len for scale in scales) else max(font, 0.7 * (margin.r or 0))
    for scale in scales:
        scale.update(title={"text": wrapped(scale.title.text, 6 * font, font)})
    legend = _legend_height(copy, width, font)
    inner = (on_screen.height or HEIGHT) - (on_screen.margin.t or 36) - (on_screen.margin.b or 48)
    inner, lines = _arrange(copy, width - margin.l - margin.r, inner, font)
    margin.t = legend + (0.8 + 1.3 * lines) * font
    for scale in scales:
        scale.update(len=min(20 * font, inner))
    return copy.update_layout(width=width, height=round(inner + margin.t + margin.b))


def _shrunk(value: Any, shrink: float, inside: str = "") -> Any:
    """Part of a figure with smaller fonts and shifts and thinner lines; `inside` is the name that the part has."""
    if isinstance(value, dict):
        return {name: _shrunk(one, shrink, f"{inside}.{name}") for name, one in value.items()}
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return [_shrunk(one, shrink, inside) for one in value]
    if not isinstance(value, int | float) or isinstance(value, bool):
        return value
    parent, name = inside.rpartition(".")[::2]
    if parent.endswith("font") and name == "size" or name in ("xshift", "yshift", "standoff"):
        return value * shrink
    if parent.endswith(("line", "marker")) and name in ("width", "size") or name == "thickness":
        return value * THIN
    return value


def wrapped(text: str | None, pixels: float, font: float) -> str | None:
    """Text in lines (<br>) of at most about so many pixels; text with other markup as it is."""
    if not text or "<" in text.replace("<br>", ""):
        return text
    letters = max(6, int(pixels / (LETTER * font)))
    lines = [
        textwrap.wrap(line, letters, break_long_words=False, break_on_hyphens=False) for line in text.split("<br>")
    ]
    return "<br>".join(part for line in lines for part in line)


def _legend_height(figure: Any, width: float, font: float) -> float:
    """Pixels that the entries of the legend need above the panels, side by side while they fit."""
    names = {part.name for part in figure.data if part.showlegend is not False and part.type != "heatmap" and part.name}
    if len(names) < 2 or figure.layout.showlegend is False:
        return 0
    entry = 42 + max(map(len, names)) * LETTER * font
    return math.ceil(len(names) / max(1, int(width / entry))) * 1.9 * font + 0.6 * font


def _arrange(figure: Any, width: float, inner: float, font: float) -> tuple[float, int]:
    """Give the panels places for a plot of `width` pixels; its height in pixels, and the lines of the highest title.

    inner  height on the screen. Panels of unlike size, such as a tree below a heatmap, keep their places.
    """
    layout = figure.layout
    there = [name.removeprefix("xaxis") for name in layout if name.startswith("xaxis") and f"yaxis{name[5:]}" in layout]
    numbers = sorted(there, key=lambda number: int(number or 1))  # a layout lists its parts in any order
    xs, ys = [layout[f"xaxis{number}"] for number in numbers], [layout[f"yaxis{number}"] for number in numbers]
    across, up = [x.domain or (0, 1) for x in xs], [y.domain or (0, 1) for y in ys]
    wide, high = ({round(end - start, 3) for start, end in domains} for domains in (across, up))
    if len(wide) != 1 or len(high) != 1:
        for x, y in zip(xs, ys, strict=True):
            _fit(x, y, _n_labels(figure), width, inner, font)
        return inner * font / FONT, 0
    before, tight = len({round(start, 3) for start, _ in across}), len(ys) > 1 and ys[1].showticklabels is False
    gap, height = (1.2 if tight else 4.6) * font, high.pop() * inner
    named = any(
        isinstance(label, str) for part in figure.data for label in list(part.y if part.y is not None else [])[:1]
    )
    first = min(before, max(1, int(BROADER * before * width / WIDTH + 0.25)))
    columns, rows, panel, lower = first, 1, width, height
    for columns in range(first, before + 1):
        rows, panel = -(-len(numbers) // columns), (width - (columns - 1) * gap) / columns
        lower = height * font / FONT
        if not named:  # a row a name needs its height; a line doesn't
            lower = min(lower, max(0.6 * panel, height * panel * before / WIDTH))
        if rows * lower < TALLEST or (width - columns * gap) / (columns + 1) < 8 * font:
            break
    titles = _panel_titles(figure, across, up)
    for title in titles.values():
        title.text = wrapped(title.text, panel + 0.6 * gap, font)
    _say_once(xs, range(max(0, len(xs) - columns), len(xs)))
    if tight:
        _say_once(ys, range(0, len(ys), columns))
    for x, y in zip(xs, ys, strict=True):
        _fit(x, y, _n_labels(figure), panel, lower, font)
    lines = max((_lines(title.text) for title in titles.values()), default=0)
    below = max((_lines(x.title.text) for x in xs[: (rows - 1) * columns]), default=0)
    between = (2.2 + 1.3 * (lines + below) + (0.6 if below else 0)) * font
    whole = rows * lower + (rows - 1) * between
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        row, column = divmod(at, columns)
        left, top = column * (panel + gap) / width, 1 - row * (lower + between) / whole
        x.domain, y.domain = (left, min(1, left + panel / width)), (max(0, top - lower / whole), top)
        if tight:
            y.showticklabels = column == 0
        if at in titles:
            titles[at].update(x=left + panel / width / 2, y=top)
    return whole, lines


def _n_labels(figure: Any) -> int:
    """Of the heatmaps' columns."""
    return max((len(part.x) for part in figure.data if part.type == "heatmap" and part.x is not None), default=0)


def _say_once(axes: list[Any], where: Iterable[int]) -> None:
    """Where all axes that have a title have the same, give it to these alone."""
    said = {axis.title.text for axis in axes} - {None, ""}
    if len(said) == 1:
        (title,) = said
        for at, axis in enumerate(axes):
            axis.title.text = title if at in where else None


def _fit(x: Any, y: Any, n_labels: int, width: float, height: float, font: float) -> None:
    """Break the titles of a panel's axes to its size in pixels, and leave out labels that would cover each other."""
    x.title.text, y.title.text = wrapped(x.title.text, width, font), wrapped(y.title.text, height, font)
    if x.dtick == 1 and n_labels * font > width:
        x.dtick = math.ceil(n_labels * font / width)
    elif x.tickmode is None and x.dtick is None and x.tickvals is None and width < 14 * font:
        x.nticks = 4


def _lines(text: str | None) -> int:
    return text.count("<br>") + 1 if text else 0


def _panel_titles(figure: Any, across: list, up: list) -> dict[int, Any]:
    """Panel -> the annotation above it."""
    found = {}
    for note in figure.layout.annotations:
        for at, (x, y) in enumerate(zip(across, up, strict=True)):
            centred = note.xref == note.yref == "paper" and abs(note.x - sum(x) / 2) < 1e-6
            if centred and abs(note.y - y[1]) < 1e-6 and note.yanchor == "bottom":
                found[at] = note
    return found
