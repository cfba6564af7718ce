"""The experts of all layers on one grid, a row a layer, a column an expert: by any number that an expert has.

    frame = expert_values(trace, by="lang")
    grid_figure(values(frame, "lift", "de"), METRICS["lift"].unit, METRICS["lift"].kind)

`values` brings the tables of `expert_values`, `importance` and `vocabulary` to one form: layer, expert, value, low,
high, count, n_experts.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.errors import InputError

EVERYTHING = "all"
SIGNIFICANT = 0.05
ROW = 22
"""Height of a layer, in pixels; less where there are many."""
GAPS = 130
"""More experts a layer than this leave no room for lines between them."""


class Metric(NamedTuple):
    """A number that an expert has.

    kind      "ratio": 1 is as expected, the scale is logarithmic; "amount": from little to much
    analysis  whose table holds it
    grouped   whether it is about one group of tokens
    needs     what must have been recorded
    """

    title: str
    unit: str
    kind: str
    analysis: str
    meaning: str
    grouped: bool = False
    needs: tuple[str, ...] = ()


METRICS = {
    "load": Metric("Load", "× even", "ratio", "expert_values", "Share of the layer's assignments × number of experts."),
    "mean_weight": Metric(
        "Mean gate weight", "gate weight", "amount", "expert_values",
        "Mean gate weight over the tokens that chose the expert.", needs=("weights",),
    ),
    "lift": Metric(
        "Lift for a group", "× all groups", "ratio", "expert_values",
        "The expert's share of the group's assignments, against its share in all groups together.", grouped=True,
    ),
    "divergence": Metric(
        "Divergence", "nats", "amount", "expert_values",
        "How unlike all tokens the expert's tokens are in their labels, however busy it is.",
    ),
    "information": Metric(
        "Information", "nats", "amount", "expert_values",
        "What the expert contributes to the mutual information of expert choice and label.",
    ),
    "favourites": Metric(
        "Favourite of token ids", "token ids", "amount", "vocabulary",
        "Token ids whose first choices go to this expert most often, more than chance explains (q < 5%).",
    ),
    "strength": Metric(
        "Strength of its token ids", "share of the id's tokens", "amount", "vocabulary",
        "Over the token ids whose favourite it is: the mean part of their first choices that go to it.",
    ),
    "weighted_frequency": Metric(
        "Weighted frequency", "share of gate weight", "amount", "importance",
        "Its part of all the layer's gate weights.", needs=("weights",),
    ),
    "output_norm": Metric(
        "Output norm", "norm", "amount", "importance", "Mean norm of its output, before weighting.", needs=("norms",)
    ),
    "weighted_norm": Metric(
        "Weighted norm", "norm", "amount", "importance",
        "What it adds to the residual stream of a token, on average over all tokens.", needs=("weights", "norms"),
    ),
    "reap": Metric(
        "REAP", "norm", "amount", "importance", "Mean gate weight × output norm where it was chosen.",
        needs=("weights", "norms"),
    ),
    "easy_ep": Metric(
        "EASY-EP", "score", "amount", "importance", "Weighted norm × how far the layer turns the residual stream.",
        needs=("weights", "norms", "shift"),
    ),
}  # fmt: skip
"""What the grid can show; definitions in full are those of the analyses."""


def possible(recorded: frozenset[str] | set[str], *, labels: bool = True, ids: bool = True) -> list[str]:
    """The metrics that a run allows; labels, ids: whether its tokens have groups to compare, and known ids."""
    about_labels = ("lift", "divergence", "information")
    return [
        name
        for name, metric in METRICS.items()
        if recorded >= set(metric.needs)
        and (labels or name not in about_labels)
        and (ids or metric.analysis != "vocabulary")
    ]


def values(frame: pd.DataFrame, metric: str, group: str = EVERYTHING) -> pd.DataFrame:
    """One number of every expert.

    frame   of the analysis that METRICS names for the metric: expert_values, importance or vocabulary
    group   which of its groups

    Returns one row a layer × expert: layer, expert, value, low, high (NaN: not known), count, n_experts. count is what
    the value rests on: assignments, or for the metrics of token ids their number. InputError for a metric or group that
    isn't there.
    """
    if metric not in METRICS:
        raise InputError(f"metric is {metric!r}; expected one of {', '.join(METRICS)}.")
    if METRICS[metric].analysis == "vocabulary":
        return _of_vocabulary(frame, metric)
    if metric not in frame:
        needs = " and ".join(METRICS[metric].needs)
        raise InputError(f"{metric} needs {needs}, which were not recorded: trace again with --record.")
    part = frame[frame["group"] == group]
    if part.empty:
        raise InputError(f"there is no group {group!r}; there are {', '.join(map(str, frame['group'].unique()[:30]))}.")
    ends = {end: part[f"{metric}_{end}"] for end in ("low", "high")}
    columns = ["layer", "expert", "value", "low", "high", "count", "n_experts"]
    return part.assign(value=part[metric], **ends)[columns].reset_index(drop=True)


def _of_vocabulary(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Ids by their favourite expert, from the table of `vocabulary`; experts without any have 0 of them."""
    sizes = frame.groupby("layer")["n_experts"].first()
    every = pd.MultiIndex.from_tuples(
        [(layer, expert) for layer, n in sizes.items() for expert in range(n)], names=["layer", "expert"]
    )
    sure = frame[frame["q"] < SIGNIFICANT]
    by_expert = sure.groupby(["layer", "expert"])["value"]
    count = by_expert.size().reindex(every, fill_value=0)
    value = count.astype(float) if metric == "favourites" else by_expert.mean().reindex(every)
    result = pd.DataFrame({"value": value, "low": np.nan, "high": np.nan, "count": count}).reset_index()
    return result.assign(n_experts=result["layer"].map(sizes))


