"""A map of texts by routing: sequences that are routed alike are near each other.

Square roots of the features (Hellinger's distance, as in `workbench_probes.clusters`) of all chosen layers, reduced to
at most 50 principal components, then t-SNE (van der Maaten & Hinton 2008), or UMAP (McInnes, Healy & Melville 2018)
where the package umap-learn is installed. Only neighbourhoods mean anything on such a map: neither the distances
between groups nor their sizes do.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from workbench import figures
from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes.clusters import dense, labelled, rooted, without_hidden
from workbench_probes.features import check
from workbench_probes.task import check_seed, matrices

METHODS = ("tsne", "umap")
COMPONENTS = 50
PERPLEXITY = 30
FEWEST = 4
"""Fewer sequences than this have no neighbourhoods."""
SYMBOLS: dict[str, str] = dict(
    zip(figures.DASHES, ("circle", "square", "diamond", "cross", "triangle-up"), strict=True)
)
"""Marker of a style, in the place of its dash."""


def sequence_map(
    trace: Trace,
    by: str = "lang",
    *,
    features: str = "choices",
    layers: Sequence[int] | None = None,
    method: str = "tsne",
    max_rows: int | None = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Place the sequences that have a label on a map.

    by        a column of the sequences, for the colours; it has no part in the places
    features  choices, weights, probabilities or tokens
    method    "tsne" or "umap"
    max_rows  so many labelled sequences, drawn at random; None: all

    Returns one row a sequence: seq, x, y, by, label, lang, domain, source, n_tokens, features, method. The same seed
    gives the same map on the same machine. InputError for fewer than 4 sequences, if all are alike, or without UMAP.
    """
    check_seed(seed)
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if method == "umap" and find_spec("umap") is None:
        raise InputError("method umap takes the package umap-learn: pip install umap-learn, or use tsne.")
    found = labelled(trace, by, max_rows, seed)
    if len(found.row) < FEWEST:
        raise InputError(f"{len(found.row)} sequences have a {by!r}; a map takes at least {FEWEST}.")
    without_hidden([features])
    check(trace, [features], layers, "sequence")
    *_, (_, _, matrix) = matrices(trace, found, [features], layers)
    points = dense(rooted(matrix)).astype(np.float64)
    if np.allclose(points, points[0]):
        raise InputError("all sequences are routed alike; there is nothing to map.")
    points = PCA(min(COMPONENTS, *points.shape), random_state=seed).fit_transform(points)
    if method == "tsne":
        perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
        start = points[:, :2] if points.shape[1] > 1 else np.column_stack([points[:, 0], np.zeros(len(points))])
        start = start / start[:, 0].std() * 1e-4  # scikit-learn's own start, also where there is one component
        places = TSNE(init=start, perplexity=perplexity, random_state=seed).fit_transform(points)
    else:
        places = import_module("umap").UMAP(random_state=seed).fit_transform(points)
    sequences = trace.sequences().iloc[found.row].reset_index(drop=True)
    return pd.DataFrame(
        {
            "seq": sequences["seq"],
            "x": places[:, 0],
            "y": places[:, 1],
            "by": by,
            "label": np.array(found.labels, object)[found.value],
            **{name: sequences[name] for name in ("lang", "domain", "source", "n_tokens")},
            "features": features,
            "method": method,
        }
    )


def figure(frame: pd.DataFrame) -> Figure:
    """A dot a sequence, coloured by label."""
    result = figures.panels([""], height=560, legend=True)
    for label in figures.ordered(frame["label"].unique()):
        part = frame[frame["label"] == label]
        style = figures.style(label)
        facts = part[["seq", "lang", "domain", "source"]].astype(str).map(figures.plain).to_numpy()
        result.add_scatter(
            x=part["x"], y=part["y"], mode="markers", name=figures.plain(label), customdata=facts,
            marker={"size": 5, "color": figures.faded(style.colour, 0.75), "symbol": SYMBOLS[style.dash]},
            hovertemplate="%{fullData.name}<br>sequence %{customdata[0]}: %{customdata[1]}, %{customdata[2]}, "
            "%{customdata[3]}<extra></extra>",
        )  # fmt: skip
    result.update_xaxes(showticklabels=False, ticks="", showgrid=False, title=None)
    result.update_yaxes(showticklabels=False, ticks="", showgrid=False, title=None)
    result.update_layout(legend={"orientation": "v", "x": 1.02, "yref": "paper", "y": 1, "font": {"size": 11}})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How many sequences of how many labels the map shows, in a sentence."""
    noun = figures.noun(frame["by"].iloc[0])
    return [
        f"{len(frame)} sequences of {frame['label'].nunique()} values of {noun}, placed by "
        f"{frame['features'].iloc[0]} alone; only neighbourhoods mean anything."
    ]
