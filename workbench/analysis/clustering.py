"""Groups in an order that puts like beside like, and the matrix of their distances drawn in it.

Average linkage (UPGMA), leaves turned so that neighbours are as close as possible (optimal leaf ordering), by scipy.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform

from workbench import figures

TREE = 90
"""Height of the tree below the matrix, in pixels."""
LONGEST = 24
"""Characters of a label that is shown whole."""


def matrix(frame: pd.DataFrame, first: str, second: str, value: str) -> tuple[list[str], np.ndarray]:
    """Labels, and the values of the pairs of `frame` as a symmetric matrix; NaN on the diagonal and where unknown."""
    labels = figures.ordered({*frame[first], *frame[second]})
    place = {label: at for at, label in enumerate(labels)}
    values = np.full((len(labels), len(labels)), np.nan)
    rows, columns = frame[first].map(place).to_numpy(int), frame[second].map(place).to_numpy(int)
    values[rows, columns] = values[columns, rows] = frame[value].to_numpy(float)
    return labels, values


def tree(distance: np.ndarray) -> np.ndarray | None:
    """scipy's linkage of a symmetric matrix of distances (what is unknown counts as far); None for a single group."""
    if len(distance) < 2:
        return None
    known = np.isfinite(distance)
    filled = np.where(known, distance, distance[known].max() if known.any() else 1.0)
    np.fill_diagonal(filled, 0)
    return linkage(squareform(np.maximum(filled, 0), checks=False), "average", optimal_ordering=True)


def draw(
    labels: list[str],
    distance: np.ndarray,
    shown: np.ndarray,
    details: np.ndarray,
    *,
    title: str,
    hover: str,
    least: float | None = None,
    most: float | None = None,
) -> Figure:
    """The matrix `shown` with rows and columns in the order of the tree of `distance`, the tree below.

    details (n, n, any number) goes to the hover text, which may name %{y} and %{x}; least, most: ends of the colours.
    """
    found = tree(distance)
    plan = dendrogram(found, no_plot=True) if found is not None else {"leaves": [0], "icoord": [], "dcoord": []}
    order = np.array(plan["leaves"])
    names = [short(labels[at], order[:place].tolist(), labels) for place, at in enumerate(order)]
    upright = len(names) > 12 or max(map(len, names)) > 8
    inner, room = max(260, 17 * len(names)), 8 * max(map(len, names)) + 16 if upright else 36
    plot = inner + room + TREE
    result = figures.panels(["", ""], height=inner, tight=True)
    result.add_trace(
        figures.amounts(
            shown[np.ix_(order, order)], names, names, hover=hover, details=details[np.ix_(order, order)], panel=0
        )
    )
    result.update_layout(height=plot + 64, margin={"t": 24, "b": 40, "r": 130})
    figures.amount_scale(result, title, least, most)
    for across, up in zip(plan["icoord"], plan["dcoord"], strict=True):
        result.add_scatter(
            x=(np.array(across) - 5) / 10, y=up, mode="lines", line={"color": figures.MUTED, "width": 1},
            hoverinfo="skip", showlegend=False, **figures.axes(1),
        )  # fmt: skip
    result.update_xaxes(showgrid=False, ticks="", tickmode="linear", dtick=1)
    result.update_yaxes(showgrid=False, ticks="")
    result.update_layout(
        xaxis={"anchor": "y", "tickangle": -90 if upright else 0},
        yaxis={"domain": [1 - inner / plot, 1], "autorange": "reversed", "tickmode": "linear", "dtick": 1},
        xaxis2={"anchor": "y2", "range": [-0.5, len(names) - 0.5], "showticklabels": False, "showline": False},
        yaxis2={"domain": [0, TREE / plot], "title": {"text": title}, "autorange": "reversed", "nticks": 4},
    )
    return result


def short(label: str, before: list[int], labels: list[str]) -> str:
    """A label that fits, escaped, and unlike those `before` it, which a heatmap would take for the same row."""
    text = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"
    taken = sum(labels[at][: LONGEST - 1] == label[: LONGEST - 1] for at in before) if len(label) > LONGEST else 0
    return figures.plain(text) + "\u200b" * taken
