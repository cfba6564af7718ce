"""How figures look: one template, one palette, and saving to HTML, SVG, PNG and PDF.

A language or domain has the same colour and dash in every figure. The colours are those of Okabe & Ito (2008), which
colour-blind readers can tell apart, without the yellow, which is lost on white paper. Text that comes from data passes
`plain`, because Plotly renders some HTML in labels.
"""

import html
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import InputError
from workbench.layouts import HEIGHT, WIDTH, laid_out
from workbench.output import new_file

FONT = "Inter, system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'Noto Sans', sans-serif"
INK, MUTED, GRID, AXIS = "#1c2733", "#5b6875", "#e9edf1", "#c3ccd5"

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B5B5B")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")

LANGUAGES = (
    "en", "de", "fr", "es", "it", "pt-BR", "ru", "zh-CN", "ja", "ko", "cs", "tr", "pl", "vi", "ar", "hi", "nl", "sv",
    "fi", "hu", "el", "id", "uk", "fa", "he", "th", "bn", "zh-TW", "ca", "nb", "da", "ro", "bg",
)  # fmt: skip
DOMAINS = (
    "fiction", "drama-dialogue", "dialogue", "software-manual", "software-ui", "software-messages", "technical-docs",
    "code-python", "code-c", "code-go", "code-js", "code-rust", "math-formal", "math-word-problems", "biomedical",
    "legal", "legal-rights", "encyclopedic-glosses",
)  # fmt: skip

DIVERGING = ["#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"]
"""Less to more, around "as expected": ColorBrewer's RdBu, safe for colour-blind readers."""
SEQUENTIAL = ["#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b"]
"""Nothing to much: ColorBrewer's Blues."""
DARK = {
    "white": "rgba(0,0,0,0)", "#1c2733": "#e3e8ed", "#5b6875": "#a3b0bc", "#e9edf1": "#262f38", "#c3ccd5": "#45515d",
    "#0072B2": "#3d9fd6", "#5B5B5B": "#9aa3ab", "#7d8894": "#8a95a0", "#cfd6dd": "#3d4853",
}  # fmt: skip
"""What colours of figures become on a dark page; the others can be read on both."""
DIVERGING_DARK = ["#9bd0f0", "#5aa9d6", "#2f7fb8", "#1f5078", "#20272f", "#7a3328", "#b8503c", "#e08060", "#f9bfa3"]
SEQUENTIAL_DARK = ["#161d24", "#12304a", "#0f456d", "#125b90", "#2272b0", "#4390c8", "#6fafdb", "#a3cfea", "#dcedf9"]
REACH = 3
"""The colour scale of ratios ends at 2 to this power."""

MOST_BANDS = 4
"""More lines than this in a panel, and their intervals would cover each other: they are left to the hover text."""
MOST_LINES = 8
"""More lines than this, and each gets a panel of its own."""

CONFIG = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "responsive": True,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
    "toImageButtonOptions": {"format": "svg"},
}
"""Of interactive figures. No button may send data anywhere."""

FORMATS = (".html", ".svg", ".png", ".pdf")


class Style(NamedTuple):
    """Colour and dash of a line."""

    colour: str
    dash: str = "solid"
    width: float = 2


MAIN = Style("#0072B2")
NULL = Style("#7d8894", "dot", 1.5)
CONTEXT = Style("#cfd6dd", "solid", 2)


def template() -> go.layout.Template:
    """The look of every figure: light, thin lines, legible on a page 8 cm wide."""
    axis = {
        "gridcolor": GRID, "linecolor": AXIS, "zerolinecolor": AXIS, "zeroline": False, "showline": True,
        "ticks": "outside", "ticklen": 4, "tickcolor": AXIS, "automargin": True,
        "title": {"font": {"size": 12, "color": MUTED}, "standoff": 8}, "tickfont": {"size": 11},
    }  # fmt: skip
    layout = {
        "font": {"family": FONT, "size": 12, "color": INK},
        "colorway": list(COLOURS),
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 60, "r": 20, "t": 36, "b": 48},
        "xaxis": axis,
        "yaxis": axis,
        "hoverlabel": {"bgcolor": "white", "bordercolor": AXIS, "align": "left", "font": {"family": FONT, "size": 12}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "yref": "container",
            "y": 0.995,
            "yanchor": "top",
            "font": {"size": 12},
        },
        "annotationdefaults": {"font": {"size": 12, "color": INK}},
    }
    return go.layout.Template(layout=layout)


def plain(text: Any) -> str:
    """Text from data for a label: shown as it is, whatever markup it contains."""
    return html.escape("".join(c if c.isprintable() else "�" for c in str(text)), quote=False)


