"""What the model loses without an expert: its loss on texts when the expert's contribution is dropped.

**ΔNLL** of an expert is the loss without it minus the plain loss, in nats a predicted token, over all texts: positive
where the expert helps, negative where the model would predict better without it. The expert is dropped after the
selection: where the router chose it, its gate weight becomes 0 and no other expert takes its place; everything behind
that layer is computed anew. With `renormalise`, the token's other weights are scaled up so that their sum stays what it
was; without, the layer adds less to the residual stream. The two answer different questions: without, an expert also
counts for its share of the weights.

**ΔNLL where used** averages over the predictions made at the tokens that used the expert. It says what the expert is
worth to its own tokens, however few; ΔNLL itself is also proportional to how often the expert is used. Both hold what
earlier tokens lost, through attention.

- Every number is paired: the same texts, the same tokens, with and without. Intervals cover 95% of bootstrap resamples
  of texts (of segments, where texts are translations of each other).
- **p** is a two-sided sign-flip test over texts (the sign of each text's change is flipped at random); **q** its
  false-discovery rate over all experts tested. An expert that no text used has ΔNLL 0 and no p.
- Experts are dropped one at a time. The losses don't add up over experts: two experts can stand in for each other.
- Numbers far below the rounding of the model's dtype are noise: in bfloat16, a loss a token is good to about 0.01.

Ablating one expert at a time to rank experts is as old as pruning them: Lu et al. 2024, Not All Experts are Equal
(arXiv:2402.14800, section 3.1), who measure the layer's output instead of the loss, for which no paper gives intervals.
"""

from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.counting import text_codes
from workbench.analysis.resampling import draws, q_values, text_interval
from workbench.analysis.similarity import chosen_layers, loaded
from workbench.errors import InputError

SIGNIFICANT = 0.05
"""False-discovery rate below which an expert's effect counts as one."""
FLIPS_AT_ONCE = 1000


