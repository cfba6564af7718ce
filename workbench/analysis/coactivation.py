"""Which experts of a layer work on the same token.

Over all pairs of the k experts that a token chose:

- **count** n_ij: tokens that chose expert i and expert j. **probability** P(j | i) = n_ij / n_i, the part of the tokens
  of i that chose j too, 0 to 1; not symmetric (Muennighoff et al. 2024, OLMoE, §5.2). Their script counts only experts
  that are neighbours in rank (7 of the 28 pairs at k = 8); here every pair counts, as the paper says.
- **lift** = n_ij / expected: 1 is chance, 2 twice as often, 0 never. **expected** is what the loads alone lead to when
  a token draws k *different* experts and is otherwise as random as possible (conditional Poisson sampling). Plain
  independence, n_i · n_j / N, would expect too much: by the factor k (E − 1) / ((k − 1) E) at even loads.
- **p**: two-sided, of the difference from the expected count: Student's t over blocks of texts, with an error no
  smaller than that of independent tokens. **q**: false-discovery rate (Benjamini–Hochberg) over all pairs of all
  layers of the table, each pair counted once.

Intervals cover 95% of bootstrap resamples of texts, which are first put at random into at most 64 blocks. In resamples
the expected count follows the loads, its correction for different experts stays. Two experts of the same language or
topic meet more often than all loads together explain: that counts as a link, too. Tokens that were dropped aren't
counted.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.cluster.hierarchy import leaves_list

from workbench import figures
from workbench.analysis.chance_pairs import chance_pairs
from workbench.analysis.clustering import tree
from workbench.analysis.counting import experts_of
from workbench.analysis.pairs import (
    SIGNIFICANT,
    chosen_layers,
    linked,
    measures,
    most_experts,
    pairs_within,
    text_blocks,
)
from workbench.analysis.resampling import q_values
from workbench.tracefile import Trace

MOST_PANELS = 6
MOST_EXPERTS = 64
"""Experts of a layer that the figure shows when there are more: those with the strongest links."""


def coactivation(
    trace: Trace, *, layers: tuple[int, ...] | None = None, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Every ordered pair of different experts of a layer.

    layers  only these; None is all. The table has Σ E (E − 1) rows

    Returns one row a layer × expert × other: layer, expert, other; count; probability in [0, 1] with low, high;
    expected; lift with lift_low, lift_high; p, q; n_expert tokens that chose the expert; n_experts; n_tokens with any
    expert; n_texts, n_blocks. NaN: the probability of an expert never chosen, lift and p where no pair is expected,
    intervals and p where there is only one text.
    """
    chosen = chosen_layers(trace, layers)
    blocks = text_blocks(trace, most_experts(trace) ** 2, seed)
    tables = []
    for layer in chosen:
        n_experts = experts_of(trace, layer)
        pairs, sizes = pairs_within(trace, layer, blocks)
        found = measures(pairs, chance_pairs(pairs.left.sum(axis=0), sizes), n_resamples, seed)
        once = np.where(np.tri(n_experts, k=-1).T > 0, found["p"], np.nan)
        i, j = np.nonzero(~np.eye(n_experts, dtype=bool))
        tables.append(
            pd.DataFrame({"layer": layer, "expert": i, "other": j})
            .assign(**{name: values[i, j] for name, values in found.items()})
            .assign(
                once=once[i, j],
                n_expert=pairs.left.sum(axis=0)[i],
                n_experts=n_experts,
                n_tokens=pairs.tokens.sum(),
                n_texts=blocks.n_texts,
                n_blocks=blocks.n_blocks,
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    return with_q(frame)


def with_q(frame: pd.DataFrame) -> pd.DataFrame:
    """Replace `once` (p of i < j only) by q, the same for both orders of a pair."""
    q = q_values(frame.pop("once").to_numpy())
    low, high = np.minimum(frame["expert"], frame["other"]), np.maximum(frame["expert"], frame["other"])
    key = pd.MultiIndex.from_arrays([frame["layer"], low, high])
    known = pd.Series(q, index=key).dropna()
    frame.insert(list(frame.columns).index("p") + 1, "q", known.reindex(key).to_numpy())
    return frame


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a layer: the lift of every pair, experts ordered so that those that meet often are neighbours."""
    shown = figures.spread(frame["layer"], MOST_PANELS)
    if not shown:
        return figures.panels([""])
    columns = min(3, len(shown))
    result = figures.panels([f"layer {layer}" for layer in shown], columns=columns, height=900 // columns - 40)
    for panel, layer in enumerate(shown):
        part = frame[frame["layer"] == layer]
        experts = in_order(part)
        names = ("lift", "probability", "low", "high", "expected", "q")
        grids = [part.pivot(index="expert", columns="other", values=name) for name in names]
        details = np.stack([grid.reindex(index=experts, columns=experts).to_numpy(float) for grid in grids], axis=-1)
        labels = [str(expert) for expert in experts]
        result.add_trace(
            figures.ratios(
                details[..., 0],
                x=labels,
                y=labels,
                hover="tokens of expert %{y} that chose %{x} too: %{customdata[1]:.1%} "
                "[%{customdata[2]:.1%}, %{customdata[3]:.1%}]<br>%{customdata[0]:.2f} × chance "
                "(%{customdata[4]:,.0f} expected), q %{customdata[5]:.3f}<extra></extra>",
                details=details,
                panel=panel,
            )
        )
    figures.ratio_scale(result, "× chance")
    result.update_xaxes(type="category", showgrid=False, ticks="", showticklabels=False, title="experts, by likeness")
    result.update_yaxes(
        type="category", showgrid=False, ticks="", showticklabels=False, autorange="reversed", title="experts"
    )
    return result


def in_order(part: pd.DataFrame) -> list[int]:
    """Experts of one layer, ordered by hierarchical clustering of the lift (average linkage, optimal leaf order)."""
    lift = part.pivot(index="expert", columns="other", values="lift")
    experts = lift.index.to_numpy()
    with np.errstate(divide="ignore"):
        near = np.clip(np.log2(lift.to_numpy(float)), -figures.REACH, figures.REACH)
    near = np.nan_to_num(near)
    if len(experts) > MOST_EXPERTS:
        kept = np.sort(np.argsort(-near.max(axis=1), kind="stable")[:MOST_EXPERTS])
        experts, near = experts[kept], near[np.ix_(kept, kept)]
    if len(experts) < 3:
        return experts.tolist()
    distance = figures.REACH - (near + near.T) / 2
    np.fill_diagonal(distance, 0)
    return experts[leaves_list(tree(distance))].tolist()


def findings(frame: pd.DataFrame) -> list[str]:
    """How many pairs are linked, and the strongest, in sentences."""
    once = frame[(frame["expert"] < frame["other"]) & frame["lift"].notna()]
    if once.empty:
        return ["No token used two experts of a layer."]
    found = linked(once)
    sentences = [
        f"{len(found):,} of {len(once):,} pairs of experts meet on one token more often than their loads explain "
        f"(false-discovery rate {SIGNIFICANT:.0%}), {(found['lift'] >= 2).sum():,} of them at least twice as often."
    ]
    if len(found):
        top = found.iloc[0]
        sentences.append(
            f"The pair that stands out most: experts {top['expert']:.0f} and {top['other']:.0f} of layer "
            f"{top['layer']:.0f} meet on {top['count'] / top['n_tokens']:.1%} of the tokens, {top['lift']:.1f} times "
            f"as often as expected [{top['lift_low']:.1f}, {top['lift_high']:.1f}]."
        )
    return sentences