def noun(column: str) -> str:
    """What a column holds, for a sentence."""
    return {"lang": "language"}.get(column, column)


def style(name: str) -> Style:
    """Colour and dash of a language, a domain or any other label; the same in every figure."""
    for known in (LANGUAGES, DOMAINS):
        if name in known:
            place = known.index(name)
            break
    else:
        place = zlib.crc32(str(name).encode())
    return Style(COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)])


def ordered(labels: Iterable[str]) -> list[str]:
    """Labels in the order of all figures: known languages and domains first, the others by name."""
    known = [*LANGUAGES, *DOMAINS]
    return sorted(labels, key=lambda label: (known.index(label) if label in known else len(known), str(label)))


def panels(
    titles: Sequence[str], *, columns: int = 1, height: int = 300, legend: bool = False, tight: bool = False
) -> go.Figure:
    """A figure of several panels, in rows of `columns`; panel i has the axes x{i+1} and y{i+1}.

    height  of one panel, in pixels
    legend  leave room for one above
    tight   less room between columns: only the first has labels on its vertical axis
    """
    columns = min(columns, len(titles))
    n_rows = -(-len(titles) // columns)
    top, bottom, gap = (64 if legend else 32), 48, 52
    inner = n_rows * height + (n_rows - 1) * gap
    cells: list[dict | None] = [{} for _ in titles]
    cells += [None] * (n_rows * columns - len(titles))
    result = make_subplots(
        n_rows,
        columns,
        subplot_titles=list(titles),
        specs=[cells[row * columns : (row + 1) * columns] for row in range(n_rows)],
        horizontal_spacing=(0.06 if tight else 0.2) / columns,
        vertical_spacing=gap / inner if n_rows > 1 else 0,
    )
    result.update_annotations(font={"size": 12, "color": INK})
    result.update_layout(template=template(), height=inner + top + bottom, margin={"t": top, "b": bottom})
    if tight:
        for panel in range(len(titles)):
            if panel % columns:
                result.update_layout({f"yaxis{panel + 1}": {"showticklabels": False}})
    return result


def axes(panel: int) -> dict[str, Any]:
    """The axes of a panel, as arguments of a Plotly trace."""
    number = str(panel + 1) if panel else ""
    return {"xaxis": f"x{number}", "yaxis": f"y{number}"}


def same_range(result: go.Figure) -> None:
    """Give all panels the vertical range of the first."""
    result.update_yaxes(matches="y")
    result.layout["yaxis"]["matches"] = None  # an axis that follows itself


def line(
    result: go.Figure,
    x: Iterable,
    y: Iterable,
    low: Iterable | None = None,
    high: Iterable | None = None,
    *,
    name: str,
    style: Style = MAIN,
    panel: int = 0,
    band: bool = True,
    legend: bool = True,
    fill: bool = False,
    x_name: str = "layer",
) -> None:
    """Add a line with its interval as a band (and in the hover text); `fill` shades down to 0 instead."""
    options: dict[str, Any] = {**axes(panel), "legendgroup": plain(name)}
    x, y = np.asarray(x), np.asarray(y, float)
    details, ends = np.empty((len(x), 0)), ""
    if low is not None and high is not None:
        low, high = np.asarray(low, float), np.asarray(high, float)
        details, ends = np.column_stack([low, high]), " [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
        known = np.isfinite(low) & np.isfinite(high)
        if band and known.any():
            around = np.concatenate([x[known], x[known][::-1]])
            result.add_scatter(
                x=around, y=np.concatenate([high[known], low[known][::-1]]), mode="lines", line={"width": 0},
                fill="toself", fillcolor=faded(style.colour), hoverinfo="skip", showlegend=False, **options,
            )  # fmt: skip
    if fill:
        options |= {"fill": "tozeroy", "fillcolor": faded(style.colour, 0.12)}
    result.add_scatter(
        x=x, y=y, name=plain(name), showlegend=legend, mode="lines+markers" if len(x) <= 48 else "lines",
        line={"color": style.colour, "dash": style.dash, "width": style.width}, marker={"size": 5},
        customdata=details, hovertemplate=f"%{{fullData.name}}<br>{x_name} %{{x}}: %{{y:.3f}}{ends}<extra></extra>",
        **options,
    )  # fmt: skip


def dots(
    result: go.Figure,
    x: Iterable,
    names: Sequence[str],
    low: Iterable,
    high: Iterable,
    *,
    panel: int = 0,
    style: Style = MAIN,
    name: str = "",
    legend: bool = False,
) -> None:
    """Add a row a name: a dot and its interval. The names are used as they are: escape them."""
    x, low, high = (np.asarray(values, float) for values in (x, low, high))
    result.add_scatter(
        x=x, y=np.array(names), **axes(panel), mode="markers", marker={"color": style.colour, "size": 7},
        name=plain(name), showlegend=legend,
        error_x={"type": "data", "array": high - x, "arrayminus": x - low, "thickness": 1.5, "width": 0,
                 "color": faded(style.colour, 0.55)},
        customdata=np.column_stack([low, high]),
        hovertemplate="%{y}<br>%{x:+.3f} [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]<extra></extra>",
    )  # fmt: skip


def ratios(
    ratio: np.ndarray, x: Sequence, y: Sequence[str], *, hover: str, details: np.ndarray, panel: int = 0
) -> go.Heatmap:
    """A heatmap of ratios on the common logarithmic colour scale: 1 is white, 8 and more dark red."""
    with np.errstate(divide="ignore"):
        z = np.clip(np.log2(ratio), -REACH, REACH)
    places: dict[str, Any] = {"x": list(x), "y": list(y), **axes(panel)}
    return go.Heatmap(
        z=z, customdata=details, hovertemplate=hover, coloraxis="coloraxis", xgap=0.5, ygap=0.5, hoverongaps=False,
        **places,
    )  # fmt: skip


def ratio_scale(result: go.Figure, title: str) -> None:
    """Add the colour scale of `ratios`."""
    ticks = list(range(-REACH, REACH + 1))
    names = [f"{2**tick}×" if tick >= 0 else f"1/{2**-tick}×" for tick in ticks]
    names[0], names[-1] = f"≤ {names[0]}", f"≥ {names[-1]}"
    height = float(str(result.layout["height"] or HEIGHT))
    bar = {
        "title": {"text": title, "font": {"size": 11, "color": MUTED}}, "tickvals": ticks, "ticktext": names,
        "thickness": 12, "lenmode": "pixels", "len": min(240, height - 60), "y": 1, "yanchor": "top",
        "outlinewidth": 0, "tickfont": {"size": 11},
    }  # fmt: skip
    result.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -REACH, "cmax": REACH, "colorbar": bar})


