"""Figures linked to tables: which rows of an analysis's table a clicked point of its figure means.

A point says what it is in its hover text, its trace's name and its panel's title: "layer 3", "expert 17", a language, a
policy, and the numbers of the row themselves. `rows` compares these facts with the columns of the table, for every
analysis alike:

1. Facts with a name (`layer 3`, `capacity 12`, `windows of 16 tokens`) leave only the rows that have them.
2. Of these the rows with the most other facts are kept: a number that stands in the row counts twice, a label once.

A point that was drawn from several rows (a mean over layers, a median of experts) means all of them. One that stands
for no row (what even routing would give, say) may mean none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench import figures

NAMED = {"tokens a batch": "batch_tokens", "ρ": "ratio", "tenth": "decile"}
"""Words of hover texts that stand before a number, and the column they mean; other columns go by their own names."""
WRITTEN = (
    (r"\blayers? (\d+)", ("layer",)),
    (r"\bexpert (\d+)", ("expert",)),
    (r"([\d,]+) tokens?\b", ("window", "batch_tokens")),
    (r"\bm = (\d+)", ("window",)),
    (r"ρ = ([\d.]+)", ("ratio",)),
)
"""Numbers in labels, and the columns that they may be of."""
WHOLE = ("all layers", "one cache for all layers")
"""Labels of the rows whose layer is missing."""
PLACE = re.compile(r"([^%{}]*)%\{([^}:]+)(?::[^}]*)?\}")
MOST_RINGS = 2500
"""More cells than this, and a clicked one gets no ring: a browser takes seconds to draw so many marks."""
CELL = "cell"
"""Stands in the `meta` of the marks that `clickable` lays over a heatmap."""


def rows(frame: pd.DataFrame, figure: go.Figure, point: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of `frame` that a point of its figure means, in the order of the table; empty where it means none.

    figure  as drawn by the analysis, or what `clickable` made of it: the one that was clicked
    point   one of the points of Streamlit's selection: `curve_number` and `point_index` (of a heatmap's cell: a pair,
            row and column) say which
    """
    if frame.empty or int(point["curve_number"]) >= len(figure.data):
        return frame.iloc[:0]
    trace, at = figure.data[int(point["curve_number"])], place(point["point_index"])
    labels = [str(label) for label in (trace.name, panel_title(figure, trace)) if label]
    numbers: list[float] = []
    kept = np.ones(len(frame), bool)
    named = False
    for words, value in said(trace, at):
        column = column_of(words, frame)
        if column is not None and number(value) is not None:
            kept, used = narrowed(kept, close(frame[column], number(value)))
            named |= used
        if isinstance(value, str):
            labels.append(value)
        elif number(value) is not None:
            numbers.append(float(value))
    for label in labels:
        for mask in written(label, frame):
            kept, used = narrowed(kept, mask)
            named |= used
    score = sum(
        (2 * any_close(frame, value) for value in numbers),
        sum((labelled(frame, label).astype(int) for label in labels), np.zeros(len(frame), int)),
    )
    best = int(score[kept].max(initial=0))
    if not named and not best:
        return frame.iloc[:0]
    return frame[kept & (score == best)]


def clickable(figure: go.Figure) -> go.Figure:
    """A copy of a figure whose points can all be clicked, with the same look and the same hover texts.

    Plotly selects markers only. Cells of heatmaps get invisible marks in their middle, and lines without markers
    invisible ones; what was clicked gets a ring.
    """
    result = go.Figure(figure)
    traces: list[Any] = list(result.data)
    heatmaps = [trace for trace in traces if isinstance(trace, go.Heatmap)]
    n_cells = sum(np.asarray(trace.z).size for trace in heatmaps)
    for trace in heatmaps:
        result.add_trace(marks(trace, rings=n_cells <= MOST_RINGS))
        for side in "xy":
            hold(result, trace, side)
        trace.update(hoverinfo="skip", hovertemplate=None)
    if heatmaps:
        result.update_layout(hoverdistance=-1)  # a large cell is hovered as far as its corners
    for trace in traces:
        if trace.type == "scatter" and trace.meta != CELL and trace.hoverinfo != "skip":
            if "markers" not in (trace.mode or ""):
                trace.update(mode="lines+markers", marker={"size": 6, "opacity": 0})
            opacity = 1 if trace.marker.opacity is None else trace.marker.opacity
            trace.update(selected={"marker": {"opacity": 1, "size": 11}}, unselected={"marker": {"opacity": opacity}})
    return result


