"""Which experts fire on the same tokens, or in the same texts, as one expert does; from the trace alone.

For an expert e and a label x of tokens (a token id, or a text), with C_e tokens that chose e, n_x tokens of the label
and N tokens in all, the expert's **taste** for x is how far its count is from what its load alone leads to, in units of
chance: (c_ex − C_e n_x / N) / √(C_e n_x / N), as in correspondence analysis (Greenacre 1984).

- **value** is the cosine of two experts' tastes: 1 where they prefer the same labels, −1 opposite ones, 0 where they
  have nothing to do with each other. The experts of one layer compete for tokens, so that 0 is a little much to expect
  there: without any structure the mean is about −1/(E − 1). Few tokens make tastes noisy and values small.
- **count** is the number of tokens that chose the other expert, **both** of those that chose both (same layer only).

The 95% interval is from leaving out 20 random parts of the texts in turn (jackknife).
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import add_choices, experts_of, text_codes
from workbench.analysis.pairs import chosen_layers, text_blocks
from workbench.analysis.vocabulary import N_PARTS, frequent, ids_of_tokens
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

LABELS = ("token", "text")
"""What experts are compared by."""
MOST_NAMED = 15
Z = 1.96


def similar_experts(
    trace: Trace,
    layer: int = 0,
    expert: int = 0,
    *,
    by: str = "token",
    layers: tuple[int, ...] | None = None,
    most: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How alike other experts are to one, by what they fire on.

    layer, expert  the expert
    by             "token": by token ids; "text": by texts (segments), more than `most` of them in random groups
    layers         where to look; None: in every layer
    most           labels to compare by: the most frequent ids, or groups of texts
    seed           of the parts and groups of texts

    Returns one row an other expert, the most alike first: by, layer, expert, other_layer, other; value in [-1, 1] with
    low, high; count; both (-1 in other layers); n_labels; n_tokens that have one of the labels; n_texts. NaN: an expert
    that no token chose, intervals of fewer than three texts.

    InputError for another `by`, fewer than 2 labels, and a layer or an expert that isn't there.
    """
    if by not in LABELS:
        raise InputError(f"by is {by!r}; expected one of {', '.join(LABELS)}.")
    if most < 2:
        raise InputError(f"most is {most}; expected at least 2 labels.")
    wanted = chosen_layers(trace, layers)
    chosen_layers(trace, (layer,))
    if not 0 <= expert < experts_of(trace, layer):
        raise InputError(f"expert {expert}: layer {layer} has experts 0 to {experts_of(trace, layer) - 1}.")
    label, n_labels = labels_of(trace, by, most, seed)
    blocks = text_blocks(trace, 1, seed)
    part = np.random.default_rng(seed).permutation(blocks.n_texts) % min(N_PARTS, max(blocks.n_texts, 1))
    n_parts = int(part.max(initial=0)) + 1
    kept = label >= 0
    row = np.where(kept, part[blocks.text] * n_labels + label, -1)
    n_tokens = np.bincount(row[kept], minlength=n_parts * n_labels).reshape(n_parts, n_labels).astype(float)
    own_ids = trace.experts(layer)
    own = counted(own_ids, row, n_parts, n_labels, experts_of(trace, layer))[..., expert]
    mine = (own_ids == expert).any(axis=1)
    tables = []
    for other_layer in wanted:
        n_experts = experts_of(trace, other_layer)
        ids = own_ids if other_layer == layer else trace.experts(other_layer)
        count = counted(ids, row, n_parts, n_labels, n_experts)
        whole = [each.sum(axis=0) for each in (own, count, n_tokens)]
        value = alike(*whole)
        without = np.array(
            [
                alike(*(total - each[leave] for total, each in zip(whole, (own, count, n_tokens), strict=True)))
                for leave in range(n_parts if n_parts > 2 else 0)
            ]
        ).reshape(-1, n_experts)
        half = jackknife_half(without)
        both = np.full(n_experts, -1)
        if other_layer == layer:
            together = ids[mine]
            both = np.bincount(together[together != NO_EXPERT], minlength=n_experts)
        tables.append(
            pd.DataFrame(
                {
                    "by": by,
                    "layer": layer,
                    "expert": expert,
                    "other_layer": other_layer,
                    "other": np.arange(n_experts),
                    "value": value,
                    "low": np.maximum(value - half, -1),
                    "high": np.minimum(value + half, 1),
                    "count": count.sum(axis=(0, 1)).astype(np.int64),
                    "both": both,
                    "n_labels": n_labels,
                    "n_tokens": int(kept.sum()),
                    "n_texts": blocks.n_texts,
                }
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame = frame[(frame["other_layer"] != layer) | (frame["other"] != expert)]
    return frame.sort_values("value", ascending=False, kind="stable", ignore_index=True)


def labels_of(trace: Trace, by: str, most: int, seed: int) -> tuple[np.ndarray, int]:
    """The label of each token, int64 (n_tokens,), -1 for none, and how many labels there are."""
    if by == "token":
        found, code, _ = frequent(ids_of_tokens(trace, "input"), 1, most)
        return code.astype(np.int64), len(found)
    text = text_codes(trace.sequences())[trace.sequence_index()]
    texts, of_token = np.unique(text, return_inverse=True)
    group = np.random.default_rng(seed).permutation(len(texts)) % most
    return group[of_token].astype(np.int64), min(len(texts), most)


def counted(experts: np.ndarray, row: np.ndarray, n_parts: int, n_labels: int, n_experts: int) -> np.ndarray:
    """Tokens of each part and label that chose each expert: float64 (n_parts, n_labels, E)."""
    total = np.zeros((n_parts * n_labels, n_experts))
    add_choices(experts, row, total)
    return total.reshape(n_parts, n_labels, n_experts)


def alike(own: np.ndarray, count: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """Cosine of the taste of one expert, own (n_labels,), with those of others, count (n_labels, E): float64 (E,)."""
    mine, others = taste(own[:, None], n_tokens), taste(count, n_tokens)
    length = np.sqrt((mine**2).sum() * (others**2).sum(axis=0))
    inner = (mine * others).sum(axis=0)
    return np.divide(inner, length, out=np.full(len(inner), np.nan), where=length > 1e-12)


def taste(count: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
    """(n_labels, E): counts against what the loads lead to, in units of chance; 0 for a label without tokens."""
    total = n_tokens.sum()
    expected = np.outer(n_tokens, count.sum(axis=0)) / max(total, 1)
    return np.divide(count - expected, np.sqrt(expected), out=np.zeros(count.shape), where=expected > 0)


def jackknife_half(without: np.ndarray) -> np.ndarray:
    """Half of the interval from values without each part, (n_parts, E); NaN where there are none."""
    n = len(without)
    if n < 3:
        return np.full(without.shape[1], np.nan)
    return Z * np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))


def figure(frame: pd.DataFrame) -> Figure:
    """The experts that are most alike, with their intervals."""
    shown = frame[frame["value"].notna()].head(MOST_NAMED)
    names = [f"layer {row['other_layer']}, expert {row['other']}" for row in shown.to_dict("records")]
    result = figures.panels([""], height=max(22 * len(shown), 80))
    figures.dots(result, shown["value"], names, shown["low"], shown["high"])
    result.update_xaxes(title="cosine of what they fire on")
    result.update_yaxes(autorange="reversed", ticks="", tickmode="linear", dtick=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The expert most like this one, in a sentence."""
    known = frame[frame["value"].notna()]
    if known.empty:
        return ["There is no other expert that any token chose, or this one was never chosen."]
    top = known.iloc[0]
    what = {"token": "the same tokens", "text": "the same texts"}[top["by"]]
    return [
        f"Most like expert {top['expert']} of layer {top['layer']} in firing on {what} is expert {top['other']} of "
        f"layer {top['other_layer']}: cosine {top['value']:.2f} [{top['low']:.2f}, {top['high']:.2f}]."
    ]
