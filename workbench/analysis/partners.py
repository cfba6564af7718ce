"""Whether experts keep fixed partners, and whether they do so more with depth.

The partners of expert i are the experts j that its tokens choose beside it in the same layer; n_ij as in coactivation.

- **partner**: the most frequent one. **share** = n_ij / Σ_j n_ij, its part of all of i's partnerships: 1/(E − 1) if
  partners are drawn evenly, at most 1/(k − 1).
- **effective partners** = exp of the entropy of i's partner shares: E − 1 if drawn evenly, k − 1 if always the same.
- **expected partners**: the same for the pairs that the loads alone lead to (see coactivation). Fewer effective
  partners than expected means fixed partners: in vision–language detectors experts have diverse partners in shallow
  layers and two or three fixed ones in deep layers (Lu et al. 2025, Dynamic-DINO; they show example layers and give
  no formula).
- **mutual**: whether the partner's most frequent partner is this expert.

Intervals cover 95% of bootstrap resamples of texts (in at most 64 random blocks); the share's keeps the partner that
all texts together name, that of the effective partners is shifted by the resampling bias.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.chance_pairs import chance_pairs
from workbench.analysis.counting import entropy, experts_of, shares
from workbench.analysis.pairs import chosen_layers, most_experts, pairs_within, text_blocks
from workbench.analysis.resampling import CHUNK, draws, interval
from workbench.tracefile import Trace


def partners(
    trace: Trace, *, layers: tuple[int, ...] | None = None, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The most frequent partner of each expert, and how concentrated its partners are.

    layers  only these; None is all

    Returns one row a layer × expert: layer, expert; partner (-1 if none); share with low, high; mutual;
    effective_partners with effective_low, effective_high; expected_partners; n_pairs (partnerships of the expert);
    n_expert tokens that chose it; n_experts; n_tokens with any expert; n_texts, n_blocks. NaN: everything about an
    expert without partners, intervals where there is only one text.
    """
    chosen = chosen_layers(trace, layers)
    blocks = text_blocks(trace, most_experts(trace) ** 2, seed)
    tables = []
    for layer in chosen:
        n_experts = experts_of(trace, layer)
        pairs, sizes = pairs_within(trace, layer, blocks)
        expected = chance_pairs(pairs.left.sum(axis=0), sizes)
        itself = np.eye(n_experts, dtype=bool)
        both = np.where(itself, 0, pairs.both)
        count = both.sum(axis=0)
        alone = count.sum(axis=1) == 0
        partner = np.where(alone, -1, count.argmax(axis=1))
        share = shares(count)[np.arange(n_experts), partner]
        effective = np.exp(entropy(count))
        ends = resampled(both, partner, effective, n_resamples, seed) if blocks.n_blocks > 1 else None
        low, high, effective_low, effective_high = np.full((4, n_experts), np.nan) if ends is None else ends
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "expert": np.arange(n_experts),
                    "partner": partner,
                    "share": share,
                    "low": low,
                    "high": high,
                    "mutual": ~alone & (partner[partner] == np.arange(n_experts)),
                    "effective_partners": effective,
                    "effective_low": effective_low,
                    "effective_high": effective_high,
                    "expected_partners": np.exp(entropy(np.where(itself, 0, expected))),
                    "n_pairs": count.sum(axis=1),
                    "n_expert": pairs.left.sum(axis=0),
                    "n_experts": n_experts,
                    "n_tokens": pairs.tokens.sum(),
                    "n_texts": blocks.n_texts,
                    "n_blocks": blocks.n_blocks,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def resampled(
    both: np.ndarray, partner: np.ndarray, effective: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, ...]:
    """Ends of the intervals of the share and of the effective partners, each (E,).

    both  int64 (n_blocks, E, E) with a diagonal of 0
    """
    n_blocks, n_experts, _ = both.shape
    if n_resamples < 1:
        return tuple(np.full((4, n_experts), np.nan))
    drawn = np.concatenate(list(draws(n_blocks, n_resamples, seed))).astype(np.float64)
    share, number = np.empty((2, n_resamples, n_experts))
    step = max(1, CHUNK // (n_resamples * n_experts))
    for start in range(0, n_experts, step):
        rows = slice(start, start + step)
        count = (drawn @ both[:, rows].reshape(n_blocks, -1)).reshape(n_resamples, -1, n_experts)
        share[:, rows] = np.take_along_axis(shares(count), partner[None, rows, None], axis=2)[..., 0]
        number[:, rows] = np.exp(entropy(count))
    low, high = interval(share)
    effective_low, effective_high = interval(number, effective)
    return low, high, np.maximum(effective_low, 1), effective_high


def figure(frame: pd.DataFrame) -> Figure:
    """By layer, the median over experts and the middle half of them: effective partners, and the share of the first."""
    result = figures.panels(
        ["effective partners of an expert", "share of its most frequent partner"], columns=2, height=280, legend=True
    )
    by_layer = frame.groupby("layer")
    for panel, column in enumerate(("effective_partners", "share")):
        quartiles = by_layer[column].quantile(np.array([0.25, 0.5, 0.75])).unstack()
        figures.line(
            result, quartiles.index, quartiles[0.5], quartiles[0.25], quartiles[0.75],
            name="median expert (band: middle half)", panel=panel, legend=panel == 0,
        )  # fmt: skip
    expected = by_layer["expected_partners"].median()
    figures.line(result, expected.index, expected, name="expected from the loads", style=figures.NULL)
    figures.layer_axes(result, frame["layer"])
    result.update_yaxes(rangemode="tozero")
    result.update_layout(yaxis2={"tickformat": ".0%"})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How the number of partners changes with depth, in sentences."""
    known = frame[frame["share"].notna()]
    if known.empty:
        return ["No token used two experts of a layer."]
    by_layer = known.groupby("layer")[["effective_partners", "expected_partners", "share"]].median()
    first, last = by_layer.iloc[0], by_layer.iloc[-1]
    sentences = [
        f"The median expert has {first['effective_partners']:.1f} effective partners in layer {by_layer.index[0]} "
        f"({first['expected_partners']:.1f} expected from the loads)"
    ]
    if len(by_layer) > 1:
        sentences[0] += (
            f" and {last['effective_partners']:.1f} in layer {by_layer.index[-1]} ({last['expected_partners']:.1f})"
        )
    sentences[0] += "."
    top = known.iloc[known["share"].argmax()]
    sentences.append(
        f"The most faithful: expert {top['expert']} of layer {top['layer']} has expert {top['partner']} in "
        f"{top['share']:.0%} of its partnerships [{top['low']:.0%}, {top['high']:.0%}]."
    )
    return sentences
