"""How differently every two languages are routed on the texts they share: a matrix of divergences.

For two languages, over the texts that exist in both (same segment_id), in one layer:

- **divergence** = JSD(q_a, q_b) / (log E − ½(H(q_a) + H(q_b))), averaged over the texts: 0 routed alike, 1 disjoint and
  together even (two disjoint sharp ones stay below). q is the mean of a text's router probabilities; see alignment,
  where one language is the reference (Bandarkar et al. 2025, Multilingual Routing in Mixture-of-Experts).
- **frequency divergence**: the same from how often each expert was chosen, for traces without probabilities. It is
  larger, the more so the shorter the texts; don't compare the two.
- The rows without a layer are the **mean over layers**.

The intervals cover 95% of bootstrap resamples of texts, all languages and layers of a text drawn together. Pairs that
share few or other texts (n_texts) were compared on other content: between them only large differences mean anything.
The order of the figure comes from average-linkage clustering of the mean over layers.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench.analysis import clustering
from workbench.analysis.parallel import MEASURES, align, choose_measure, divergences, means, text_profiles
from workbench.analysis.resampling import draws, text_interval
from workbench.tracefile import Trace


def language_distance(
    trace: Trace, *, measure: str | None = None, by: str = "lang", n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Divergence of every two languages over the texts they share, layer by layer and over all layers.

    measure  `divergence` (needs recorded profiles) or `frequency_divergence`; None takes the first that is possible
    by       column that tells the parallel versions apart

    Returns one row a pair × layer, and one a pair with a missing layer, the mean over layers: measure, lang, other,
    layer; value in [0, 1] with low, high; n_texts compared, n_tokens of both in the texts they share; n_undefined
    texts left out (both uniform). Pairs that share no text are left out; values NaN where no text is left, intervals
    where there is only one.
    """
    measure = choose_measure(trace, measure)
    aligned = align(trace, by)
    there = aligned.cells >= 0
    used = aligned.cell >= 0
    of_cell = np.bincount(aligned.cell[used], aligned.n_tokens[used])
    tokens = np.where(there, of_cell[aligned.cells], 0.0)
    shared = there.T.astype(float) @ there
    both = tokens.T @ there
    first, second = np.triu_indices(len(aligned.languages), 1)
    kept = shared[first, second] > 0
    facts = {
        "lang": np.array(aligned.languages, object)[first[kept]],
        "other": np.array(aligned.languages, object)[second[kept]],
    }
    n_shared = shared[first, second][kept].astype(np.int64)
    n_tokens = (both + both.T)[first, second][kept].astype(np.int64)
    drawn = list(draws(len(aligned.cells), n_resamples, seed))
    tables, points, resamples = [], [], []
    for layer in range(trace.n_layers):
        profiles = text_profiles(trace, layer, aligned, measure)
        value, resampled, n_texts = pairwise(profiles, aligned.cells, drawn)
        points.append(value)
        resamples.append(resampled)
        tables.append(table(facts, layer, value[kept], resampled[:, kept], n_texts[kept], n_shared, n_tokens))
    n_texts = np.maximum.reduce([one["n_texts"].to_numpy() for one in tables])
    value, resampled = over_layers(points), over_layers(resamples)
    tables.append(table(facts, None, value[kept], resampled[:, kept], n_texts, n_shared, n_tokens))
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(0, "measure", measure)
    return frame


def pairwise(
    profiles: np.ndarray, cells: np.ndarray, drawn: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean divergence of each pair of languages (n_pairs,), in each resample (n_resamples, n_pairs), and the texts with
    a defined one (n_pairs,). Pairs as in numpy.triu_indices."""
    value, resampled, n_texts = [], [], []
    for first in range(cells.shape[1] - 1):
        values = divergences(profiles, cells[:, first:])
        value.append(means(values, np.ones((1, len(values)), np.float32))[0, :-1])
        chunks = [means(values, weights)[:, :-1] for weights in drawn]
        resampled.append(np.concatenate(chunks) if chunks else np.empty((0, values.shape[1])))
        n_texts.append(np.isfinite(values).sum(axis=0))
    return np.concatenate(value), np.concatenate(resampled, axis=1), np.concatenate(n_texts)


def over_layers(values: list[np.ndarray]) -> np.ndarray:
    """Mean over layers of what is defined; NaN where nothing is."""
    total, number = np.zeros(values[0].shape), np.zeros(values[0].shape)
    for one in values:
        known = np.isfinite(one)
        total += np.where(known, one, 0)
        number += known
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)


def table(
    facts: dict[str, np.ndarray],
    layer: int | None,
    value: np.ndarray,
    resampled: np.ndarray,
    n_texts: np.ndarray,
    n_shared: np.ndarray,
    n_tokens: np.ndarray,
) -> pd.DataFrame:
    """The rows of one layer, or of all of them."""
    low, high = text_interval(resampled, n_texts)
    return pd.DataFrame(
        {
            **facts,
            "layer": pd.array([layer] * len(value), dtype="Int64"),
            "value": value,
            "low": low,
            "high": high,
            "n_texts": n_texts,
            "n_tokens": n_tokens,
            "n_undefined": n_shared - n_texts,
        }
    )


def figure(frame: pd.DataFrame) -> Figure:
    """The mean over layers as a matrix, languages that are routed alike beside each other, and their tree."""
    pooled = frame[frame["layer"].isna()]
    labels, value = clustering.matrix(pooled, "lang", "other", "value")
    columns = ("low", "high", "n_texts")
    details = np.stack([clustering.matrix(pooled, "lang", "other", name)[1] for name in columns], axis=-1)
    return clustering.draw(
        labels, value, value, details, title=MEASURES[frame["measure"].iloc[0]],
        hover="%{y} and %{x}<br>%{z:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<br>"
        "%{customdata[2]} texts<extra></extra>",
    )  # fmt: skip


def findings(frame: pd.DataFrame) -> list[str]:
    """The closest and the farthest pair, and where in the model languages differ most, in sentences."""
    measure = MEASURES[frame["measure"].iloc[0]]
    pooled = frame[frame["layer"].isna() & frame["value"].notna()]
    if pooled.empty:
        return [f"No pair of languages has a defined {measure}."]
    fair = pooled[pooled["n_texts"] >= pooled["n_texts"].max() / 2]
    near, far = fair.loc[fair["value"].idxmin()], fair.loc[fair["value"].idxmax()]
    among = "" if len(fair) == len(pooled) else f", of the {len(fair)} pairs with most texts in common,"
    if len(fair) == 1:
        return [f"The {measure} of {near['lang']} and {near['other']} is {near['value']:.2f}, averaged over layers."]
    sentences = [
        f"Averaged over layers{among} {near['lang']} and {near['other']} are routed most alike ({measure} "
        f"{near['value']:.2f} [{near['low']:.2f}, {near['high']:.2f}]), {far['lang']} and {far['other']} least "
        f"({far['value']:.2f} [{far['low']:.2f}, {far['high']:.2f}]; 0 is alike, 1 the most unlike)."
    ]
    by_layer = frame[frame["layer"].notna()].groupby("layer")["value"].mean().dropna()
    if len(by_layer) > 1:
        sentences.append(
            f"The mean over all pairs is largest in layer {by_layer.idxmax()} ({by_layer.max():.2f}) and smallest in "
            f"layer {by_layer.idxmin()} ({by_layer.min():.2f})."
        )
    return sentences