def amounts(
    amount: np.ndarray, x: Sequence, y: Sequence[str], *, hover: str, details: np.ndarray | None = None, panel: int = 0
) -> go.Heatmap:
    """A heatmap of amounts from white (least) to dark blue, on the scale of `amount_scale`; NaN stays empty."""
    places: dict[str, Any] = {"x": list(x), "y": list(y), **axes(panel)}
    return go.Heatmap(
        z=amount, customdata=details, hovertemplate=hover, coloraxis="coloraxis", xgap=0.5, ygap=0.5,
        hoverongaps=False, **places,
    )  # fmt: skip


def amount_scale(result: go.Figure, title: str, low: float | None = None, high: float | None = None) -> None:
    """Add the colour scale of `amounts`; its ends are those of the data unless given."""
    height = float(str(result.layout["height"] or HEIGHT))
    bar = {
        "title": {"text": title, "font": {"size": 11, "color": MUTED}}, "thickness": 12, "lenmode": "pixels",
        "len": min(240, height - 60), "y": 1, "yanchor": "top", "outlinewidth": 0, "tickfont": {"size": 11},
    }  # fmt: skip
    result.update_layout(coloraxis={"colorscale": SEQUENTIAL, "cmin": low, "cmax": high, "colorbar": bar})


def differences(
    difference: np.ndarray, x: Sequence, y: Sequence[str], *, hover: str, details: np.ndarray, panel: int = 0
) -> go.Heatmap:
    """A heatmap of differences around 0 (white) on the scale of `difference_scale`; NaN stays empty."""
    return amounts(difference, x, y, hover=hover, details=details, panel=panel)


def difference_scale(result: go.Figure, title: str, reach: float) -> None:
    """Add the colour scale of `differences`: blue at -reach, red at reach."""
    reach = reach if reach > 0 else 1.0
    amount_scale(result, title, -reach, reach)
    result.update_layout(coloraxis={"colorscale": DIVERGING})


def spread(layers: Iterable[int], most: int) -> list[int]:
    """At most so many of the layers, evenly spread, first and last among them: those that a figure has room for."""
    known = sorted(set(layers))
    return [known[at] for at in np.linspace(0, len(known) - 1, min(len(known), most)).round().astype(int)]


def layer_axes(result: go.Figure, layers: Iterable[int], *, sparse: bool = False) -> None:
    """Label the horizontal axes with layer numbers: whole, and not too many."""
    last = max(layers)
    step = max(1, math.ceil((last + 1) / (6 if sparse else 16)))
    result.update_xaxes(tickmode="linear", tick0=0, dtick=step, range=[-0.03 * last - 0.15, 1.03 * last + 0.15])
    if not sparse:
        result.update_xaxes(title="layer")