def sensitivity(
    model: Any,
    *,
    corpus: str = "demo",
    layers: tuple[int, ...] | None = None,
    experts: tuple[int, ...] | None = None,
    renormalise: bool = False,
    max_tokens: int = 8192,
    max_length: int | None = 128,
    batch_tokens: int = 4096,
    n_resamples: int = 1000,
    n_permutations: int = 10000,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Loss on a corpus with each expert dropped, one at a time, against the loss of the whole model.

    model           what `workbench.load` returns, or a name for it; it is left as it was, whatever happens
    corpus          a bundled name, a path, or what `workbench.corpus.read` returns
    layers          which routers; None: all. experts: which of their experts; None: all
    renormalise     scale a token's other weights up, so that their sum stays what it was
    max_tokens      texts are read until they have this many tokens, each cut after max_length of them (None: what the
                    model allows): many short texts tell more than a few long ones
    batch_tokens    padded tokens in one forward pass, at most
    n_resamples     bootstrap resamples of texts; n_permutations: sign flips. 0 leaves the intervals, or p and q, NaN

    Takes about (experts × texts that use them × layers behind the layer) forward passes of a text.

    Returns one row a layer × expert: layer, expert; delta (nats a predicted token) with low, high; p, q; delta_used
    with low_used, high_used (NaN where no token used the expert); n_used (tokens that used it), n_texts_used;
    nll (of the whole model, nats a token); n_predictions, n_tokens, n_texts; n_experts, renormalised.
    InputError for families whose experts can't be dropped, or that don't predict the next token, and for layers or
    experts that don't exist.
    """
    from tqdm.auto import tqdm

    from workbench.ablation import ablate, check
    from workbench.capture import read_texts

    model = loaded(model)
    check(model)
    chosen = chosen_layers(model, layers)
    _check(chosen, experts, max_tokens, batch_tokens)
    texts = read_texts(model, corpus, max_tokens=max_tokens, max_length=max_length, long_texts="cut")
    code = text_codes(pd.DataFrame({"segment_id": [text.segment_id for text in texts]}))
    n_texts = int(code.max()) + 1

    places = {layer.index: place for place, layer in enumerate(chosen)}
    most = max(layer.n_experts for layer in chosen)
    change, change_used, n_used, n_counted = np.zeros((4, len(chosen), most, n_texts))

    def show(share: float) -> None:
        bar.update(share - bar.n)

    with tqdm(total=1.0, desc="dropping experts", disable=None if progress else True, leave=False,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]") as bar:  # fmt: skip
        loss, predictions, drops = ablate(
            model, texts, chosen, experts=experts, renormalise=renormalise, batch_tokens=batch_tokens,
            done=show,
        )  # fmt: skip
        for drop in drops:
            where = places[drop.layer], drop.expert
            for total, values in (
                (change, drop.change), (change_used, drop.change_used), (n_used, drop.n_used),
                (n_counted, drop.n_used_predicting),
            ):  # fmt: skip
                np.add.at(total[where], code[drop.places], values)

    predicted = np.bincount(code, predictions, minlength=n_texts)
    if not predicted.sum():
        raise InputError(f"no text of {corpus} has a second token to predict: give a corpus with longer texts.")
    tables = []
    for layer in chosen:
        kept = np.arange(layer.n_experts) if experts is None else np.unique(experts)
        where = places[layer.index], kept
        summed = change[where], change_used[where], n_counted[where]
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer.index,
                    "expert": kept,
                    **_effect(*summed, predicted, n_resamples, seed),
                    "p": _flip(summed[0], n_permutations, seed),
                    "n_used": n_used[where].sum(1).astype(np.int64),
                    "n_texts_used": (n_used[where] > 0).sum(1),
                    "nll": loss.sum() / predicted.sum(),
                    "n_predictions": int(predicted.sum()),
                    "n_tokens": sum(len(text.token_ids) for text in texts),
                    "n_texts": n_texts,
                    "n_experts": layer.n_experts,
                    "renormalised": renormalise,
                }
            )
        )
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(frame.columns.get_loc("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def _check(layers: list[Any], experts: tuple[int, ...] | None, max_tokens: int, batch_tokens: int) -> None:
    if not layers or (experts is not None and not experts):
        raise InputError("no layer or no expert to drop: name some, or leave `layers` and `experts` out for all.")
    for layer in layers:
        if wrong := [expert for expert in experts or () if not 0 <= expert < layer.n_experts]:
            raise InputError(
                f"expert {wrong[0]} doesn't exist in layer {layer.index}, which has 0 to {layer.n_experts - 1}."
            )
    if max_tokens < 2 or batch_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens} and batch_tokens {batch_tokens}; expected at least 2 and 1.")


def _effect(
    change: np.ndarray, change_used: np.ndarray, used: np.ndarray, predicted: np.ndarray, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Means with intervals, each (E,); the arguments are (E, n_texts), `predicted` (n_texts,)."""
    n_experts, n_texts = change.shape
    resampled, resampled_used = np.full((2, n_resamples, n_experts), np.nan)
    start = 0
    for drawn in draws(n_texts, n_resamples, seed):
        part = slice(start, start + len(drawn))
        drawn = drawn.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled[part] = (drawn @ change.T) / (drawn @ predicted)[:, None]
            resampled_used[part] = (drawn @ change_used.T) / (drawn @ used.T)
        start += len(drawn)
    low, high = text_interval(resampled, n_texts)
    low_used, high_used = text_interval(resampled_used, (used > 0).sum(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        delta_used = change_used.sum(1) / used.sum(1)
    return {
        "delta": change.sum(1) / predicted.sum(), "low": low, "high": high,
        "delta_used": delta_used, "low_used": low_used, "high_used": high_used,
    }  # fmt: skip


def _flip(change: np.ndarray, n_permutations: int, seed: int) -> np.ndarray:
    """Two-sided p (E,) of the sum of each row of (E, n_texts), under random signs of the texts; NaN where all is 0."""
    found = np.abs(change.sum(1))
    random = np.random.default_rng(seed)
    at_least = np.zeros(len(change))
    for start in range(0, n_permutations, FLIPS_AT_ONCE):
        size = min(FLIPS_AT_ONCE, n_permutations - start), change.shape[1]
        signs = random.integers(0, 2, size=size, dtype=np.int8) * 2.0 - 1
        # A tie is one, whatever the order in which the texts were summed.
        at_least += (np.abs(signs @ change.T) >= found * (1 - 1e-12)).sum(0)
    p = (1 + at_least) / (n_permutations + 1)
    return np.where((change == 0).all(1) | (n_permutations < 1), np.nan, p)


def figure(frame: pd.DataFrame) -> Figure:
    """A row a layer, a column an expert, in the order of what it is worth; significant effects have a dot."""
    ranked = [part.sort_values("delta", ascending=False, ignore_index=True) for _, part in frame.groupby("layer")]
    width = max(len(part) for part in ranked)
    names = [f"layer {part['layer'].iloc[0]}" for part in ranked]

    def grid(column: str) -> np.ndarray:
        rows = [part[column].to_numpy(float) for part in ranked]
        return np.array([np.pad(row, (0, width - len(row)), constant_values=np.nan) for row in rows])

    delta = grid("delta")
    reach = float(np.nanquantile(np.abs(delta), 0.98)) or float(np.nanmax(np.abs(delta)))
    details = ("expert", "delta", "low", "high", "delta_used", "n_used", "n_texts_used", "q")
    result = figures.panels([""], height=max(26 * len(names), 160))
    result.add_trace(
        figures.differences(
            delta,
            x=list(range(1, width + 1)),
            y=names,
            hover="%{y}, expert %{customdata[0]:.0f}<br>ΔNLL %{customdata[1]:+.4f} nats a token "
            "[%{customdata[2]:+.4f}, %{customdata[3]:+.4f}], q %{customdata[7]:.3f}<br>where used "
            "%{customdata[4]:+.4f}: %{customdata[5]:,.0f} tokens of %{customdata[6]:,.0f} texts<extra></extra>",
            details=np.stack([grid(name) for name in details], axis=-1),
        )
    )
    row, place = np.nonzero(grid("q") < SIGNIFICANT)
    result.add_scatter(
        x=place + 1, y=np.array(names)[row], mode="markers", hoverinfo="skip", showlegend=False,
        marker={"color": figures.INK, "size": 4, "line": {"color": "white", "width": 0.5}},
    )  # fmt: skip
    figures.difference_scale(result, "ΔNLL, nats", reach)
    result.update_xaxes(
        title="experts of each layer, the most needed first (a dot: q < 0.05)", showgrid=False, range=[0.5, width + 0.5]
    )
    result.update_yaxes(autorange="reversed", showgrid=False)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """The expert that matters most, how many matter at all, and in which layer, in sentences."""
    used = frame[frame["n_used"] > 0]
    if used.empty:
        return ["No text used any of these experts."]
    top = used.iloc[int(used["delta"].argmax())]
    rise = "" if np.isnan(top["low"]) else f" [{top['low']:+.4f}, {top['high']:+.4f}]"
    sentences = [
        f"Expert {top['expert']} of layer {top['layer']} is missed most: without it the loss of {top['nll']:.3f} nats "
        f"a token changes by {top['delta']:+.4f}{rise}, and by {top['delta_used']:+.3f} at the {top['n_used']:,} "
        "tokens that use it."
    ]
    tested = used[used["q"].notna()]
    if len(tested):
        certain = tested.loc[tested["q"] < SIGNIFICANT, "delta"]
        helpful, harmful = int((certain > 0).sum()), int((certain < 0).sum())
        sentences.append(
            f"{helpful} of {len(frame)} experts measurably help on {top['n_texts']:,} texts (q < {SIGNIFICANT}), "
            f"{harmful} measurably hurt; {len(frame) - len(used)} were never used."
        )
    if frame["layer"].nunique() > 1:
        total = frame.groupby("layer")["delta"].mean()
        sentences.append(
            f"An expert is worth most in layer {total.idxmax()} ({total.max():+.4f} nats a token on average) and least "
            f"in layer {total.idxmin()} ({total.min():+.4f})."
        )
    return sentences
