"""What every expert of every layer is like: how busy, how strong, and how telling about a label.

For an expert e of a layer, over its assignments (a token that chose k experts makes k):

- **share**: its part of the layer's assignments. **load** = share · E: 1 is what even routing would give.
- **mean_weight**: mean gate weight over the tokens that chose it (`weights=true`).
- **lift**, for a group g of tokens: its share among the assignments of g / its share among those of all groups: 1 is
  what all of them do (`relative` in specialization).
- **information** = Σ_g p(g, e) · log( p(g, e) / p(g) p(e) ), what the expert contributes to the mutual information of
  expert choice and label, in nats: the experts of a layer sum to it.
- **divergence** = information / p(e) = KL( p(g | e) ‖ p(g) ), in nats: how unlike all tokens the tokens of this expert
  are in their labels, however busy it is; at most −log of the rarest label's p(g).

Intervals cover 95% of bootstrap resamples of texts (in at most 64 random blocks); those of information and divergence
are shifted by the resampling bias. Both are a little above 0 by chance alone: compare them with the other experts, or
see mutual_information for what shuffled labels give.

Source: information and divergence by Cover & Thomas 2006, section 2.3, a term each of the sum; the choice is ours.
"""

from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from plotly.graph_objects import Figure
from scipy.special import xlogy

from workbench import figures
from workbench.analysis.counting import EVERYTHING, add_choices, experts_of, shares, token_labels
from workbench.analysis.pairs import text_blocks
from workbench.analysis.resampling import draws, interval
from workbench.analysis.token_means import ratio
from workbench.expert_grid import grid_figure
from workbench.tracefile import Trace

MEASURES = ("share", "load", "mean_weight", "lift", "information", "divergence")