def left_title(result: go.Figure, text: str) -> None:
    """One title for the vertical axes of all panels."""
    result.add_annotation(
        text=text, textangle=-90, xref="paper", yref="paper", x=0, xshift=-52, y=0.5, showarrow=False,
        font={"size": 12, "color": MUTED},
    )  # fmt: skip


def faded(colour: str, opacity: float = 0.18) -> str:
    """A colour of the palette with opacity."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


_FADING = {
    faded(old, 0).removesuffix("0)"): new for old, new in DARK.items() if old.startswith("#") and new.startswith("#")
}
"""How a faded colour begins, and what the colour becomes on a dark page."""


def on_dark(figure: go.Figure) -> go.Figure:
    """A copy for a dark page: transparent, light ink, and colour scales whose neutral end is dark."""
    scales: dict[tuple, list[str]] = {tuple(DIVERGING): DIVERGING_DARK, tuple(SEQUENTIAL): SEQUENTIAL_DARK}

    def swapped(value: Any) -> Any:
        if isinstance(value, str):
            if value.startswith("rgba("):  # of `faded`
                return next(
                    (faded(new, _opacity(value)) for old, new in _FADING.items() if value.startswith(old)), value
                )
            return DARK.get(value, value)
        if isinstance(value, dict):
            return {name: swapped(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            colours = [pair[1] if isinstance(pair, list | tuple) and len(pair) == 2 else pair for pair in value]
            scale = scales.get(tuple(map(str, colours)))
            if scale is not None:
                return [[at / (len(scale) - 1), colour] for at, colour in enumerate(scale)]
            return [swapped(one) for one in value]
        return value  # arrays: numbers and hover texts

    traces: Any = figure.data
    parts = [trace.to_plotly_json() for trace in traces]  # of the whole figure, arrays would come out encoded
    copy = go.Figure([swapped(part) for part in parts], swapped(figure.layout.to_plotly_json()))
    hover = {"bgcolor": "#1c232b", "bordercolor": DARK[AXIS], "font": {"color": DARK[INK]}}
    return copy.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hoverlabel=hover)


def _opacity(colour: str) -> float:
    return float(colour.rpartition(",")[2].rstrip(")"))


def save(figure: go.Figure, path: str | os.PathLike, *, layout: str = "screen", overwrite: bool = False) -> None:
    """Write a figure; the ending of `path` decides: .html (self-contained, interactive), .svg, .png or .pdf.

    layout  one of `workbench.layouts.LAYOUTS`: "screen", or a width and font for a paper: "column", "text", "page"

    Images take a Chrome or Chromium, found by BROWSER_PATH or on the PATH, and the package kaleido. InputError for
    another ending or layout, an existing file without `overwrite`, and for images without kaleido or a browser.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise InputError(f"{path} ends in {ending!r}; a figure is written as {', '.join(FORMATS)}.")
    figure = laid_out(figure, layout)
    with new_file(path, overwrite) as partial:
        if ending == ".html":
            text = figure.to_html(include_plotlyjs=True, full_html=True, config=CONFIG)
            partial.write_text(text, encoding="utf-8")
        else:
            partial.write_bytes(image(figure, ending[1:]))


def image(figure: go.Figure, kind: str) -> bytes:
    """The figure as svg, png or pdf, drawn by a browser on this machine, without network."""
    try:
        import kaleido
    except ImportError:
        raise InputError(
            "images (.svg, .png, .pdf) take the package kaleido: pip install 'moe-workbench[figures]'; .html doesn't."
        ) from None
    browser = find_browser()
    options = {
        "format": kind,
        "width": figure.layout["width"] or WIDTH,
        "height": figure.layout["height"] or HEIGHT,
        "scale": 1 if kind != "png" else 2 if figure.layout["width"] is None else 3,  # on paper about 300 dpi
    }
    page = kaleido.PageGenerator(mathjax=False)  # by default it would be fetched from a CDN
    return kaleido.calc_fig_sync(figure.to_dict(), options, kopts={"page_generator": page, "path": browser})


def find_browser() -> str:
    """Path of a Chrome or Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
    named = os.environ.get("BROWSER_PATH")
    if named and not Path(named).exists():
        raise InputError(f"BROWSER_PATH is {named!r}, where there is no file; set it to a Chrome or Chromium.")
    found = named or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise InputError(
            "images (.svg, .png, .pdf) are drawn by a Chrome or Chromium, and none was found: install one "
            "(apt-get install chromium), set BROWSER_PATH, or write .html instead."
        )
    return found
