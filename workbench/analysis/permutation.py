"""Which expert of one checkpoint is which of another: matched by their weights, layer by layer.

Experts of a layer can be put into any order (with the rows of the router), and so can the neurons of an expert, without
changing what the model computes. Two checkpoints are compared after undoing such reorderings:

- Experts are matched one to one so that the sum of their likeness is the largest possible (Hungarian algorithm).
  **Likeness** is the cosine of two experts' weights with neurons matched (`by=neurons`: finds experts whose neurons
  were reordered, too), with neurons as they are (`by=weights`: much faster, enough for checkpoints of one training
  run), or of their router rows (`by=router`).
- **matched**: the expert of the other checkpoint; **is same**: whether it has the same number.
- **likeness** of the matched pair, **same likeness** of the two experts with the same number, **other likeness**: the
  mean over all the other experts, which is what chance gives; all −1 to 1.
- **cosine** of the matched pair with neurons as they are, **aligned cosine** with neurons matched, **moved neurons**:
  the share of neurons whose best counterpart is at another place, 0 to 1.
- **layer share**: part of the layer's experts that are matched to their own number; by chance 1/E. **p**: how often a
  random permutation of E experts leaves at least as many in place (exact).

The checkpoints must have the same layers, experts and widths. Nothing here runs the model. After weight matching by
Ainsworth et al. 2023, Git Re-Basin, arXiv:2209.04836, §3.2, and the two-stage matching of experts and their neurons by
Tran et al. 2025, On Linear Mode Connectivity of Mixture-of-Experts Architectures, arXiv:2509.11348, whose losses on the
line between two matched models aren't measured here. What else changes nothing isn't undone: a vector added to all rows
of a softmax router (it moves `by=router`), rotations of the residual stream, reordered attention heads. So checkpoints
of two training runs from different seeds will hardly match.
"""

from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.special import gammaln

from workbench import figures
from workbench.analysis.similarity import chosen_layers, loaded
from workbench.errors import InputError
from workbench.neurons import best_order, cosine, match, unit

BY = ("neurons", "weights", "router")


def permutation(
    model: Any,
    *,
    other: Any = None,
    by: str = "neurons",
    layers: tuple[int, ...] | None = None,
) -> pd.DataFrame:
    """Match the experts of every layer with those of another checkpoint of the same architecture.

    model, other  what `workbench.load` returns, or names for it
    by            "neurons", "weights" or "router": what makes two experts alike
    layers        which routers; None: all

    Returns one row a layer × expert: layer, expert, matched, is_same; likeness, same_likeness, other_likeness; cosine,
    aligned_cosine, moved_neurons; layer_share, p; by, n_experts, n_neurons. NaN: likeness of an expert of zeros,
    other_likeness of a single expert. InputError if the two don't have the same sizes.

    `by=neurons` solves E² matchings a layer, each the cube of the number of neurons: seconds for small experts, tens of
    minutes a layer for 64 experts of 1,024 neurons.
    """
    from workbench.experts import neurons, read

    if other is None:
        raise InputError("permutation compares two checkpoints: name the other one, as in `--set other=demo-early`.")
    if by not in BY:
        raise InputError(f"by is {by!r}; expected one of {', '.join(BY)}.")
    first, second = loaded(model), loaded(other)
    if len(first.layers) != len(second.layers):
        raise InputError(
            f"{first.name} has {len(first.layers)} layers with experts, {second.name} {len(second.layers)}: "
            "expected two checkpoints of one architecture."
        )
    tables = []
    for layer in chosen_layers(first, layers):
        a, b = read(layer), read(second.layers[layer.index])
        if a.up.shape != b.up.shape or a.router.shape != b.router.shape or a.matrices.keys() != b.matrices.keys():
            raise InputError(
                f"layer {layer.index} has {a.n_experts} experts of {a.n_neurons} neurons in {first.name} and "
                f"{b.n_experts} of {b.n_neurons} in {second.name}: expected two checkpoints of one architecture."
            )
        alike = likeness(a, b, by)
        order = best_order(np.nan_to_num(alike))
        n_experts = a.n_experts
        places = np.arange(n_experts)
        matched = alike[places, order]
        rest = (np.nansum(alike, axis=1) - np.nan_to_num(matched)) / max(n_experts - 1, 1)
        cosines = np.full((n_experts, 3), np.nan)
        for expert, partner in enumerate(order):
            mine, theirs = neurons(a, expert), neurons(b, int(partner))
            moved = match(mine, theirs)
            apart = float((moved != np.arange(len(moved))).mean())
            cosines[expert] = cosine(mine, theirs), cosine(mine, theirs[moved]), apart
        n_same = int((order == places).sum())
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer.index,
                    "expert": places,
                    "matched": order,
                    "is_same": order == places,
                    "likeness": matched,
                    "same_likeness": np.diag(alike),
                    "other_likeness": rest if n_experts > 1 else np.nan,
                    "cosine": cosines[:, 0],
                    "aligned_cosine": cosines[:, 1],
                    "moved_neurons": cosines[:, 2],
                    "layer_share": n_same / n_experts,
                    "p": chance_in_place(n_experts, n_same),
                    "by": by,
                    "n_experts": n_experts,
                    "n_neurons": a.n_neurons,
                }
            )
        )
    if not tables:
        raise InputError(f"no layer of {first.name} was asked for; leave `layers` out for all.")
    return pd.concat(tables, ignore_index=True)


