"""How much of the work each expert does.

**Share** of an expert in a layer: its part of all assignments (a token that uses k experts makes k assignments; a
dropped token makes none). The shares of a layer sum to 1; an evenly loaded layer has 1/E everywhere.
**Load** is share · E: 1 is an even share, 2 is twice that.
The interval covers 95% of bootstrap resamples of texts.

Source: the fractions f of the balance loss (Fedus, Zoph & Shazeer 2022, section 2.2); the interval is ours.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import count, shares, sizes, sort_into_cells, sum_by
from workbench.analysis.resampling import bootstrap_sums, text_interval
from workbench.tracefile import Trace

MOST_LAYERS = 6
"""Layers that the figure shows where there are groups."""
FEW_ROWS = 24
"""More rows of layers and groups than this are drawn lower."""


def load(trace: Trace, by: str | None = None, *, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Share of assignments of each expert, by group if asked for.

    by           column of the sequences, `phase` or `position`; None puts all tokens into the group "all"
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row a group × layer × expert:
    group, layer, expert; share in [0, 1] with low, high; load = share · E; count (assignments); n_experts; n_tokens,
    n_sequences, n_texts of the group; n_unlabelled sequences left out because they have no label. The share is NaN in
    a layer where the group has no assignment, the interval is NaN where there is only one text.
    """
    cells = sort_into_cells(trace, by)
    n_groups = len(cells.labels)
    tables = []
    for layer in range(trace.n_layers):
        rows = count(trace, layer, cells)
        counts = sum_by(rows, cells.group, n_groups)
        resampled = bootstrap_sums(rows, cells.text, cells.group, n_groups, n_resamples, seed)
        low, high = text_interval(shares(resampled), cells.n_texts)
        n_experts = rows.shape[1]
        share = shares(counts)
        tables.append(
            pd.DataFrame(
                {
                    "group": np.repeat(cells.labels, n_experts),
                    "layer": layer,
                    "expert": np.tile(np.arange(n_experts), n_groups),
                    "share": share.ravel(),
                    "low": low.ravel(),
                    "high": high.ravel(),
                    "load": share.ravel() * n_experts,
                    "count": counts.ravel().astype(np.int64),
                    "n_experts": n_experts,
                    **sizes(cells, n_experts),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def figure(frame: pd.DataFrame) -> Figure:
    """A row a layer (and group), a column a rank of load; the colour is the load, on a logarithmic scale.

    Of groups only some layers are shown, in lower rows.
    """
    grouped = frame["group"].nunique() > 1
    if grouped:
        frame = frame[frame["layer"].isin(figures.spread(frame["layer"], MOST_LAYERS))]
    rows, names = [], []
    for (group, layer), part in frame.groupby(["group", "layer"], sort=False):
        rows.append(part.sort_values("share", ascending=False, ignore_index=True))
        names.append(f"{figures.plain(group)} · layer {layer}" if grouped else f"layer {layer}")
    width = max(len(row) for row in rows)

    def grid(column: str) -> np.ndarray:
        padded = [np.pad(row[column].to_numpy(float), (0, width - len(row)), constant_values=np.nan) for row in rows]
        return np.array(padded)

    result = figures.panels([""], height=(8 if grouped and len(rows) > FEW_ROWS else 26) * max(len(rows), 6))
    result.add_trace(
        figures.ratios(
            grid("load"),
            x=list(range(1, width + 1)),
            y=names,
            hover="%{y}<br>expert %{customdata[0]:.0f}<br>share %{customdata[1]:.2%} "
            "[%{customdata[2]:.2%}, %{customdata[3]:.2%}]<br>%{customdata[4]:.2f} × an even share<extra></extra>",
            details=np.stack([grid(name) for name in ("expert", "share", "low", "high", "load")], axis=-1),
        )
    )
    figures.ratio_scale(result, "× even")
    result.update_xaxes(title="experts of each layer, busiest first", showgrid=False)
    result.update_yaxes(autorange="reversed", showgrid=False)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The busiest expert, in a sentence."""
    if not frame["share"].notna().any():
        return ["No token used any expert."]
    busiest = frame.iloc[frame["share"].argmax()]
    whose = "" if frame["group"].nunique() == 1 else f" on {busiest['group']}"
    return [
        f"The busiest expert is number {busiest['expert']} of layer {busiest['layer']}: it takes {busiest['share']:.1%}"
        f" of the layer's assignments{whose}, {busiest['load']:.1f} times an even share."
    ]
