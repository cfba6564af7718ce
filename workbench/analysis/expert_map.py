"""Where the experts of a layer lie in the space of their weights: the two directions in which they differ most.

The flattened matrices of the E experts of a layer (gate, up, down, or all of them) are E points. Principal component
analysis puts them on a plane: **x** and **y** are their coordinates on the first two components, around their mean, in
units of the weights' own Euclidean distance. **x share** and **y share** are the parts of all variance on the two.
Experts without structure differ in every direction alike, and each component has about **even share** = 1/(E − 1) of
the variance; a share far above it is a direction in which some experts stand apart. The signs of the axes mean nothing;
they are such that the largest coordinate is positive.

Lo et al. 2025, A Closer Look into Mixture-of-Experts in Large Language Models, arXiv:2406.18219, §4.1 (their code
offers to standardise every weight first; it isn't done here). Neurons are compared as they are, as in `similarity`: the
map of experts whose neurons are in unlike orders shows that, too.
"""

from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.similarity import chosen_layers, loaded
from workbench.errors import InputError

MOST_PANELS = 12
"""Layers that the figure shows when there are more: evenly spread."""


def expert_map(model: Any, *, layers: tuple[int, ...] | None = None) -> pd.DataFrame:
    """Coordinates of every expert on the first two principal components of its layer.

    model   what `workbench.load` returns, or a name for it
    layers  which routers; None: all

    Returns one row a layer × matrix × expert: layer, matrix (gate, up, down, all), expert; x, y; norm (Euclidean, of
    the flattened matrix); x_share, y_share in [0, 1]; even_share; n_experts. Shares are NaN where all experts are
    equal; y is 0 where there are fewer than three experts, and both are 0 for a single one.

    InputError if no layer has experts whose weights can be read.
    """
    from workbench.experts import grams, read

    tables = []
    for layer in chosen_layers(model, layers):
        weights = read(layer)
        for name, inner in grams(weights).items():
            places, shares = principal(inner)
            tables.append(
                pd.DataFrame(
                    {
                        "layer": layer.index,
                        "matrix": name,
                        "expert": np.arange(weights.n_experts),
                        "x": places[:, 0],
                        "y": places[:, 1],
                        "norm": np.sqrt(np.diag(inner)),
                        "x_share": shares[0],
                        "y_share": shares[1],
                        "even_share": 1 / (weights.n_experts - 1) if weights.n_experts > 1 else np.nan,
                        "n_experts": weights.n_experts,
                    }
                )
            )
    if not tables:
        raise InputError(f"no layer of {loaded(model).name} was asked for; leave `layers` out for all.")
    return pd.concat(tables, ignore_index=True)


def principal(inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two principal coordinates of points from their inner products: float64 (n, 2), and their shares of variance.

    The points may have millions of dimensions; n × n is enough.
    """
    n = len(inner)
    away = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(away @ inner @ away)
    places, shares = np.zeros((n, 2)), np.full(2, np.nan)
    total = values.clip(0).sum()
    if total > 1e-12 * max(1.0, np.trace(inner)):
        shares = np.zeros(2)
        for axis in range(min(2, n - 1)):
            value, vector = max(values[-1 - axis], 0), vectors[:, -1 - axis]
            places[:, axis] = vector * np.sqrt(value) * np.sign(vector[np.abs(vector).argmax()])
            shares[axis] = value / total
    return places, shares


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a layer, a dot an expert, by all its matrices; the number of an expert is in the hover text."""
    whole = frame[frame["matrix"] == "all"]
    shown = figures.spread(whole["layer"], MOST_PANELS)
    parts = [whole[whole["layer"] == layer] for layer in shown]
    titles = [
        f"layer {layer} · {part['x_share'].iloc[0] + part['y_share'].iloc[0]:.0%} of variance"
        if np.isfinite(part["x_share"].iloc[0])
        else f"layer {layer} · all alike"
        for layer, part in zip(shown, parts, strict=True)
    ]
    result = figures.panels(titles, columns=3, height=260)
    for panel, part in enumerate(parts):
        named = set(part.loc[(part["x"] ** 2 + part["y"] ** 2).nlargest(4).index, "expert"])
        result.add_scatter(
            x=part["x"], y=part["y"], mode="markers+text", **figures.axes(panel), showlegend=False,
            text=[str(expert) if expert in named else "" for expert in part["expert"]], textposition="top center",
            textfont={"size": 10, "color": figures.MUTED}, cliponaxis=False,
            marker={"size": 8, "color": figures.faded(figures.MAIN.colour, 0.7)},
            customdata=np.column_stack([part["expert"], part["norm"]]),
            hovertemplate="expert %{customdata[0]:.0f}<br>(%{x:.2f}, %{y:.2f}), norm %{customdata[1]:.2f}"
            "<extra></extra>",
        )  # fmt: skip
    result.update_xaxes(zeroline=True)
    result.update_yaxes(zeroline=True)
    for panel in range(len(parts)):
        if panel >= len(parts) - 3:  # nothing below it
            result.update_layout({figures.axes(panel)["xaxis"].replace("x", "xaxis"): {"title": "first component"}})
    result.update_layout(yaxis={"title": "second component"})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Whether experts differ in a few directions or in all alike, in a sentence."""
    whole = frame[frame["matrix"] == "all"].drop_duplicates("layer")
    known = whole[whole["x_share"].notna()]
    if known.empty:
        return ["The experts of every layer are equal, so there is nothing to map."]
    ratio = known["x_share"] / known["even_share"]
    top = known.iloc[int(np.argmax(ratio.to_numpy()))]
    return [
        f"The first component holds {known['x_share'].mean():.1%} of the variance between experts on average, "
        f"{ratio.mean():.1f} times an even share; most in layer {top['layer']}: {top['x_share']:.1%}, "
        f"{ratio.max():.1f} times."
    ]