def marks(heatmap: Any, *, rings: bool) -> go.Scatter:
    """Invisible marks in the middle of a heatmap's known cells, with its hover text."""
    z = np.asarray(heatmap.z, float)
    details: Any = np.empty((*z.shape, 0)) if heatmap.customdata is None else np.asarray(heatmap.customdata)
    across, up = np.meshgrid(np.arange(z.shape[1]), np.arange(z.shape[0]))
    shown = np.isfinite(z)
    x, y = np.asarray(heatmap.x)[across[shown]], np.asarray(heatmap.y)[up[shown]]
    template = (heatmap.hovertemplate or "").replace("%{z", f"%{{customdata[{details.shape[2]}]")
    return go.Scatter(
        x=x, y=y, customdata=np.concatenate([details[shown], z[shown][:, None]], axis=1), mode="markers", meta=CELL,
        xaxis=heatmap.xaxis, yaxis=heatmap.yaxis, showlegend=False, hovertemplate=template or None,
        marker={"symbol": "square-open", "size": 9, "color": figures.INK, "opacity": 0, "line": {"width": 2},
                "maxdisplayed": 0 if rings else 1},
        selected={"marker": {"opacity": 1}}, unselected={"marker": {"opacity": 0}},
    )  # fmt: skip


def hold(figure: go.Figure, heatmap: Any, side: str) -> None:
    """Fix the range of a heatmap's axis, around which marks would make room."""
    name = heatmap[f"{side}axis"] or side
    axis: Any = figure.layout[f"{side}axis{name[1:]}"]
    places = [number(value) for value in heatmap[side]]
    known = [value for value in places if value is not None]
    if axis.type == "category" or len(known) < len(places):
        known = [0.0, len(places) - 1.0]
    if axis.range is None and known:
        ends = [min(known) - 0.5, max(known) + 0.5]
        axis.update(range=ends[::-1] if axis.autorange == "reversed" else ends, autorange=False)


def place(index: Any) -> int | tuple[int, ...]:
    """A point's index: a number, or row and column of a heatmap's cell."""
    return tuple(int(i) for i in index) if isinstance(index, list | tuple) else int(index)