def expert_values(
    trace: Trace, *, by: str | None = None, weights: bool = False, n_resamples: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Load, mean weight, lift, information and divergence of every expert.

    by       column of the sequences, `phase` or `position`: rows for its groups beside those for all tokens; None:
             only these
    weights  mean gate weights too, which takes twice as long; InputError if they were not recorded

    Returns one row a group × layer × expert, first the group "all" of all tokens, those without a label too: by, group,
    layer, expert; share, load, mean_weight, lift, information, divergence, each with _low and _high; count of
    assignments; n_experts; n_tokens, n_sequences, n_texts of the group. NaN: lift of "all", information and divergence
    of groups, everything that is divided by 0, mean weights that were not asked for, intervals of a single text.
    """
    sequences, of_sequence = trace.sequences(), trace.sequence_index()
    label, labels = np.full(trace.n_tokens, -1), []
    if by is not None:
        label, labels = token_labels(trace, sequences, of_sequence, by)
    rows = len(labels) + 1  # the last one: tokens without a label
    blocks = text_blocks(trace, rows * int(trace.layers["n_experts"].sum()), seed)
    cell = blocks.of_token.astype(np.int64) * rows + np.where(label >= 0, label, len(labels))
    nothing = np.empty((0, blocks.n_blocks))
    drawn = np.concatenate([nothing, *(draws(blocks.n_blocks, n_resamples, seed) if blocks.n_blocks else ())])
    sizes = group_sizes(label, blocks.text, of_sequence, len(labels))
    names = [EVERYTHING, *labels]
    tables = []
    for layer in range(trace.n_layers):
        n_experts = experts_of(trace, layer)
        count, weight = tally(trace, layer, cell, blocks.n_blocks * rows, weights)
        sums = [None if each is None else each.reshape(blocks.n_blocks, rows, n_experts) for each in (count, weight)]
        value = measures(*(None if each is None else each.sum(axis=0) for each in sums))
        resampled = measures(*(None if each is None else np.tensordot(drawn, each, 1) for each in sums))
        columns: dict[str, Any] = {}
        for name in MEASURES:
            biased = name in ("information", "divergence")
            low, high = interval(resampled[name], value[name] if biased else None)
            single = sizes["n_texts"] < 2
            low[single], high[single] = np.nan, np.nan
            low = np.maximum(low, 0) if biased else low
            columns |= {name: value[name].ravel(), f"{name}_low": low.ravel(), f"{name}_high": high.ravel()}
        assert sums[0] is not None
        by_label = sums[0].sum(axis=0)
        counts = np.concatenate([by_label.sum(axis=0, keepdims=True), by_label[:-1]])
        tables.append(
            pd.DataFrame(
                {
                    "by": by,
                    "group": np.repeat(np.array(names, object), n_experts),
                    "layer": layer,
                    "expert": np.tile(np.arange(n_experts), len(names)),
                    **columns,
                    "count": counts.ravel().astype(np.int64),
                    "n_experts": n_experts,
                    **{name: np.repeat(each, n_experts) for name, each in sizes.items()},
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def group_sizes(label: np.ndarray, text: np.ndarray, of_sequence: np.ndarray, n_labels: int) -> dict[str, np.ndarray]:
    """n_tokens, n_sequences, n_texts of all tokens and then of each label: int64 (1 + n_labels,)."""
    kept = label >= 0

    def different(of_token: np.ndarray) -> np.ndarray:
        pairs = np.unique(label[kept] * (int(of_token.max(initial=0)) + 1) + of_token[kept])
        by_label = np.bincount(pairs // (int(of_token.max(initial=0)) + 1), minlength=n_labels)
        return np.append(len(np.unique(of_token)), by_label[:n_labels])

    return {
        "n_tokens": np.append(len(label), np.bincount(label[kept], minlength=n_labels)[:n_labels]),
        "n_sequences": different(of_sequence),
        "n_texts": different(text),
    }


def tally(
    trace: Trace, layer: int, cell: np.ndarray, n_cells: int, weights: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Assignments of the tokens of each cell, and the sum of their gate weights: float64 (n_cells, n_experts)."""
    experts = trace.experts(layer)
    count = np.zeros((n_cells, experts_of(trace, layer)))
    add_choices(experts, cell, count)
    if not weights:
        return count, None
    weight = np.zeros(count.shape)
    add_weights(experts, trace.weights(layer), cell, weight)
    return count, weight


@njit(cache=True, nogil=True)
def add_weights(experts: np.ndarray, weights: np.ndarray, row: np.ndarray, total: np.ndarray) -> None:
    """Add the weights of each token's experts to its row of total (n_rows, n_experts)."""
    n_experts = total.shape[1]
    for token in range(len(experts)):
        for rank in range(experts.shape[1]):
            expert = experts[token, rank]
            if expert < n_experts:  # NO_EXPERT is larger
                total[row[token], expert] += weights[token, rank]


def measures(count: np.ndarray | None, weight: np.ndarray | None) -> dict[str, np.ndarray]:
    """MEASURES of all tokens and of each label: float64 (…, 1 + n_labels, E).

    count, weight  (…, n_labels + 1, E), the last row the tokens without a label
    """
    assert count is not None
    labelled = count[..., :-1, :]
    everything = count.sum(axis=-2, keepdims=True)
    both = np.concatenate([everything, labelled], axis=-2)
    share = shares(both)
    unknown = np.full(both.shape, np.nan)
    mean = unknown
    if weight is not None:
        mean = ratio(np.concatenate([weight.sum(axis=-2, keepdims=True), weight[..., :-1, :]], axis=-2), both)
    lift, information, divergence = unknown.copy(), unknown.copy(), unknown.copy()
    if labelled.shape[-2]:
        of_expert = labelled.sum(axis=-2, keepdims=True)
        lift[..., 1:, :] = ratio(share[..., 1:, :], shares(of_expert))
        n = of_expert.sum(axis=-1, keepdims=True)
        of_label = labelled.sum(axis=-1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = labelled / n
            parts = xlogy(joint, np.where(labelled > 0, labelled * n / (of_label * of_expert), 1))
        told = np.where(n > 0, np.maximum(parts.sum(axis=-2, keepdims=True), 0), np.nan)
        information[..., :1, :] = told
        divergence[..., :1, :] = ratio(told * n, of_expert)
    return {
        "share": share,
        "load": share * both.shape[-1],
        "mean_weight": mean,
        "lift": lift,
        "information": information,
        "divergence": divergence,
    }


def figure(frame: pd.DataFrame) -> Figure:
    """The load of every expert, a row a layer, a column an expert."""
    whole = frame[frame["group"] == EVERYTHING]
    return grid_figure(whole.assign(value=whole["load"], low=whole["load_low"], high=whole["load_high"]), "× even")


def findings(frame: pd.DataFrame) -> list[str]:
    """How unevenly experts are used, and which one tells most about its label, in sentences."""
    whole = frame[frame["group"] == EVERYTHING]
    if not whole["load"].notna().any():
        return ["No token used any expert."]
    unused = int((whole["count"] == 0).sum())
    top = whole.iloc[int(np.nanargmax(whole["load"]))]
    sentences = [
        f"The busiest expert is number {top['expert']} of layer {top['layer']}, with {top['load']:.1f} times an even "
        f"share; {unused} of {len(whole)} experts are never used."
    ]
    if whole["divergence"].notna().any():
        noun = figures.noun(frame["by"].iloc[0])
        top = whole.iloc[int(np.nanargmax(whole["information"]))]
        sentences.append(
            f"Expert {top['expert']} of layer {top['layer']} tells most about the {noun}: it contributes "
            f"{top['information']:.3f} nats [{top['information_low']:.3f}, {top['information_high']:.3f}] of its "
            "layer's mutual information."
        )
    return sentences
