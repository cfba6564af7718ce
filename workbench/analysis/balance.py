"""How evenly each layer loads its experts.

Over the shares p of a layer's E experts (see load):

- **normalised entropy** H(p)/log E: 1 is perfectly even, 0 is one expert doing everything.
- **coefficient of variation**: standard deviation of the shares over their mean, 0 is even.
- **Gini**: mean absolute difference of two shares over twice the mean, 0 is even, 1 − 1/E is one expert.
- **MaxVio**: largest share over the mean share, minus 1 (Wang et al. 2024, auxiliary-loss-free balancing).
- **dead experts**: experts whose share is below a tenth of an even one (the threshold is an option).

The interval covers 95% of bootstrap resamples of texts, shifted by the resampling bias: resampling makes any load look
less even than it is.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import count, entropy, shares, sizes, sort_into_cells, sum_by
from workbench.analysis.group_heatmap import group_heatmap
from workbench.analysis.resampling import bootstrap_sums, text_interval
from workbench.tracefile import Trace

MEASURES = {
    "normalised_entropy": "normalised entropy",
    "coefficient_of_variation": "coefficient of variation",
    "gini": "Gini",
    "max_violation": "MaxVio",
    "dead_experts": "dead experts",
}


def balance(
    trace: Trace, by: str | None = None, *, dead_below: float = 0.1, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Balance of each layer, by group if asked for.

    by           column of the sequences, `phase` or `position`; None puts all tokens into the group "all"
    dead_below   an expert is dead when its share is below this many even shares

    Returns one row a group × layer × measure: group, layer, measure, value with low, high; n_experts; n_tokens,
    n_sequences, n_texts, n_unlabelled as in `load`. With one expert the normalised entropy is NaN, the others 0.
    """
    cells = sort_into_cells(trace, by)
    n_groups = len(cells.labels)
    tables = []
    for layer in range(trace.n_layers):
        rows = count(trace, layer, cells)
        values = measure(sum_by(rows, cells.group, n_groups), dead_below)
        resampled = measure(bootstrap_sums(rows, cells.text, cells.group, n_groups, n_resamples, seed), dead_below)
        for name, value in values.items():
            low, high = text_interval(resampled[name], cells.n_texts, value)
            tables.append(
                pd.DataFrame(
                    {
                        "group": cells.labels,
                        "layer": layer,
                        "measure": name,
                        "value": value,
                        "low": np.maximum(low, 0),
                        "high": np.minimum(high, 1) if name == "normalised_entropy" else high,
                        "n_experts": rows.shape[1],
                        **sizes(cells),
                    }
                )
            )
    return pd.concat(tables, ignore_index=True)


def measure(counts: np.ndarray, dead_below: float) -> dict[str, np.ndarray]:
    """The measures over the last axis of counts; NaN where there is no assignment."""
    n_experts = counts.shape[-1]
    share = shares(counts)
    ascending = np.sort(share, axis=-1)
    position = 2 * np.arange(1, n_experts + 1) - n_experts - 1
    empty = np.isnan(share[..., 0])
    dead = (share < dead_below / n_experts).sum(axis=-1).astype(float)
    return {
        "normalised_entropy": entropy(counts) / (np.log(n_experts) if n_experts > 1 else np.nan),
        "coefficient_of_variation": share.std(axis=-1) * n_experts,
        "gini": ascending @ position / n_experts,
        "max_violation": ascending[..., -1] * n_experts - 1,
        "dead_experts": np.where(empty, np.nan, dead),
    }


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a measure: its value by layer with the interval, a line a group.

    Many groups become rows of a heatmap of the first measure, least even on top.
    """
    shown = [name for name in MEASURES if name in set(frame["measure"])]
    groups = figures.ordered(frame["group"].unique())
    if len(groups) > figures.MOST_LINES:
        return group_heatmap(frame[frame["measure"] == shown[0]], MEASURES[shown[0]], ascending=True)
    result = figures.panels([MEASURES[name] for name in shown], columns=len(shown), height=190, legend=len(groups) > 1)
    for place, name in enumerate(shown):
        for group in groups:
            part = frame[(frame["measure"] == name) & (frame["group"] == group)]
            style = figures.style(group) if len(groups) > 1 else figures.MAIN
            figures.line(
                result, part["layer"], part["value"], part["low"], part["high"], name=group, style=style, panel=place,
                band=len(groups) <= figures.MOST_BANDS, legend=place == 0 and len(groups) > 1,
            )  # fmt: skip
    figures.layer_axes(result, frame["layer"])
    result.update_yaxes(rangemode="tozero")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The least even layer and the dead experts, in sentences."""
    whole = frame.groupby(["measure", "layer"], sort=False)["value"].mean()
    sentences = []
    if "normalised_entropy" in whole and whole["normalised_entropy"].notna().any():
        even = whole["normalised_entropy"]
        sentences.append(
            f"Load is least even in layer {even.idxmin()} (normalised entropy {even.min():.2f}) and most even in layer "
            f"{even.idxmax()} ({even.max():.2f}; 1 is perfectly even)."
        )
    if "dead_experts" in whole and frame["group"].nunique() == 1:
        dead = whole["dead_experts"]
        total = frame.drop_duplicates("layer")["n_experts"].sum()
        where = f", most in layer {dead.idxmax()} ({dead.max():.0f})"
        none = f"None of the {total} experts is dead."
        sentences.append(
            f"{dead.sum():.0f} of {total} experts are dead, nearly never chosen{where}." if dead.sum() else none
        )
    return sentences