def grid(frame: pd.DataFrame, column: str = "value", *, by_value: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A column of `values` as a grid, and the expert in each place: float64 and int64 (n_layers, most experts).

    by_value  put the experts of each layer in order of `value`, largest first; else in the order of their numbers.
    Layers with fewer experts are filled up with NaN and -1.
    """
    width = int(frame["n_experts"].max()) if len(frame) else 0
    layers, row = np.unique(frame["layer"].to_numpy(), return_inverse=True)
    first = -np.nan_to_num(frame["value"].to_numpy(float), nan=-np.inf) if by_value else np.zeros(len(frame))
    order = np.lexsort((frame["expert"].to_numpy(), first, row))
    row = row[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    shown, experts = np.full((len(layers), width), np.nan), np.full((len(layers), width), -1)
    shown[row, place] = frame[column].to_numpy(float)[order]
    experts[row, place] = frame["expert"].to_numpy()[order]
    return shown, experts


def scaled(shown: np.ndarray, kind: str, *, each_layer: bool = False) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Places of a grid of values on the colour scale, 0 to 1 (NaN where there is no value), and its ticks as pairs of
    place and text.

    Ratios are logarithmic, from 1/8 to 8. Amounts go from their smallest to their largest value, both without the
    outermost 0.5%, so that one giant doesn't leave all others pale; each_layer: of each layer for itself.
    """
    if kind == "ratio":
        with np.errstate(divide="ignore"):
            places = (np.clip(np.log2(shown), -figures.REACH, figures.REACH) / figures.REACH + 1) / 2
        steps = range(-figures.REACH, figures.REACH + 1)
        names = [f"{2**step}×" if step >= 0 else f"1/{2**-step}×" for step in steps]
        names[0], names[-1] = f"≤ {names[0]}", f"≥ {names[-1]}"
        return places, [((step / figures.REACH + 1) / 2, name) for step, name in zip(steps, names, strict=True)]
    places = np.full(shown.shape, np.nan)
    rows = [[row] for row in range(len(shown))] if each_layer else [list(range(len(shown)))]
    low = high = np.nan
    for row in rows:
        known = shown[row][np.isfinite(shown[row])]
        if len(known):
            low, high = np.percentile(known, [0.5, 99.5]) if len(known) > 200 else (known.min(), known.max())
            places[row] = np.clip((shown[row] - low) / (high - low), 0, 1) if high > low else shown[row] * 0 + 0.5
    if each_layer or not np.isfinite(low):
        return places, [(0.0, "least of the layer"), (1.0, "most of the layer")]
    if not high > low:
        return places, [(0.5, f"{low:.3g}")]
    return places, [(at, f"{low + at * (high - low):.3g}") for at in (0, 0.25, 0.5, 0.75, 1)]


def grid_figure(
    frame: pd.DataFrame,
    unit: str,
    kind: str = "ratio",
    *,
    by_value: bool = False,
    each_layer: bool = False,
    chosen: tuple[int, int] | None = None,
) -> Figure:
    """The grid as a heatmap: layers as rows, experts as columns, one colour scale.

    frame   as `values` returns
    unit    of the value, beside the colour scale
    chosen  (layer, expert) that gets a frame
    """
    shown, experts = grid(frame, by_value=by_value)
    places, ticks = scaled(shown, kind, each_layer=each_layer)
    layers = np.sort(frame["layer"].unique())
    names = [f"layer {layer}" for layer in layers]
    details = np.stack(
        [experts, shown, *(grid(frame, name, by_value=by_value)[0] for name in ("low", "high", "count"))], axis=-1
    )
    n_rows, n_columns = shown.shape
    result = figures.panels([""], height=max(120, min(ROW, 1200 // max(n_rows, 1)) * n_rows))
    heatmap = figures.amounts(
        places, x=list(range(n_columns)), y=names, details=details,
        hover=f"%{{y}} · expert %{{customdata[0]:.0f}}<br>%{{customdata[1]:.4g}} {unit} "
        "[%{customdata[2]:.4g}, %{customdata[3]:.4g}]<br>%{customdata[4]:,.0f} counted<extra></extra>",
    )  # fmt: skip
    gap = 0 if n_columns > GAPS else 0.5
    result.add_trace(heatmap.update(xgap=gap, ygap=gap))
    figures.amount_scale(result, unit, 0.0, 1.0)
    result.update_layout(
        coloraxis={
            "colorscale": figures.DIVERGING if kind == "ratio" else figures.SEQUENTIAL,
            "colorbar": {"tickvals": [at for at, _ in ticks], "ticktext": [text for _, text in ticks]},
        }
    )
    if chosen is not None and chosen[0] in layers:
        row = int(np.searchsorted(layers, chosen[0]))
        found = np.flatnonzero(experts[row] == chosen[1])
        for column in found:
            result.add_shape(
                type="rect", x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
                line={"color": figures.INK, "width": 2},
            )  # fmt: skip
    title = f"experts of each layer, largest {unit} first" if by_value else "expert"
    result.update_xaxes(title=title, showgrid=False, showticklabels=not by_value)
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="")
    return result
