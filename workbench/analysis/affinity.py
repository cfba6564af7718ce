"""Which expert of a later layer a token goes to, given its expert in an earlier one.

Over all k × k pairs of a token's experts in layer l and in layer l + gap:

- **count** n_ij: tokens that chose expert i of layer l and expert j of layer l + gap. **probability** P(j | i) = n_ij /
  n_i, 0 to 1; it sums to k over j (Yao et al. 2024, ExFlow, there with one expert a token). OLMoE's script pairs
  only the first expert with the first, the second with the second, …; here every pair counts.
- **expected** = n_i · n_j / N: what the loads alone lead to. **lift** = n_ij / expected: 1 is chance.
- **p**: two-sided, of the difference from the expected count: Student's t over blocks of texts, with an error no
  smaller than that of independent tokens. **q**: false-discovery rate (Benjamini–Hochberg) over the table.

How much one layer tells about another, in one number, is in layer_links. Intervals cover 95% of bootstrap resamples of
texts, which are first put at random into at most 64 blocks. Tokens that have no expert in one of the two layers (they
were dropped) aren't counted.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.optimize import linear_sum_assignment

from workbench import figures
from workbench.analysis.counting import experts_of
from workbench.analysis.pairs import (
    SIGNIFICANT,
    chosen_layers,
    count_pairs,
    counted_pairs,
    independent,
    linked,
    measures,
    most_experts,
    text_blocks,
)
from workbench.analysis.resampling import q_values
from workbench.errors import InputError
from workbench.tracefile import Trace

MOST_PANELS = 6
MOST_EXPERTS = 64
"""Experts of a layer that the figure shows when there are more: those with the strongest links."""


def affinity(
    trace: Trace, *, gap: int = 1, layers: tuple[int, ...] | None = None, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Every pair of an expert and an expert `gap` MoE layers later.

    gap     1 is the next MoE layer
    layers  only from these layers; None is all that have a layer so far behind them

    Returns one row a layer × expert × next_expert: layer, expert, next_layer, next_expert; count; probability in [0, 1]
    with low, high; expected; lift with lift_low, lift_high; p, q; n_expert tokens that chose the expert; n_experts,
    n_next_experts; n_tokens with experts in both layers; n_texts, n_blocks. NaN: the probability of an expert never
    chosen, lift and p where no pair is expected, intervals and p where there is only one text.

    InputError for a gap that the trace has no layers for.
    """
    if not 1 <= gap < trace.n_layers:
        raise InputError(
            f"gap is {gap}; this trace has {trace.n_layers} MoE layers, "
            + (f"so a gap of 1 to {trace.n_layers - 1} is possible." if trace.n_layers > 1 else "so there is no next.")
        )
    chosen = [layer for layer in chosen_layers(trace, layers) if layer + gap < trace.n_layers]
    if not chosen:
        raise InputError(f"none of the layers {layers} has a layer {gap} later; the last is {trace.n_layers - 1}.")
    blocks = text_blocks(trace, most_experts(trace) ** 2, seed)
    tables = []
    later: tuple[int, np.ndarray] | None = None
    for layer in chosen:
        n_experts, n_next = experts_of(trace, layer), experts_of(trace, layer + gap)
        if trace.counted:
            pairs = counted_pairs(trace, layer, layer + gap)
        else:
            before = later[1] if later and later[0] == layer else trace.experts(layer)
            later = layer + gap, trace.experts(layer + gap)
            pairs = count_pairs(before, later[1], n_experts, n_next, blocks)
        found = measures(pairs, independent(pairs), n_resamples, seed)
        i, j = np.divmod(np.arange(n_experts * n_next), n_next)
        tables.append(
            pd.DataFrame({"layer": layer, "expert": i, "next_layer": layer + gap, "next_expert": j})
            .assign(**{name: values.ravel() for name, values in found.items()})
            .assign(
                n_expert=pairs.left.sum(axis=0)[i],
                n_experts=n_experts,
                n_next_experts=n_next,
                n_tokens=pairs.tokens.sum(),
                n_texts=blocks.n_texts,
                n_blocks=blocks.n_blocks,
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def figure(frame: pd.DataFrame) -> Figure:
    """A panel a pair of layers: the lift of every transition, ordered so that strong ones lie near the diagonal."""
    shown = figures.spread(frame["layer"], MOST_PANELS)
    columns = min(3, len(shown))
    later = dict(zip(frame["layer"], frame["next_layer"], strict=True))
    titles = [f"layer {layer} to {later[layer]}" for layer in shown]
    result = figures.panels(titles, columns=columns, height=900 // columns - 40)
    for panel, layer in enumerate(shown):
        part = frame[frame["layer"] == layer]
        rows, places = in_order(part.pivot(index="expert", columns="next_expert", values="lift"))
        names = ("lift", "probability", "low", "high", "expected", "q")
        grids = [part.pivot(index="expert", columns="next_expert", values=name) for name in names]
        details = np.stack([grid.reindex(index=rows, columns=places).to_numpy(float) for grid in grids], axis=-1)
        result.add_trace(
            figures.ratios(
                details[..., 0],
                x=[str(expert) for expert in places],
                y=[str(expert) for expert in rows],
                hover=f"tokens of expert %{{y}} of layer {layer} that chose %{{x}} of layer {later[layer]}: "
                "%{customdata[1]:.1%} [%{customdata[2]:.1%}, %{customdata[3]:.1%}]<br>%{customdata[0]:.2f} × chance "
                "(%{customdata[4]:,.0f} expected), q %{customdata[5]:.3f}<extra></extra>",
                details=details,
                panel=panel,
            )
        )
    figures.ratio_scale(result, "× chance")
    result.update_xaxes(type="category", showgrid=False, ticks="", showticklabels=False, title="experts of the later")
    result.update_yaxes(
        type="category", showgrid=False, ticks="", showticklabels=False, autorange="reversed", title="of the earlier"
    )
    return result


def in_order(lift: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Rows by hierarchical clustering; each column at the place of a row it is linked with, matched one to one."""
    with np.errstate(divide="ignore"):
        near = np.nan_to_num(np.clip(np.log2(lift.to_numpy(float)), -figures.REACH, figures.REACH))
    rows = np.sort(np.argsort(-near.max(axis=1), kind="stable")[:MOST_EXPERTS])
    columns = np.sort(np.argsort(-near.max(axis=0), kind="stable")[:MOST_EXPERTS])
    near = near[np.ix_(rows, columns)]
    if len(rows) > 2:
        order = leaves_list(linkage(near, "average", optimal_ordering=True))
        rows, near = rows[order], near[order]
    place = np.full(len(columns), float(len(rows)))
    at, column = linear_sum_assignment(near, maximize=True)
    place[column] = at
    columns = columns[np.argsort(place, kind="stable")]
    return lift.index.to_numpy()[rows].tolist(), lift.columns.to_numpy()[columns].tolist()


def findings(frame: pd.DataFrame) -> list[str]:
    """How many transitions are linked, and the strongest, in sentences."""
    known = frame[frame["lift"].notna()]
    if known.empty:
        return ["No token used experts in both layers."]
    found = linked(known)
    sentences = [
        f"{len(found):,} of {len(known):,} transitions between experts are taken more often than the loads explain "
        f"(false-discovery rate {SIGNIFICANT:.0%}), {(found['lift'] >= 2).sum():,} of them at least twice as often."
    ]
    if len(found):
        top = found.iloc[0]
        sentences.append(
            f"The one that stands out most: {top['probability']:.0%} of the tokens of expert {top['expert']:.0f} of "
            f"layer {top['layer']:.0f} go to expert {top['next_expert']:.0f} of layer {top['next_layer']:.0f}, "
            f"{top['lift']:.1f} times as often as expected [{top['lift_low']:.1f}, {top['lift_high']:.1f}]."
        )
    return sentences
