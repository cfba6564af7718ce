"""Which experts a group of texts uses more, or less, than the others do.

For a group g (a language, a domain, any label) and an expert e of a layer:

- **share**: count(e, g) / assignments(g), the part of the group's assignments that goes to the expert
  (Muennighoff et al. 2024, OLMoE, §5.3, there multiplied by 100·k).
- **lift** = share · E: 1 is what even routing would give.
- **relative** = share / share of the expert over all groups together. A busy expert has a high lift everywhere;
  only `relative` tells whether *this* group uses it more. It is what the figure shows.
- **p**: two-sided, from permuting the labels over texts: how often chance alone moves the share as far from its usual
  value. `within` keeps the permuted labels inside strata (languages inside a corpus, say), which removes what
  the composition of the strata explains. Its smallest possible value is 2/(permutations + 1).
- **q**: false-discovery rate (Benjamini–Hochberg) over all groups × layers × experts of the table.

The interval covers 95% of bootstrap resamples of texts.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import cells_to_compare, count, shares, sizes, sum_by
from workbench.analysis.resampling import bootstrap_sums, permuted_sums, q_values, text_interval
from workbench.tracefile import Trace

SIGNIFICANT = 0.05
"""False-discovery rate below which findings call an expert specialised."""
MOST_PANELS = 6
"""Layers that the figure shows when there are more: evenly spread."""
TIE = 1e-9
"""Shares this close are equal: they differ by rounding only."""


def specialization(
    trace: Trace,
    by: str = "lang",
    *,
    within: str | None = None,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of each expert in each group, against even routing and against the other groups.

    by      column of the sequences, `phase` or `position`
    within  column of the sequences: permute labels only among texts that agree in it

    Returns one row a group × layer × expert: by, within, group, layer, expert; share with low, high; lift; relative;
    count; p, q; n_experts; n_tokens, n_sequences, n_texts of the group; n_unlabelled sequences left out for want of a
    label. NaN: share where the group has no assignment in the layer, interval where the group is a single text, p where
    chance can't move the share (nothing to permute, or only one expert).
    """
    cells = cells_to_compare(trace, by, within)
    n_groups = len(cells.labels)
    tables = []
    for layer in range(trace.n_layers):
        rows = count(trace, layer, cells)
        n_experts = rows.shape[1]
        counts = sum_by(rows, cells.group, n_groups)
        share = shares(counts)
        overall = shares(counts.sum(axis=0))
        resampled = bootstrap_sums(rows, cells.text, cells.group, n_groups, n_resamples, seed)
        low, high = text_interval(shares(resampled), cells.n_texts)

        above, below = np.zeros(share.shape), np.zeros(share.shape)
        for permuted in permuted_sums(rows, cells.group, n_groups, n_permutations, seed, cells.strata):
            chance = shares(permuted)
            above += (chance >= share - TIE).sum(axis=0)
            below += (chance <= share + TIE).sum(axis=0)
        p = np.minimum(1, 2 * (1 + np.minimum(above, below)) / (n_permutations + 1))
        unmoved = np.minimum(above, below) == n_permutations
        p[unmoved | np.isnan(share)] = np.nan
        tables.append(
            pd.DataFrame(
                {
                    "by": by,
                    "within": within,
                    "group": np.repeat(cells.labels, n_experts),
                    "layer": layer,
                    "expert": np.tile(np.arange(n_experts), n_groups),
                    "share": share.ravel(),
                    "low": low.ravel(),
                    "high": high.ravel(),
                    "lift": share.ravel() * n_experts,
                    "relative": np.divide(share, overall, out=np.full(share.shape, np.nan), where=overall > 0).ravel(),
                    "count": counts.ravel().astype(np.int64),
                    "p": p.ravel(),
                    "n_experts": n_experts,
                    **sizes(cells, n_experts),
                }
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a layer, a row a group, a column an expert; the colour is `relative`, on a logarithmic scale.

    The experts of a layer are ordered by the group that uses them most, so that specialists line up as blocks.
    """
    shown = figures.spread(frame["layer"], MOST_PANELS)
    groups = figures.ordered(frame["group"].unique())
    titles = [f"layer {layer}" for layer in shown]
    result = figures.panels(titles, columns=3, height=14 * max(len(groups), 6), tight=True)
    for panel, layer in enumerate(shown):
        part = frame[frame["layer"] == layer].set_index(["group", "expert"])
        relative = part["relative"].unstack().reindex(groups)
        filled = relative.fillna(0).to_numpy()
        favourite = filled.argmax(axis=0)
        experts = relative.columns[np.lexsort((-filled.max(axis=0), favourite))]
        names = ("relative", "share", "low", "high", "lift", "q")
        details = np.stack([part[name].unstack().loc[groups, experts].to_numpy() for name in names], axis=-1)
        result.add_trace(
            figures.ratios(
                relative[experts].to_numpy(),
                x=[f"expert {expert}" for expert in experts],
                y=[figures.plain(group) for group in groups],
                hover="%{y} · %{x}<br>%{customdata[0]:.2f} × all groups<br>share %{customdata[1]:.2%} "
                "[%{customdata[2]:.2%}, %{customdata[3]:.2%}]<br>%{customdata[4]:.2f} × an even share<br>"
                "q %{customdata[5]:.3f}<extra></extra>",
                details=details,
                panel=panel,
            )
        )
    figures.ratio_scale(result, "× all groups")
    result.update_xaxes(showticklabels=False, showgrid=False, ticks="", title="experts")
    result.update_yaxes(autorange="reversed", showgrid=False, ticks="", tickmode="linear", dtick=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How many experts are specialised, and the largest preference, in sentences."""
    noun = figures.noun(frame["by"].iloc[0])
    n_experts = len(frame[["layer", "expert"]].drop_duplicates())
    significant = frame[(frame["q"] < SIGNIFICANT) & (frame["relative"] > 1)]
    n_twice = len(significant.loc[significant["relative"] >= 2, ["layer", "expert"]].drop_duplicates())
    sentences = [
        f"{n_twice} of {n_experts} experts are used at least twice as much by some {noun} as by all texts together "
        f"(false-discovery rate {SIGNIFICANT:.0%})."
    ]
    if len(significant):
        surplus = significant["share"] * (1 - 1 / significant["relative"])
        top = significant.iloc[surplus.argmax()]
        sentences.append(
            f"The largest single preference: {top['group']} sends {top['share']:.1%} of its layer-{top['layer']} "
            f"assignments to expert {top['expert']}, {top['relative']:.1f} times as many as all texts together."
        )
    return sentences
