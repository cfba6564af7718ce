"""Which groups of texts are routed alike: similarity of data sets, domains or languages by their mean routing.

The routing vector of a group in a layer is the share of its assignments that goes to each expert (**frequencies**), or
the mean over its tokens of the full router probabilities (**probabilities**, where profiles were recorded). Between two
groups:

- **cosine** of the two vectors: 1 same direction, 0 no expert in common.
- **js**: Jensen–Shannon divergence over log 2: 0 identical, 1 no expert in common.
- **null** and **null_high**: the js that two groups of these texts would show if both were drawn from one distribution,
  mean and 95th percentile. Small groups differ by chance: the null grows as they shrink. **excess** = js − null, the
  distance that is clustered. **p** is how often the null reaches js, **q** its false-discovery rate
  (Benjamini–Hochberg) over all pairs × layers of the table.
- The rows without a layer are the **mean over layers** of both measures and of the null.

The null takes the deviations of the bootstrap resamples of each group from its own vector, enlarged by √(n/(n − 1)) for
its n texts, and adds them to the mean vector of the two groups: each keeps its own spread and lengths of texts, which
shuffled labels would mix. With fewer than about 10 texts in a group it calls too many pairs equal. The intervals cover
95% of bootstrap resamples of texts; that of js is shifted by the resampling bias.

The idea is that of Dynamic Data Mixing (Zhu et al. 2024, arXiv:2406.11256), whose gate loads are our frequencies, as
counts a data set; they compare them by Euclidean distance. Clustering: average linkage on `excess`.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis import clustering
from workbench.analysis.counting import Cells, cells_to_compare, count, experts_of, shares, sum_by
from workbench.analysis.resampling import bootstrap_sums, q_values, text_interval
from workbench.errors import InputError
from workbench.tracefile import Trace

VECTORS = ("frequencies", "probabilities")
SIGNIFICANT = 0.05
"""False-discovery rate below which findings call two groups different."""
TIE = 1e-9
MOST_VALUES = 1 << 21
"""Entries of the largest temporary array: pairs are taken in pieces."""


def group_similarity(
    trace: Trace, *, by: str = "domain", vectors: str = "frequencies", n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Cosine and Jensen–Shannon divergence of the mean routing of every two groups, by layer and over all layers.

    by       column of the sequences, `phase` or `position`
    vectors  "frequencies" of the chosen experts, or "probabilities" of the router (needs recorded profiles)

    Returns one row a pair × layer, and one a pair with a missing layer, the mean over layers: by, vectors, group,
    other, layer; cosine with cosine_low, cosine_high; js with js_low, js_high; null, null_high, excess; p, q;
    n_tokens, n_tokens_other, n_texts, n_texts_other; n_unlabelled sequences left out for want of a label. NaN: all of a
    pair where a group has no assignment, intervals and null where a group is a single text.

    InputError for other vectors, a column that isn't there, and probabilities by phase or position, which are
    recorded a sequence.
    """
    if vectors not in VECTORS:
        raise InputError(f"vectors is {vectors!r}; expected one of {', '.join(VECTORS)}.")
    cells = cells_to_compare(trace, by)
    if vectors == "probabilities" and by in ("phase", "position") and by not in trace.sequences().columns:
        raise InputError(
            f"router probabilities were recorded a sequence, not a token: {by!r} can't be compared by them; use "
            "vectors=frequencies."
        )
    first, second = np.triu_indices(len(cells.labels), 1)
    n_texts = np.minimum(cells.n_texts[first], cells.n_texts[second])
    totals: dict[str, np.ndarray] = {}
    tables = []
    for layer in range(trace.n_layers):
        rows = routed(trace, layer, cells, vectors)
        found = pairwise(rows, cells, first, second, n_resamples, seed)
        for name, value in found.items():
            totals[name] = totals.get(name, 0) + value / trace.n_layers
        tables.append(table(found, layer, n_texts))
    tables.append(table(totals, None, n_texts))
    labels = np.array(cells.labels, object)
    repeat = len(tables)
    frame = pd.concat(tables, ignore_index=True)
    front = {
        "by": by,
        "vectors": vectors,
        "group": np.tile(labels[first], repeat),
        "other": np.tile(labels[second], repeat),
    }
    for place, (name, column) in enumerate(front.items()):
        frame.insert(place, name, column)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    for name, of_group in (("n_tokens", cells.n_tokens), ("n_texts", cells.n_texts)):
        frame[name] = np.tile(of_group[first], repeat)
        frame[f"{name}_other"] = np.tile(of_group[second], repeat)
    frame["n_unlabelled"] = cells.n_unlabelled
    return frame


