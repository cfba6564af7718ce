"""A chart of any table: a kind, and the columns it shows.

>>> import pandas as pd
>>> draw(pd.DataFrame({"lang": ["de", "en"], "tokens": [3, 5]}), "bars", "lang", "tokens").data[0].type
'bar'
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench import figures
from workbench.errors import InputError

KINDS = ("bars", "lines", "dots", "heatmap", "histogram")
MOST_POINTS = 20_000
"""Points of a chart that a browser draws without waiting."""
MOST_COLOURS = 35
"""Labels that colour and dash can tell apart."""


def draw(frame: pd.DataFrame, kind: str, x: str, y: str | None = None, colour: str | None = None) -> go.Figure:
    """The chart.

    kind    one of KINDS
    x       a column: the horizontal axis; of a histogram, what is counted
    y       a column of numbers: the vertical axis (a histogram has none); of a heatmap, any column: its rows
    colour  a column: a line or a bar for each of its values; of a heatmap, the numbers that are shown as colours

    InputError for a column that isn't there or doesn't suit, for no rows, and for more than MOST_POINTS points.
    """
    if kind not in KINDS:
        raise InputError(f"there is no chart {kind!r}; expected one of {', '.join(KINDS)}.")
    for column in (x, y, colour):
        if column is not None and column not in frame:
            raise InputError(f"no column {column!r}; the table has {', '.join(map(str, frame.columns))}.")
    if not len(frame):
        raise InputError("The table has no rows to draw.")
    if kind != "histogram" and len(frame) > MOST_POINTS:
        raise InputError(
            f"{len(frame):,} rows are too many for a chart of {MOST_POINTS:,} points: aggregate (GROUP BY), draw a "
            "sample (USING SAMPLE), or take a histogram."
        )
    if kind == "histogram":
        return _histogram(frame, x, colour)
    if y is None:
        raise InputError(f"{kind} take a vertical axis: choose a column for y.")
    return _heatmap(frame, x, y, colour) if kind == "heatmap" else _series(frame, kind, x, y, colour)


def suggestion(frame: pd.DataFrame, kind: str | None = None) -> tuple[str, str, str | None, str | None]:
    """kind, x, y, colour for a table that nobody has chosen them for. InputError if it has no column.

    kind  None: the one that suits the table
    """
    if not len(frame.columns):
        raise InputError("The table has no columns to draw.")
    names = [str(name) for name in frame.columns]
    numbers = [name for name in names if _is_number(frame[name])]
    places = [name for name in numbers if name in ("layer", "expert", "pos", "position", "seq", "rank")]
    labels = [name for name in names if name not in numbers]
    values = [name for name in numbers if name not in places] or numbers
    value = values[0] if values else None
    kind = kind or _kind(frame, places, labels, values)
    axes = [name for name in (*reversed(places), *labels, *numbers) if name != value] or names
    if kind == "histogram":
        return kind, str(value or names[0]), None, None
    if kind == "heatmap":
        down = next((name for name in ("layer", *axes) if name in axes and name != axes[0]), None)
        across = next((name for name in axes if name != down), axes[0])
        return kind, across, down, value
    x = labels[0] if kind == "bars" and labels else min(places, key=names.index) if places else axes[0]
    others = [label for label in labels if label != x and 1 < frame[label].astype(str).nunique() <= MOST_COLOURS]
    apart = (label for label in others if not frame.duplicated([x, label]).any())
    return kind, x, value, next(apart, None) if frame.duplicated(x).any() else None


def _kind(frame: pd.DataFrame, places: list[str], labels: list[str], values: list[str]) -> str:
    """The chart that suits a table with these columns of places, labels and other numbers."""
    measured = [name for name in values if name not in places]
    if {"layer", "expert"} <= set(places) and measured and not frame.duplicated(["layer", "expert"]).any():
        return "heatmap"
    if places and measured:
        x = min(places, key=list(frame.columns).index)
        groups = [[x], *([x, label] for label in labels)]
        return "lines" if any(not frame.duplicated(group).any() for group in groups) else "dots"
    if labels and values:
        return "bars"
    return "dots" if len(values) > 1 else "histogram"


def _series(frame: pd.DataFrame, kind: str, x: str, y: str, colour: str | None) -> go.Figure:
    """Bars, lines or dots; one series for each value of a column."""
    if not _is_number(frame[y]):
        raise InputError(f"the column {y!r} isn't made of numbers; choose another for y.")
    result = figures.panels([""], height=380, legend=colour is not None)
    axis = _axis(frame[x])
    for name, part in _parts(frame, colour):
        style = figures.style(name) if colour is not None else figures.MAIN
        at = part.index
        points = {
            "x": axis.loc[at].to_numpy(), "y": part[y].to_numpy(float), "name": figures.plain(name),
            "showlegend": colour is not None,
            "hovertemplate": f"{_named(x)} %{{x}}<br>{_named(y)} %{{y}}<extra>{figures.plain(name)}</extra>",
        }  # fmt: skip
        if kind == "bars":
            result.add_bar(**points, marker={"color": style.colour})
        else:
            mode = "markers" if kind == "dots" else "lines+markers" if len(part) <= 48 else "lines"
            line = {"color": style.colour, "dash": style.dash, "width": style.width}
            result.add_scatter(**points, mode=mode, line=line, marker={"size": 6, "color": style.colour})
    if not _is_number(frame[x]) and not pd.api.types.is_datetime64_any_dtype(frame[x]):
        order = [figures.plain(label) for label in _order(frame[x])]
        result.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    result.update_xaxes(title=_named(x))
    result.update_yaxes(title=_named(y))
    result.update_layout(barmode="stack")
    return result


def _heatmap(frame: pd.DataFrame, x: str, y: str, colour: str | None) -> go.Figure:
    if colour is None or not _is_number(frame[colour]):
        raise InputError("a heatmap takes a column of numbers for its colours.")
    if frame.duplicated([x, y]).any():
        raise InputError(f"several rows have the same {x!r} and {y!r}: aggregate them (GROUP BY) to draw a heatmap.")
    rows, columns = _order(frame[y]), _order(frame[x])
    grid = np.full((len(rows), len(columns)), np.nan)
    places = [{label: at for at, label in enumerate(labels)} for labels in (rows, columns)]
    at = [frame[name].map(_label).map(place).to_numpy() for name, place in zip((y, x), places, strict=True)]
    grid[at[0], at[1]] = frame[colour].to_numpy(float)
    result = figures.panels([""], height=max(200, min(900, 24 * len(rows))))
    hover = f"{_named(x)} %{{x}}<br>{_named(y)} %{{y}}<br>{_named(colour)} %{{z}}<extra></extra>"
    labels = [[figures.plain(label) for label in each] for each in (columns, rows)]
    result.add_trace(figures.amounts(grid, labels[0], labels[1], hover=hover))
    figures.amount_scale(result, _named(colour))
    result.update_xaxes(title=_named(x), type="category", showgrid=False)
    result.update_yaxes(title=_named(y), type="category", autorange="reversed", showgrid=False)
    return result


def _histogram(frame: pd.DataFrame, x: str, colour: str | None) -> go.Figure:
    """Counted here, so that the browser gets bars instead of rows."""
    result = figures.panels([""], height=380, legend=colour is not None)
    numeric = _is_number(frame[x])
    known = frame[x].dropna()
    edges = np.histogram_bin_edges(known.to_numpy(float), bins=min(50, max(1, len(known)))) if numeric else None
    order = [] if numeric else _order(frame[x])
    if len(order) > MOST_POINTS:
        raise InputError(f"the column {x!r} has {len(order):,} different values: too many to draw.")
    for name, part in _parts(frame, colour):
        if edges is not None:
            counts, _ = np.histogram(part[x].dropna().to_numpy(float), edges)
            places, widths = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
        else:
            tally = part[x].map(_label).value_counts()
            counts, places, widths = tally.reindex(order).fillna(0).to_numpy(), list(map(figures.plain, order)), None
        style = figures.style(name) if colour is not None else figures.MAIN
        result.add_bar(
            x=places, y=counts, width=widths, name=figures.plain(name), showlegend=colour is not None,
            marker={"color": style.colour}, hovertemplate=f"{_named(x)} %{{x}}<br>%{{y:,}} rows<extra></extra>",
        )  # fmt: skip
    result.update_xaxes(title=_named(x), type=None if numeric else "category")
    result.update_yaxes(title="rows")
    result.update_layout(barmode="stack", bargap=0.05 if numeric else 0.2)
    return result


def _parts(frame: pd.DataFrame, colour: str | None) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each value of a column, by its label, in the order of all figures."""
    if colour is None:
        return [("", frame)]
    labels = frame[colour].map(_label)
    order = _order(frame[colour])
    if len(order) > MOST_COLOURS:
        raise InputError(f"{colour!r} has {len(order):,} different values; at most {MOST_COLOURS} can be told apart.")
    return [(label, frame[labels == label]) for label in order]


def _order(column: pd.Series) -> list[str]:
    """The different values of a column, as text: numbers and dates by size, known labels as in all figures."""
    if _is_number(column) or pd.api.types.is_datetime64_any_dtype(column):
        known = [_label(value) for value in sorted(column.dropna().unique())]
        return [*known, *([_label(None)] if column.isna().any() else [])]
    return figures.ordered(dict.fromkeys(column.map(_label)))


def _axis(column: pd.Series) -> pd.Series:
    """Values for the axis of a chart: numbers and dates as they are, everything else as text."""
    if _is_number(column) or pd.api.types.is_datetime64_any_dtype(column):
        return column
    return column.map(lambda value: figures.plain(_label(value)))


def _label(value: object) -> str:
    missing = value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA or value is pd.NaT
    return "–" if missing else str(value)


def _named(column: str) -> str:
    return figures.plain(str(column).replace("_", " "))


def _is_number(column: pd.Series | Sequence) -> bool:
    kind = getattr(column, "dtype", np.dtype(object))
    return pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)
