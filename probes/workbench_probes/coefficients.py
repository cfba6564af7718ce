"""Which experts speak for a label: the coefficients of a probe, layer by expert.

One linear probe reads all chosen layers side by side. Its coefficient of an expert is

- of a **token's choices**: what choosing the expert adds to the log-odds of the label (two classes), or to log p of the
  label less the mean of log p over all classes (more), classes balanced and all other choices being equal;
- of anything else: what one standard deviation more of the feature adds to it;
- where **numbers** are predicted: what either adds to the number.

A token has k choices in a layer, so the coefficients of a layer only mean something relative to each other: the penalty
keeps their mean near 0. Experts that are chosen together share their effect. A large coefficient says that the expert
helps to tell the label, not that it does something about it: for that, ablate it (`workbench find`, `evaluate`).

The interval is that of the mean over folds, as in `probe`.
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import experts_of
from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes.estimators import fold_interval
from workbench_probes.features import beside, check, of_layer
from workbench_probes.task import Options, prepare

OF_EXPERTS = ("choices", "weights", "probabilities")
NUMBER = "value"
"""Label of the one probe where numbers are predicted."""
MOST_PANELS = 6


def coefficients(
    trace: Trace,
    target: str,
    *,
    features: str = "choices",
    layers: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Coefficients of a probe of all chosen layers together.

    features  choices, weights or probabilities
    options   unit, classes, group, folds, max_rows, drop_rare, strength, seed: see `workbench_probes.task.Options`

    Returns one row a label × layer × expert: target, unit, features, label ("value" where numbers are predicted; of two
    classes both, with opposite signs), layer, expert, coefficient with low and high, rate (mean of the feature over the
    rows), n_rows, n_groups, n_folds. InputError as `probe`.
    """
    if features not in OF_EXPERTS:
        raise InputError(f"{features!r} has no columns of experts; coefficients are of {', '.join(OF_EXPERTS)}.")
    task = prepare(trace, target, **options)
    found = task.found
    chosen = check(trace, [features], layers, found.unit)
    matrix = beside([of_layer(trace, features, layer, found.row, found.unit) for layer in chosen])
    fitted = []
    for split in task.splits:
        linear = task.fit(features, matrix, split.train, found.value).model[-1]
        one = np.atleast_2d(linear.coef_)
        fitted.append(np.concatenate([-one, one]) if len(found.labels) == 2 else one)
    values = np.stack(fitted)  # (n_folds, n_labels, n_columns)
    per_train = np.mean([len(split.test) for split in task.splits]) / np.mean(
        [len(split.train) for split in task.splits]
    )
    low, high = fold_interval(values, float(per_train))
    sizes = [experts_of(trace, layer) for layer in chosen]
    labels = found.labels or [NUMBER]
    n_columns = sum(sizes)
    return pd.DataFrame(
        {
            "target": found.name,
            "unit": found.unit,
            "features": features,
            "label": np.repeat(np.array(labels, object), n_columns),
            "layer": np.tile(np.repeat(chosen, sizes), len(labels)),
            "expert": np.tile(np.concatenate([np.arange(size) for size in sizes]), len(labels)),
            "coefficient": values.mean(axis=0).ravel(),
            "low": low.ravel(),
            "high": high.ravel(),
            "rate": np.tile(np.asarray(matrix.mean(axis=0)).ravel(), len(labels)),
            "n_rows": len(found.row),
            "n_groups": len(np.unique(task.group)),
            "n_folds": len(task.splits),
        }
    )


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a label, layer by expert; of many labels those with the largest coefficients."""
    reach = frame["coefficient"].abs().groupby(frame["label"], sort=False).max()
    shown = [label for label in reach.index if label in reach.nlargest(MOST_PANELS).index]
    if len(reach) == 2:
        shown = shown[-1:]  # the other is its mirror image
    layers = sorted(frame["layer"].unique())
    experts = list(range(int(frame["expert"].max()) + 1))
    height = int(np.clip(24 * len(layers), 120, 420))
    result = figures.panels([figures.plain(label) for label in shown], columns=2, height=height)
    for panel, label in enumerate(shown):
        part = frame[frame["label"] == label].set_index(["layer", "expert"])
        whole = pd.MultiIndex.from_product([layers, experts])
        grid = part.reindex(whole)[["coefficient", "low", "high", "rate"]].to_numpy(float)
        grid = grid.reshape(len(layers), len(experts), 4)
        heat = figures.differences(
            grid[..., 0], experts, [str(layer) for layer in layers], details=grid, panel=panel,
            hover="layer %{y}, expert %{x}<br>%{customdata[0]:+.2f} [%{customdata[1]:+.2f}, %{customdata[2]:+.2f}]<br>"
            "mean of the feature %{customdata[3]:.3f}<extra></extra>",
        )  # fmt: skip
        result.add_trace(heat)
    figures.difference_scale(result, "coefficient", float(reach[shown].max()))
    for panel in range(max(0, len(shown) - 2), len(shown)):  # nothing is below these
        result.update_layout({figures.axes(panel)["xaxis"].replace("x", "xaxis"): {"title": "expert"}})
    result.update_yaxes(type="category", autorange="reversed")
    figures.left_title(result, "layer")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The expert that speaks most for each of the three clearest labels, in sentences."""
    top = frame.loc[frame.groupby("label", sort=False)["coefficient"].idxmax()].nlargest(3, "coefficient")
    return [
        f"Expert {row['expert']} of layer {row['layer']} speaks most for {row['target']} {row['label']}: "
        f"{row['coefficient']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]."
        for _, row in top.iterrows()
    ]