def routed(trace: Trace, layer: int, cells: Cells, vectors: str) -> np.ndarray:
    """Sum of the routing vectors of each cell's tokens: float64 (n_cells, n_experts)."""
    if vectors == "frequencies":
        return count(trace, layer, cells)
    of_sequence = trace.sequence_index()
    cell = np.full(trace.n_sequences, -1)
    cell[of_sequence] = cells.of_token
    profiles = trace.profiles(layer) * np.bincount(of_sequence, minlength=trace.n_sequences)[:, None]
    used = (cell >= 0) & np.isfinite(profiles).all(axis=1)
    rows = np.zeros((len(cells.group), experts_of(trace, layer)))
    np.add.at(rows, cell[used], profiles[used])
    return rows


def pairwise(
    rows: np.ndarray, cells: Cells, first: np.ndarray, second: np.ndarray, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Of each pair: cosine, js (n_pairs,); of each resample the same, and js under the null: (n_resamples, n_pairs)."""
    n_groups = len(cells.labels)
    vector = shares(sum_by(rows, cells.group, n_groups))
    # Single precision is enough for quantiles, and several times faster.
    drawn = shares(bootstrap_sums(rows, cells.text, cells.group, n_groups, n_resamples, seed)).astype(np.float32)
    enlarged = np.sqrt(cells.n_texts / np.maximum(cells.n_texts - 1, 1))[:, None]
    deviation = (drawn - vector.astype(np.float32)) * enlarged.astype(np.float32)
    found = {
        "cosine": cosine(vector[first], vector[second]),
        "js": js(vector[first], vector[second]),
        **{name: np.empty((n_resamples, len(first))) for name in ("cosines", "jss", "nulls")},
    }
    step = max(1, MOST_VALUES // max(n_resamples * rows.shape[1], 1))
    for start in range(0, len(first), step):
        here = slice(start, start + step)
        one, other = drawn[:, first[here]], drawn[:, second[here]]
        found["cosines"][:, here] = cosine(one, other)
        found["jss"][:, here] = js(one, other)
        middle = ((vector[first[here]] + vector[second[here]]) / 2).astype(np.float32)
        for side in (one, other):
            side[:] = middle
        one += deviation[:, first[here]]
        other += deviation[:, second[here]]
        for side in (one, other):
            np.maximum(side, 0, out=side)
            side /= side.sum(axis=-1, keepdims=True)
        found["nulls"][:, here] = js(one, other)
    return found


def cosine(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Cosine over the last axis of vectors that are not 0; NaN where one is NaN."""
    inner, square, other = (np.einsum("...e,...e->...", *pair) for pair in ((p, q), (p, p), (q, q)))
    return inner / np.sqrt(square * other)


def js(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen–Shannon divergence of distributions over the last axis, over log 2: 0 to 1."""
    return np.clip(((nats(p) + nats(q)) / 2 - nats((p + q) / 2)) / np.log(2), 0, 1)


def nats(p: np.ndarray) -> np.ndarray:
    """Σ p log p over the last axis, 0 log 0 = 0 (faster than scipy's xlogy)."""
    return np.einsum("...e,...e->...", p, np.log(np.maximum(p, np.finfo(p.dtype).tiny)))


def table(found: dict[str, np.ndarray], layer: int | None, n_texts: np.ndarray) -> pd.DataFrame:
    """The rows of one layer, or of the mean over all."""
    cosine_low, cosine_high = text_interval(found["cosines"], n_texts)
    low, high = text_interval(found["jss"], n_texts, found["js"])
    nulls = found["nulls"]
    n_resamples = len(nulls)
    known = (n_texts > 1) & np.isfinite(found["js"]) & np.isfinite(nulls).any(axis=0)
    chance, most = np.full(len(n_texts), np.nan), np.full(len(n_texts), np.nan)
    if known.any():
        # A resample in which a group has no text says nothing.
        chance[known] = np.nanmean(nulls[:, known], axis=0)
        most[known] = np.nanpercentile(nulls[:, known], 95, axis=0)
    reached = (~(nulls < found["js"] * (1 - TIE))).sum(axis=0)
    return pd.DataFrame(
        {
            "layer": pd.array([layer] * len(n_texts), dtype="Int64"),
            "cosine": found["cosine"],
            "cosine_low": cosine_low,
            "cosine_high": cosine_high,
            "js": found["js"],
            "js_low": np.maximum(low, 0),
            "js_high": np.minimum(high, 1),
            "null": chance,
            "null_high": most,
            "excess": found["js"] - chance,
            "p": np.where(known, (1 + reached) / (n_resamples + 1), np.nan),
        }
    )


def figure(frame: pd.DataFrame) -> Figure:
    """The excess divergence, mean over layers, as a matrix: groups that are routed alike beside each other."""
    pooled = frame[frame["layer"].isna()]
    # Without resamples there is no null to take away.
    shown = "excess" if pooled["excess"].notna().any() else "js"
    labels, value = clustering.matrix(pooled, "group", "other", shown)
    columns = ("js", "js_low", "js_high", "cosine", "null", "q")
    details = np.stack([clustering.matrix(pooled, "group", "other", name)[1] for name in columns], axis=-1)
    return clustering.draw(
        labels, value, np.maximum(value, 0), details, least=0,
        title="JS divergence<br>beyond chance" if shown == "excess" else "JS divergence",
        hover="%{y} and %{x}<br>JS %{customdata[0]:.3f} [%{customdata[1]:.3f}, %{customdata[2]:.3f}], by chance "
        "%{customdata[4]:.3f}<br>cosine %{customdata[3]:.3f}<br>q %{customdata[5]:.3f}<extra></extra>",
    )  # fmt: skip


def findings(frame: pd.DataFrame) -> list[str]:
    """The closest and the farthest pair, and how many pairs differ at all, in sentences."""
    noun = figures.noun(frame["by"].iloc[0])
    pooled = frame[frame["layer"].isna() & frame["js"].notna()]
    if pooled.empty:
        return [f"No two groups by {noun} used any expert."]
    distance = pooled["excess"] if pooled["excess"].notna().any() else pooled["js"]
    near, far = (pooled.iloc[at] for at in (np.nanargmin(distance), np.nanargmax(distance)))

    def said(row: pd.Series) -> str:
        chance = f", by chance {row['null']:.3f}" if np.isfinite(row["null"]) else ""
        return f"{row['group']} and {row['other']} (JS {row['js']:.3f}{chance}; cosine {row['cosine']:.2f})"

    if len(pooled) == 1:
        sentences = [f"Averaged over layers: {said(near)}."]
    else:
        sentences = [f"Averaged over layers, {said(near)} are routed most alike, {said(far)} least."]
    tested = pooled[pooled["q"].notna()]
    if len(tested):
        clear = int((tested["q"] < SIGNIFICANT).sum())
        sentences.append(
            f"{clear} of {len(tested)} pairs differ by more than chance (false-discovery rate {SIGNIFICANT:.0%})."
        )
    return sentences
