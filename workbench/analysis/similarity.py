"""How alike the experts of a layer are, by their weights: every pair, before and after matching neurons.

For two experts a and b of a layer, and each of their matrices (gate, up, down, and all of them together):

- **cosine** of the flattened matrices, −1 to 1. It compares neuron 1 with neuron 1, and their order is arbitrary unless
  the experts were copied from one dense block: a low value proves little.
- **mean cosine**: of the two averages over neurons (rows of gate and up, columns of down), which have no order.
- **matched cosine**: of the flattened matrices after b's neurons were put into the order that is most like a's
  (Hungarian algorithm on the cosines of neurons). For one matrix the order is the best for that matrix alone, as in the
  source; for `all` it is one order for all matrices, a neuron being its gate row, up row and down column: only this one
  leaves what b computes unchanged.
- **kendall**: Kendall's τ between that order and the given one. 1: the neurons were in the same order already, as in
  experts copied from one block; by chance 0 with a standard deviation of √(2(2n + 5) / 9n(n − 1)) for n neurons.
- **router cosine**: of the two rows of the router (gate embeddings).

Matching finds likeness between any two experts, also random ones. **chance** is the mean of a measure over pairs of the
layer in which the hidden dimensions of one expert were shuffled, alike for all its matrices: each expert keeps its own
structure and nothing they share is left; **chance matched high** is the 95th percentile of the matched cosine over
those pairs. Weights are not a sample, so the values have no interval.

Lo et al. 2025, A Closer Look into Mixture-of-Experts in Large Language Models, arXiv:2406.18219, §4.1. Their code
matches each matrix by itself, rounds the cosines to bfloat16 first, and reports no chance level.
"""

from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.stats import kendalltau

from workbench import figures
from workbench.errors import InputError
from workbench.neurons import best_order, cosines

MEASURES = {
    "cosine": "neurons as they are",
    "mean_cosine": "averages over neurons",
    "matched_cosine": "neurons matched",
}
COLOURS = {"gate": figures.COLOURS[1], "up": figures.COLOURS[2], "down": figures.COLOURS[3], "all": figures.COLOURS[0]}


