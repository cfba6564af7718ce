"""How much one expert choice tells about a label, and the label about the choice: mutual information, layer by layer.

With p(g, e) the part of a layer's assignments that tokens of group g make to expert e:

- **mutual information** I = Σ p(g, e) · log( p(g, e) / p(g)p(e) ), in nats; 0 when the groups route alike, at most
  log E and at most the entropy H(g) of the label.
- **normalised** = I / H(g): the part of the label's entropy that one expert choice resolves, 0 to 1.
- **null**: the same after permuting the labels over texts, its mean and its 95th percentile. Chance alone gives more
  than 0, the more so the fewer texts there are. With `within` the labels stay inside strata (languages inside a
  corpus, say), so that what the composition of the strata explains is in the null and not in the excess.
- **excess** = I − mean of the null: what is left for the label itself.
- **p**: how often permuted labels reach the value; at least 1/(permutations + 1).

The interval covers 95% of bootstrap resamples of texts, shifted by the resampling bias (resampling inflates I).
Texts with more tokens weigh more, as in all tables of this kind.

Source: Shannon 1948 for I; a null of permuted texts and the shifted interval are ours.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import cells_to_compare, count, entropy, sum_by
from workbench.analysis.resampling import bootstrap_sums, permuted_sums, text_interval
from workbench.tracefile import Trace

TIE = 1e-12
"""Nats: values this close are equal, they differ by rounding only."""


def mutual_information(
    trace: Trace,
    by: str = "lang",
    *,
    within: str | None = None,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mutual information of expert choice and label in each layer.

    by      column of the sequences, `phase` or `position`
    within  column of the sequences: permute labels only among texts that agree in it

    Returns one row a layer: by, within, layer; mutual_information (nats) with low, high; normalised; null_mean,
    null_high, excess, p; label_entropy (nats); n_groups, n_experts, n_tokens, n_sequences, n_texts, n_unlabelled
    (sequences left out for want of a label). Values are NaN for a layer without assignments.
    """
    cells = cells_to_compare(trace, by, within)
    n_groups = len(cells.labels)
    n_texts = int(cells.text.max(initial=-1)) + 1
    table = []
    for layer in range(trace.n_layers):
        rows = count(trace, layer, cells)
        counts = sum_by(rows, cells.group, n_groups)
        value = float(nats(counts))
        resampled = nats(bootstrap_sums(rows, cells.text, cells.group, n_groups, n_resamples, seed))
        low, high = text_interval(resampled, n_texts, np.array(value))
        chance = [
            nats(permuted)
            for permuted in permuted_sums(rows, cells.group, n_groups, n_permutations, seed, cells.strata)
        ]
        null = np.concatenate(chance) if chance else np.empty(0)
        known = len(null) > 0 and np.isfinite(value)
        label_entropy = float(entropy(counts.sum(axis=1)))
        table.append(
            {
                "by": by,
                "within": within,
                "layer": layer,
                "mutual_information": value,
                "low": float(np.maximum(low, 0)),
                "high": float(high),
                "normalised": value / label_entropy if label_entropy > 0 else np.nan,
                "null_mean": null.mean() if known else np.nan,
                "null_high": np.percentile(null, 95) if known else np.nan,
                "excess": value - null.mean() if known else np.nan,
                "p": (1 + (null >= value - TIE).sum()) / (n_permutations + 1) if known else np.nan,
                "label_entropy": label_entropy,
                "n_groups": n_groups,
                "n_experts": rows.shape[1],
                "n_tokens": cells.n_tokens.sum(),
                "n_sequences": cells.n_sequences.sum(),
                "n_texts": n_texts,
                "n_unlabelled": cells.n_unlabelled,
            }
        )
    return pd.DataFrame(table)


def nats(counts: np.ndarray) -> np.ndarray:
    """Nats, from counts (…, n_groups, n_experts); NaN where they are all 0. I = H(g) + H(e) − H(g, e)."""
    joint = counts.reshape(*counts.shape[:-2], counts.shape[-2] * counts.shape[-1])
    value = entropy(counts.sum(axis=-1)) + entropy(counts.sum(axis=-2)) - entropy(joint)
    return np.maximum(value, 0)


def figure(frame: pd.DataFrame) -> Figure:
    """Mutual information by layer with its interval, above the 95% bound of the permutation null."""
    result = figures.panels([""], height=240, legend=True)
    figures.line(
        result,
        frame["layer"],
        frame["null_high"],
        name="95% of shuffles of the labels stay below",
        style=figures.NULL,
        fill=True,
    )
    figures.line(
        result, frame["layer"], frame["mutual_information"], frame["low"], frame["high"],
        name=f"expert choice and {figures.noun(frame['by'].iloc[0])}", style=figures.MAIN,
    )  # fmt: skip
    figures.layer_axes(result, frame["layer"])
    result.update_yaxes(title="mutual information (nats)", rangemode="tozero")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Where the label is strongest, and in how many layers it is there at all, in sentences."""
    if not frame["mutual_information"].notna().any():
        return ["No token used any expert."]
    noun = figures.noun(frame["by"].iloc[0])
    within = frame["within"].iloc[0]
    top = frame.iloc[frame["mutual_information"].argmax()]
    clear = (frame["mutual_information"] > frame["null_high"]).sum()
    shuffled = "shuffled labels give" if within is None else f"labels shuffled within each {figures.noun(within)} give"
    return [
        f"Expert choice carries {top['mutual_information']:.2f} nats of {noun} in layer {top['layer']} "
        f"[{top['low']:.2f}, {top['high']:.2f}], {top['normalised']:.0%} of the entropy of {noun}; {shuffled} "
        f"{top['null_mean']:.3f}.",
        f"It is above 95% of the shuffles in {clear} of {len(frame)} layers.",
    ]