def said(trace: Any, at: int | tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """What the hover text says of a point: the words before each value, and the value, as in the data."""
    template = (trace.hovertemplate or "%{x} %{y}").partition("<extra>")[0]
    for words, key in PLACE.findall(template):
        values = value_at(trace, key, at)
        for value in values:
            yield re.sub(r"<[^>]*>", "\n", words), value


def value_at(trace: Any, key: str, at: int | tuple[int, ...]) -> list[Any]:
    """The value that a key of a hover template has at a point; none where the key is of another kind."""
    if found := re.fullmatch(r"customdata\[(\d+)\]", key):
        return [np.asarray(trace.customdata)[at][int(found[1])]]
    if key not in ("x", "y", "z") or trace[key] is None:
        return []
    values = np.asarray(trace[key])
    if isinstance(at, tuple) and key != "z":
        return [values[at[1] if key == "x" else at[0]]]
    return [values[at]]


def panel_title(figure: go.Figure, trace: Any) -> str:
    """The title of the panel that a trace is drawn in, "" if it has none: the annotation above its middle."""
    axes = [getattr(trace, side, None) or side[0] for side in ("xaxis", "yaxis")]
    layout: Any = figure.layout
    x, y = (layout[f"{axis[0]}axis{axis[1:]}"].domain for axis in axes)
    if x is None or y is None:
        return ""
    for note in layout.annotations:
        above = note.xref == "paper" and note.yref == "paper" and note.yanchor == "bottom" and note.text
        if above and abs(note.x - (x[0] + x[1]) / 2) < 1e-6 and abs(note.y - y[1]) < 1e-6:
            return str(note.text)
    return ""


def column_of(words: str, frame: pd.DataFrame) -> str | None:
    """The column whose values tell rows apart and whose name is the last of these words; None if there is none."""
    words = words.rpartition("\n")[2].strip(" (,:·")
    for ending, column in NAMED.items():
        if words.endswith(ending) and column in frame:
            return column
    # Longest first: "norm rank" is not the rank.
    for column in sorted(map(str, frame.columns), key=len, reverse=True):
        spelled = column.replace("_", " ")
        if re.search(rf"(^|\W){re.escape(spelled)}s?$", words) and tells_apart(frame[column], column):
            return column
    return None


def tells_apart(values: pd.Series, column: str) -> bool:
    """Whether a column says which row it is rather than what was measured."""
    whole = pd.api.types.is_integer_dtype(values) and not column.startswith("n_")
    return whole or column in ("ratio", "capacity_factor")


def number(value: Any) -> float | None:
    """A value as a number, None where it isn't one or isn't known."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if np.isfinite(result) else None


def narrowed(kept: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, bool]:
    """The rows that are left, and whether the mask was used: one that would leave none says something else."""
    both = kept & mask
    return (both, True) if both.any() else (kept, False)


def close(values: pd.Series, wanted: float | None) -> np.ndarray:
    """Where a column holds a number: bool (n_rows,)."""
    return np.isclose(values.to_numpy(float, na_value=np.nan), np.nan if wanted is None else wanted, rtol=1e-7, atol=0)


def any_close(frame: pd.DataFrame, wanted: float) -> np.ndarray:
    """1 where any column of a row holds the number, else 0: int (n_rows,)."""
    columns = [column for column, kind in frame.dtypes.items() if pd.api.types.is_numeric_dtype(kind)]
    found = np.zeros(len(frame), bool)
    for column in columns:
        found |= close(frame[column], wanted)
    return found.astype(int)


def written(label: str, frame: pd.DataFrame) -> Iterator[np.ndarray]:
    """The rows that the numbers in a label mean, one mask a number."""
    for pattern, columns in WRITTEN:
        for column in (name for name in columns if name in frame):
            for found in re.findall(pattern, label):
                yield close(frame[column], float(found.replace(",", "")))
    if label in WHOLE and "layer" in frame:
        yield frame["layer"].isna().to_numpy()


def labelled(frame: pd.DataFrame, label: str) -> np.ndarray:
    """Where a label, or a part of it, is the value of a column: bool (n_rows,)."""
    parts = {part for whole in (label, re.sub(r"<[^>]*>", "", label)) for part in re.split(r" · |, |: | \(|\)", whole)}
    parts = {part.strip("\u200b“”") for part in {label, *parts}} - {""}
    cut = tuple(part[:-1] for part in parts if part.endswith("…") and len(part) > 1)
    result = np.zeros(len(frame), bool)
    for column, kind in frame.dtypes.items():
        if pd.api.types.is_numeric_dtype(kind):
            if column in ("expert", "other", "next_expert"):  # digits as a label: an expert of a matrix
                for part in parts:
                    if part.isdecimal():
                        result |= close(frame[column], float(part))
            continue
        codes, values = pd.factorize(frame[column])
        spelled = [figures.plain(value) for value in values]
        hit = np.array([text in parts or (bool(cut) and text.startswith(cut)) for text in spelled] + [False])
        result |= hit[codes]
    return result