def similarity(
    model: Any,
    *,
    layers: tuple[int, ...] | None = None,
    n_matched: int = 200,
    n_chance: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Cosines of every pair of experts of a layer, for each matrix and for all of them.

    model      what `workbench.load` returns, or a name for it
    layers     which routers; None: all
    n_matched  pairs of a layer whose neurons are matched, drawn at random where there are more; 0: none
    n_chance   pairs of a layer whose hidden dimensions are shuffled, for the chance level; 0: none

    Returns one row a layer × pair × matrix: layer, expert, other (expert < other), matrix (gate, up, down, all);
    cosine, mean_cosine, matched_cosine, kendall, router_cosine in [-1, 1]; chance_cosine, chance_mean_cosine,
    chance_matched, chance_matched_high of the layer's matrix; n_experts, n_neurons, n_chance. NaN: the matched columns
    of pairs that weren't drawn, cosines of an expert of zeros, chance where n_chance is 0. A layer of one expert has no
    pair and no row. InputError for experts whose weights can't be read, and layers that don't exist.

    Matching costs the cube of the number of neurons: about a second a pair at 1,024 neurons of width 2,048.
    """
    from workbench.experts import ALL, neurons, numbers, read

    if n_matched < 0 or n_chance < 0:
        raise InputError(f"n_matched is {n_matched} and n_chance {n_chance}; expected numbers of pairs, 0 for none.")
    tables = []
    for layer in chosen_layers(model, layers):
        weights = read(layer)
        random = np.random.default_rng([seed, layer.index])
        pairs = np.column_stack(np.triu_indices(weights.n_experts, 1))
        if not len(pairs):
            continue
        names = [*weights.matrices, ALL]
        whole, mean = expert_cosines(weights), mean_cosines(weights)
        router = numbers(weights.router).astype(float)
        router = cosines(router @ router.T)
        matched = np.full((len(pairs), len(names), 2), np.nan)
        drawn = np.sort(random.permutation(len(pairs))[:n_matched])
        for pair in drawn:
            first, second = (neurons(weights, int(expert)) for expert in pairs[pair])
            matched[pair] = match_matrices(first, second, len(names) - 1)[:, :2]
        chance = np.full((n_chance, len(names), 3), np.nan)
        for turn, pair in enumerate(random.integers(len(pairs), size=n_chance)):
            first, second = (neurons(weights, int(expert)) for expert in pairs[pair])
            shuffled = shuffle_width(second, len(names) - 1, random)
            chance[turn] = match_matrices(first, shuffled, len(names) - 1)[:, [2, 3, 0]]
        usual = np.nanmean(chance, axis=0) if n_chance else np.full((len(names), 3), np.nan)
        high = np.nanpercentile(chance[:, :, 2], 95, axis=0) if n_chance else np.full(len(names), np.nan)
        a, b = pairs.T
        for place, name in enumerate(names):
            tables.append(
                pd.DataFrame(
                    {
                        "layer": layer.index,
                        "expert": a,
                        "other": b,
                        "matrix": name,
                        "cosine": whole[name][a, b],
                        "mean_cosine": mean[name][a, b],
                        "matched_cosine": matched[:, place, 0],
                        "kendall": matched[:, place, 1],
                        "router_cosine": router[a, b],
                        "chance_cosine": usual[place, 0],
                        "chance_mean_cosine": usual[place, 1],
                        "chance_matched": usual[place, 2],
                        "chance_matched_high": high[place],
                        "n_experts": weights.n_experts,
                        "n_neurons": weights.n_neurons,
                        "n_chance": n_chance,
                    }
                )
            )
    if not tables:
        raise InputError(f"no layer of {loaded(model).name} that was asked for has two experts to compare.")
    return pd.concat(tables, ignore_index=True)


def loaded(model: Any) -> Any:
    """The model, if only its name was given."""
    from workbench.models import Model, load

    return model if isinstance(model, Model) else load(model)


def chosen_layers(model: Any, layers: tuple[int, ...] | None) -> list[Any]:
    """Those layers of a model; InputError for one that it hasn't."""
    found = loaded(model).layers
    for layer in layers or ():
        if not 0 <= layer < len(found):
            raise InputError(f"layer {layer} doesn't exist; the model has {len(found)} with experts, from 0 on.")
    return [layer for layer in found if layers is None or layer.index in layers]


def expert_cosines(weights: Any) -> dict[str, np.ndarray]:
    """Cosines of flattened experts, neurons as they are, for each matrix and for all: float64 (E, E)."""
    from workbench.experts import grams

    return {name: cosines(inner) for name, inner in grams(weights).items()}


def mean_cosines(weights: Any) -> dict[str, np.ndarray]:
    """Cosines of experts averaged over their neurons, for each matrix and for all: float64 (E, E)."""
    from workbench.experts import ALL, numbers

    averages = {
        name: np.array([numbers(expert).mean(axis=0, dtype=np.float64) for expert in matrix])
        for name, matrix in weights.matrices.items()
    }
    averages[ALL] = np.concatenate(list(averages.values()), axis=1)
    return {name: cosines(rows @ rows.T) for name, rows in averages.items()}


def match_matrices(first: np.ndarray, second: np.ndarray, n_matrices: int) -> np.ndarray:
    """Neurons of `second` matched with those of `first`, for each matrix and for all: float64 (n_matrices + 1, 4).

    first, second are float32 (n, n_matrices · H). The columns are the cosine after matching, Kendall's τ of the order,
    the cosine before, and the cosine of the averages over neurons.
    """
    parts = [np.split(rows, n_matrices, axis=1) for rows in (first, second)]
    inner = np.array([a @ b.T for a, b in zip(*parts, strict=True)], np.float64)
    squares = np.array([[(part * part).sum(axis=1, dtype=np.float64) for part in side] for side in parts])
    means = np.array([[part.mean(axis=0, dtype=np.float64) for part in side] for side in parts])
    inner = np.concatenate([inner, inner.sum(axis=0, keepdims=True)])
    squares = np.concatenate([squares, squares.sum(axis=1, keepdims=True)], axis=1)
    places = np.arange(len(first))
    found = np.full((n_matrices + 1, 4), np.nan)
    for at in range(n_matrices + 1):
        scale = np.sqrt(np.outer(squares[0, at], squares[1, at]))
        order = best_order(np.divide(inner[at], scale, out=np.zeros_like(scale), where=scale > 0))
        size = np.sqrt(squares[0, at].sum() * squares[1, at].sum())
        one, two = (side[at] if at < n_matrices else side.ravel() for side in means)
        if size > 0:
            found[at, [0, 2]] = inner[at, places, order].sum() / size, np.trace(inner[at]) / size
        found[at, 1] = kendalltau(order, places)[0] if len(places) > 1 else np.nan
        if (length := np.linalg.norm(one) * np.linalg.norm(two)) > 0:
            found[at, 3] = one @ two / length
    return found


def shuffle_width(rows: np.ndarray, n_matrices: int, random: np.random.Generator) -> np.ndarray:
    """The neurons with their hidden dimensions in another order, the same for all matrices."""
    order = random.permutation(rows.shape[1] // n_matrices)
    return rows.reshape(len(rows), n_matrices, -1)[:, :, order].reshape(rows.shape)


def figure(frame: pd.DataFrame) -> Figure:
    """Mean over pairs by layer, a line a matrix; shaded, the middle 80% of pairs (all matrices); dotted, chance."""
    chance = {"cosine": "chance_cosine", "mean_cosine": "chance_mean_cosine", "matched_cosine": "chance_matched"}
    result = figures.panels(list(MEASURES.values()), columns=3, height=300, legend=True)
    for panel, (measure, null) in enumerate(chance.items()):
        for matrix in (name for name in COLOURS if name in set(frame["matrix"])):
            by = frame[frame["matrix"] == matrix].groupby("layer")[measure]
            mean = by.mean()
            figures.line(
                result, mean.index, mean, by.quantile(0.1), by.quantile(0.9), name=matrix, panel=panel,
                style=figures.Style(COLOURS[matrix], "solid" if matrix == "all" else "dash"), band=matrix == "all",
                legend=panel == 0,
            )  # fmt: skip
        by_chance = frame[frame["matrix"] == "all"].groupby("layer")[null].first()
        figures.line(
            result, by_chance.index, by_chance, name="all, hidden dimensions shuffled", style=figures.NULL,
            panel=panel, legend=panel == 0,
        )  # fmt: skip
    figures.layer_axes(result, frame["layer"], sparse=True)
    result.update_xaxes(title="layer")
    result.update_layout(yaxis={"title": "cosine of two experts"})
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How alike experts are, which two most, and whether matching finds more than in shuffled ones."""
    whole = frame[frame["matrix"] == "all"]
    by_layer = whole.groupby("layer")[["cosine", "matched_cosine", "chance_matched"]].mean()
    known = whole[whole["cosine"].notna()]
    if known.empty:
        return ["No two experts have weights to compare."]
    top = known.iloc[known["cosine"].argmax()]
    sentences = [
        f"Two experts of a layer have a cosine of {whole['cosine'].mean():.3f} on average, neurons as they are; the "
        f"most alike are {top['expert']} and {top['other']} of layer {top['layer']} ({top['cosine']:.2f})."
    ]
    if by_layer[["matched_cosine", "chance_matched"]].notna().all(axis=None):
        above = (whole["matched_cosine"] > whole["chance_matched_high"])[whole["matched_cosine"].notna()].mean()
        sentences.append(
            f"With neurons matched it is {by_layer['matched_cosine'].mean():.3f}, against "
            f"{by_layer['chance_matched'].mean():.3f} where hidden dimensions were shuffled; {above:.0%} of pairs are "
            "above 95% of the shuffled ones."
        )
    return sentences