def likeness(first: Any, second: Any, by: str) -> np.ndarray:
    """Cosines of the experts of two layers: float64 (E, E'); NaN where one is zero."""
    from workbench.experts import ALL, grams, neurons, numbers

    if by == "router":
        rows, columns = numbers(first.router), numbers(second.router)
        found = (unit(rows) @ unit(columns).T).astype(np.float64)
        found[(rows == 0).all(axis=1)] = np.nan
        found[:, (columns == 0).all(axis=1)] = np.nan
        return found
    if by == "weights":
        lengths = [np.sqrt(np.diag(grams(weights)[ALL])) for weights in (first, second)]
        scale = np.outer(*lengths)
        return np.divide(grams(first, second)[ALL], scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    found = np.full((first.n_experts, second.n_experts), np.nan)
    for column in range(second.n_experts):
        theirs = neurons(second, column)
        for row in range(first.n_experts):
            mine = neurons(first, row)
            found[row, column] = cosine(mine, theirs[match(mine, theirs)])
    return found


def orders(frame: pd.DataFrame) -> list[np.ndarray]:
    """The table as permutations for `workbench.subset`: experts of the other checkpoint in the order of this one's."""
    return [part.sort_values("expert")["matched"].to_numpy() for _, part in frame.groupby("layer")]


def aligned(model: Any, other: Any, frame: pd.DataFrame) -> Any:
    """A copy of `other` whose experts and neurons are in the order of `model`'s; it computes what `other` computes.

    frame  what `permutation(model, other=other)` returned for all layers
    """
    from workbench.experts import neurons, read, reorder_neurons
    from workbench.subset import subset

    copy = subset(other, orders(frame))
    for mine, theirs in zip(model.layers, copy.layers, strict=True):
        a, b = read(mine), read(theirs)
        for expert in range(a.n_experts):
            reorder_neurons(b, expert, match(neurons(a, expert), neurons(b, expert)))
    return copy


def chance_in_place(n: int, at_least: int) -> float:
    """Probability that a random permutation of n leaves at least so many in place."""
    inverse_factorials = np.exp(-gammaln(np.arange(n + 1) + 1.0))
    deranged = np.cumsum(inverse_factorials * (-1.0) ** np.arange(n + 1))  # that none of 0, 1, …, n stays in place
    exactly = inverse_factorials * deranged[::-1]
    return float(np.clip(exactly[at_least:].sum(), 0, 1))


def figure(frame: pd.DataFrame) -> Figure:
    """Left, likeness by layer of matched experts, of the same numbers and of others; right, the share in place."""
    result = figures.panels(["likeness of experts", "matched to their own number"], columns=2, height=300, legend=True)
    by_layer = frame.groupby("layer")
    lines = {
        "matched": ("likeness", figures.MAIN),
        "same number": ("same_likeness", figures.Style(figures.COLOURS[1], "dash")),
        "all others (chance)": ("other_likeness", figures.NULL),
    }
    for name, (column, style) in lines.items():
        mean = by_layer[column].mean()
        figures.line(
            result, mean.index, mean, by_layer[column].min(), by_layer[column].max(), name=name, style=style,
            band=name == "matched",
        )  # fmt: skip
    share = by_layer["layer_share"].first()
    figures.line(result, share.index, share, name="share in place", panel=1, legend=False)
    even = 1 / by_layer["n_experts"].first()
    figures.line(result, even.index, even, name="by chance", style=figures.NULL, panel=1, legend=False)
    figures.layer_axes(result, frame["layer"], sparse=True)
    result.update_xaxes(title="layer")
    result.update_layout(
        yaxis={"title": "cosine"}, yaxis2={"title": "share of experts", "range": [-0.03, 1.03], "tickformat": ".0%"}
    )
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """How many experts are still where they were, and how much they changed, in sentences."""
    sentences = [
        f"{frame['is_same'].sum()} of {len(frame)} experts are matched to the expert of the same number in the other "
        f"checkpoint; {1 / frame['n_experts'].mean():.0%} would be by chance."
    ]
    if frame["likeness"].notna().any():
        sentences.append(
            f"Matched experts have a cosine of {frame['likeness'].mean():.2f} on average, other pairs "
            f"{frame['other_likeness'].mean():.2f}; in matched experts {frame['moved_neurons'].mean():.0%} of neurons "
            "have their counterpart at another place."
        )
    return sentences
