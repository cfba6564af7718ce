"""One token on its way through the layers: which experts it chose, how much each weighed, how sure the routers were."""

import numpy as np
from plotly.graph_objects import Figure

from workbench import figures
from workbench.errors import InputError
from workbench.reading import Reading, routing

LARGEST = 22
"""Diameter of the marker of the heaviest choice, in pixels."""


def token_figure(text: Reading, at: int) -> Figure:
    """Left: the chosen experts by layer, the larger the heavier, the first of each layer joined by a line.

    Right, where it was recorded: the router's entropy at this token, and the median of the text with its quartiles.
    Raises InputError for a token that the text doesn't have.
    """
    if not 0 <= at < len(text):
        raise InputError(f"token {at}: the text has tokens 0 to {len(text) - 1}.")
    chosen = routing(text, at)
    sure = text.entropy is not None and bool(np.isfinite(text.entropy[:, at]).any())
    titles = ["experts chosen (size: weight)" if text.weights is not None else "experts chosen"]
    result = figures.panels([*titles, *(["entropy of the router"] if sure else [])], columns=2, height=320, legend=True)
    weights = chosen["weight"].to_numpy() if "weight" in chosen else np.ones(len(chosen))
    heaviest = float(weights.max()) if len(weights) and weights.max() > 0 else 1.0
    first = chosen[chosen["rank"] == chosen.groupby("layer")["rank"].transform("min")]
    result.add_scatter(
        x=first["layer"], y=first["expert"], mode="lines", line={"color": figures.faded(figures.MAIN.colour, 0.5)},
        name="first choice", hoverinfo="skip",
    )  # fmt: skip
    for rank, part in chosen.groupby("rank"):
        style = figures.COLOURS[int(rank) % len(figures.COLOURS)]  # type: ignore[arg-type]
        heavy = weights[part.index.to_numpy()]
        result.add_scatter(
            x=part["layer"], y=part["expert"], mode="markers", name=f"rank {rank}", customdata=heavy,
            marker={"size": np.maximum(LARGEST * np.sqrt(heavy / heaviest), 5), "color": style, "opacity": 0.85,
                    "line": {"width": 0}},
            hovertemplate=f"layer %{{x}}, rank {rank}: expert %{{y}}"
            + (", weight %{customdata:.3f}" if text.weights is not None else "") + "<extra></extra>",
        )  # fmt: skip
    result.update_layout(legend={"itemsizing": "constant"})
    if sure and text.entropy is not None:
        layers = np.arange(text.n_layers)
        known = np.isfinite(text.entropy).any(axis=1)
        low, middle, high = np.full((3, text.n_layers), np.nan)
        low[known], middle[known], high[known] = np.nanquantile(text.entropy[known], [0.25, 0.5, 0.75], axis=1)
        figures.line(result, layers, middle, low, high, name="median of the text", style=figures.NULL, panel=1)
        figures.line(result, layers, text.entropy[:, at], name="this token", panel=1)
        result.update_layout({"yaxis2": {"title": "nats"}})
    figures.layer_axes(result, range(text.n_layers))
    result.update_layout({"yaxis": {"title": "expert"}})
    return result
