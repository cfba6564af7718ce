"""How far a token id alone decides which expert serves it: vocabulary specialisation.

For a token id x of a layer, over the tokens with that id:

- **value** = max over experts e of P(e | x), the part of the id's tokens that choose e: 1/E to 1 with one choice a
  token. By default only a token's first choice counts; `ranks=8` counts the first eight, `ranks=0` all (then even
  routing gives k/E). Muennighoff et al. 2024, OLMoE, §5.4; **expert** is the one that reaches the maximum.
- **ids**: the id is the token itself (`input`), the token that follows in the text (`gold`), or the one that the model
  would put next, the argmax of its logits (`predicted`, which must have been recorded).
- **chance** and **chance_high**: the value that an id with so many tokens reaches with no preference of its own, every
  token choosing experts as the layer's loads say: the median and the 95th percentile. Rare ids reach a high value by
  chance. **p** is how often chance reaches the value, **q** the false-discovery rate (Benjamini–Hochberg) over the
  table.
- **layer_value**: mean of the value over the ids of the layer, OLMoE's number, with an interval over texts (jackknife
  of 20 random parts of the texts); **layer_chance** the same of `chance`.

Tokens of one text depend on each other. So intervals (Wilson, 95%) and p count n_effective tokens: n / (1 + (m − 1)·ρ)
with m the mean number of tokens of the id in one text, weighted by tokens, and ρ how alike the choices of one id within
one text are (intraclass correlation, estimated over all ids of the layer). The null asks for a preference against the
whole layer: ids of one language differ from it because their language does.

Published code differs: OLMoE's average includes ids seen once, each with value 1 (`minimum=1` does so, here ids seen
less than 10 times are left out as in its tables), and its script labels the predicted and the gold curve the wrong way
round; we follow the paper. moe-lrc (Liang et al. 2025; ids seen 20 times) divides by assignments, so that with k
choices a token its values are ours divided by k.
"""

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.special import betainc
from scipy.stats import norm
from scipy.stats import t as student

from workbench import figures
from workbench.analysis.counting import experts_of, text_codes
from workbench.analysis.resampling import LEVEL, q_values
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace

IDS = ("input", "predicted", "gold")
SIGNIFICANT = 0.05
"""False-discovery rate below which findings call an id specialised."""
N_PARTS = 20
"""Parts of the texts that the jackknife leaves out in turn."""
GRID = 64
"""Numbers of tokens for which chance is computed; between them it is interpolated."""
MOST_NAMED = 6
"""Ids named in the figure, a layer."""


def vocabulary(
    trace: Trace,
    *,
    ids: str = "input",
    ranks: int = 1,
    minimum: int = 10,
    most: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The favourite expert of each token id in each layer.

    ids      "input": the id of the token; "gold": of the next token in its sequence; "predicted": the model's argmax
    ranks    how many of a token's choices count, from the first; 0: all
    minimum  ids that occur less often are left out (OLMoE 10, moe-lrc 20)
    most     only so many ids, the most frequent; None: all
    seed     of the parts of the jackknife

    Returns one row a layer × token id: ids, ranks, layer, token_id, text; expert, value with low, high; chance,
    chance_high; p, q; count (tokens that chose the expert); n_tokens and n_texts with the id, n_effective; n_experts;
    layer_value with layer_low, layer_high, layer_chance, n_ids. Ids whose tokens chose no expert in a layer have NaN.

    InputError for ranks below 0, minimum or most below 1, and if no id occurs `minimum` times.
    """
    if ranks < 0:
        raise InputError(f"ranks is {ranks}; expected how many of a token's choices count, 0 for all.")
    if minimum < 1 or (most is not None and most < 1):
        raise InputError(f"minimum is {minimum} and most {most}; expected at least 1.")
    token_id = ids_of_tokens(trace, ids)
    found, code, n_tokens = frequent(token_id, minimum, most)
    if not len(found):
        raise InputError(f"no token id occurs {minimum} times as {ids}; lower minimum, or trace more text.")
    text = text_codes(trace.sequences())[trace.sequence_index()]
    pairs = texts_of_ids(code, text, len(found))
    known = trace.vocabulary().set_index("token_id")["text"]
    part = np.random.default_rng(seed).integers(N_PARTS, size=int(text.max(initial=0)) + 1)[text]
    parts = [np.flatnonzero((part == number) & (code >= 0)) for number in range(N_PARTS)]
    tables = [layer_table(trace, layer, code, n_tokens, pairs, parts, ranks) for layer in range(trace.n_layers)]
    frame = pd.concat(tables, ignore_index=True)
    front = {
        "ids": ids,
        "ranks": ranks,
        "layer": np.repeat(np.arange(trace.n_layers), len(found)),
        "token_id": np.tile(found, trace.n_layers),
        "text": np.tile(known.reindex(found).to_numpy(object), trace.n_layers),
    }
    for place, (name, column) in enumerate(front.items()):
        frame.insert(place, name, column)
    frame.insert(list(frame).index("p") + 1, "q", q_values(frame["p"].to_numpy()))
    return frame


def ids_of_tokens(trace: Trace, ids: str) -> np.ndarray:
    """int (n_tokens,): the id that each token is counted under, UNKNOWN_TOKEN for none."""
    if ids not in IDS:
        raise InputError(f"ids is {ids!r}; expected one of {', '.join(IDS)}.")
    if ids == "predicted":
        return trace.predictions()
    tokens = trace.tokens()
    token_id = tokens["token_id"].to_numpy()
    if (token_id == UNKNOWN_TOKEN).all():
        raise InputError(
            f"run {trace.run!r} doesn't know its token ids: trace the corpus with `workbench trace`, or pass token_ids "
            "to from_arrays."
        )
    if ids == "input":
        return token_id
    seq = tokens["seq"].to_numpy()
    following = np.full(len(token_id), UNKNOWN_TOKEN, token_id.dtype)
    following[:-1] = np.where(seq[1:] == seq[:-1], token_id[1:], UNKNOWN_TOKEN)
    return following


def frequent(token_id: np.ndarray, minimum: int, most: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids that occur often enough, ascending; the place of each token's id among them (-1: none); their numbers."""
    number = np.bincount(token_id[token_id != UNKNOWN_TOKEN])
    found = np.flatnonzero(number >= minimum)
    if most is not None and len(found) > most:
        found = np.sort(found[np.argsort(-number[found], kind="stable")[:most]])
    place = np.full(len(number) + 1, -1, np.int32)  # the last one is for UNKNOWN_TOKEN, -1
    place[found] = np.arange(len(found))
    return found, place[token_id], number[found]


def texts_of_ids(code: np.ndarray, text: np.ndarray, n_ids: int) -> dict[str, np.ndarray]:
    """Which texts have which ids: of_token int (n_tokens,) numbers (id, text) pairs, -1 for tokens that don't count;
    id (n_pairs,); n_tokens (n_pairs,)."""
    kept = code >= 0
    key = code[kept].astype(np.int64) * (int(text.max(initial=0)) + 1) + text[kept]
    _, first, pair, size = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    of_token = np.full(len(code), -1, np.int64)
    of_token[kept] = pair
    owner = code[kept][first]
    return {"of_token": of_token, "id": owner, "size": size, "n_texts": np.bincount(owner, minlength=n_ids)}


def layer_table(
    trace: Trace,
    layer: int,
    code: np.ndarray,
    n_tokens: np.ndarray,
    pairs: dict[str, np.ndarray],
    parts: list[np.ndarray],
    ranks: int,
) -> pd.DataFrame:
    """All columns of one layer that come from its routing."""
    n_ids, n_experts = len(n_tokens), experts_of(trace, layer)
    experts = trace.experts(layer)
    experts = experts[:, : ranks or experts.shape[1]]
    kept = np.concatenate(parts)
    counts = choices(experts[kept], code[kept], n_ids, n_experts)
    used = counts.any(axis=1)
    expert = counts.argmax(axis=1)
    count = counts.max(axis=1, initial=0)
    value = np.where(used, count / n_tokens, np.nan)
    layer_value = value[used].mean() if used.any() else np.nan
    layer_low, layer_high = jackknife(layer_value, without(experts, code, parts, counts, n_tokens))
    load = choices(experts, np.zeros(len(experts), np.int32), 1, n_experts)[0] / max(len(experts), 1)
    n_effective = effective(experts, expert, value, n_tokens, code, pairs)
    low, high = wilson(value, n_effective)
    median, most_by_chance = chance(n_effective, load, (0.5, LEVEL))
    return pd.DataFrame(
        {
            "expert": np.where(used, expert, -1),
            "value": value,
            "low": low,
            "high": high,
            "chance": median,
            "chance_high": most_by_chance,
            "p": np.where(used, reached(value * n_effective, n_effective, load), np.nan),
            "count": count,
            "n_tokens": n_tokens,
            "n_texts": pairs["n_texts"],
            "n_effective": n_effective,
            "n_experts": n_experts,
            "layer_value": layer_value,
            "layer_low": layer_low,
            "layer_high": layer_high,
            "layer_chance": median[used].mean() if used.any() else np.nan,
            "n_ids": n_ids,
        }
    )


def without(
    experts: np.ndarray, code: np.ndarray, parts: list[np.ndarray], counts: np.ndarray, n_tokens: np.ndarray
) -> np.ndarray:
    """The layer's mean value without each part of the texts: (n_parts,), of the parts that have any token."""
    values = []
    for part in parts:
        if not len(part):
            continue
        left = counts - choices(experts[part], code[part], *counts.shape)
        n_left = n_tokens - np.bincount(code[part], minlength=len(n_tokens))
        used = left.any(axis=1)
        values.append((left[used].max(axis=1) / n_left[used]).mean() if used.any() else np.nan)
    return np.array(values)


def choices(experts: np.ndarray, code: np.ndarray, n_ids: int, n_experts: int) -> np.ndarray:
    """How often the tokens of each id chose each expert: int32 (n_ids, n_experts)."""
    total = np.zeros(n_ids * n_experts, np.int32)
    base = code.astype(np.int64) * n_experts
    for rank in range(experts.shape[1]):
        chosen = experts[:, rank]
        used = chosen != NO_EXPERT
        total += np.bincount(base[used] + chosen[used], minlength=len(total)).astype(np.int32)
    return total.reshape(n_ids, n_experts)


def effective(
    experts: np.ndarray,
    expert: np.ndarray,
    value: np.ndarray,
    n_tokens: np.ndarray,
    code: np.ndarray,
    pairs: dict[str, np.ndarray],
) -> np.ndarray:
    """Number of independent tokens that the tokens of each id are worth: float64 (n_ids,), 1 to n_tokens."""
    kept = np.flatnonzero(code >= 0)
    hit = (experts[kept] == expert[code[kept]][:, None].astype(experts.dtype)).any(axis=1)
    return worth(np.bincount(pairs["of_token"][kept][hit], minlength=len(pairs["id"])), value, n_tokens, pairs)


def worth(hits: np.ndarray, value: np.ndarray, n_tokens: np.ndarray, pairs: dict[str, np.ndarray]) -> np.ndarray:
    """`effective` where it is known how many tokens of each pair of id and text chose the id's expert: hits (n_pairs,).

    value (n_ids,) is their part of the id's tokens.
    """
    owner, size, n_texts = pairs["id"], pairs["size"], pairs["n_texts"]
    n_ids = len(n_tokens)
    rate = np.nan_to_num(value)
    spread = np.bincount(owner, (hits - rate[owner] * size) ** 2, minlength=n_ids)
    square = np.bincount(owner, size.astype(float) ** 2, minlength=n_ids)
    several = n_texts > 1
    variance = rate * (1 - rate)
    # The expected spread is variance · Σ size · (1 + (size - 1)·ρ), less what estimating the rate takes away.
    within = (spread * n_texts / np.maximum(n_texts - 1, 1) - variance * n_tokens)[several].sum()
    room = (variance * (square - n_tokens))[several].sum()
    correlation = float(np.clip(within / room, 0, 1)) if room > 0 else 0.0
    return n_tokens / (1 + (square / n_tokens - 1) * correlation)


def wilson(value: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's interval of a proportion among n independent tokens."""
    z = float(norm.ppf(0.5 + LEVEL / 2))
    middle = (value + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(value * (1 - value) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def jackknife(value: float, left_out: np.ndarray) -> tuple[float, float]:
    """Interval of a value from its values without each part of the texts; NaN with fewer than three parts."""
    known = left_out[np.isfinite(left_out)]
    if len(known) < 3 or not np.isfinite(value):
        return np.nan, np.nan
    error = np.sqrt((len(known) - 1) / len(known) * ((known - known.mean()) ** 2).sum())
    half = float(student.ppf(0.5 + LEVEL / 2, len(known) - 1)) * error
    return max(0.0, value - half), min(1.0, value + half)


def reached(count: np.ndarray, n: np.ndarray, load: np.ndarray) -> np.ndarray:
    """Probability that some expert is chosen by at least `count` of n tokens, each expert with its load as the
    probability: (n_ids,). Both may be broken numbers; experts are taken as independent."""
    none = np.zeros(len(n))
    for rate in load[load > 0]:
        tail = betainc(np.maximum(count, 1e-12), np.maximum(n - count, 0) + 1, min(rate, 1.0))
        with np.errstate(divide="ignore"):
            none += np.log1p(-tail)
    return -np.expm1(none)


def chance(n: np.ndarray, load: np.ndarray, levels: tuple[float, ...]) -> list[np.ndarray]:
    """The share that the busiest of all experts stays below in that many of all ids with n tokens, by bisection."""
    if not len(n) or not (load > 0).any():
        return [np.full(len(n), np.nan) for _ in levels]
    grid = np.unique(np.geomspace(n.min(), n.max(), GRID))
    found = []
    for level in levels:
        low, high = np.zeros(len(grid)), np.ones(len(grid))
        for _ in range(30):
            middle = (low + high) / 2
            above = reached(middle * grid, grid, load) > 1 - level
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        found.append(np.interp(np.log(n), np.log(grid), high))
    return found


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a layer: layer_value with layer_low, layer_high, layer_chance, n_ids, and specialised, the part of the
    ids whose value chance doesn't explain (q < 0.05)."""
    columns = ["layer_value", "layer_low", "layer_high", "layer_chance", "n_ids"]
    rows = frame.groupby("layer")[columns].first()
    rows["specialised"] = (frame["q"] < SIGNIFICANT).groupby(frame["layer"]).mean()
    return rows.reset_index()


def figure(frame: pd.DataFrame) -> Figure:
    """Mean value by layer above what chance gives; below, the ids that decide most about their expert."""
    rows = summary(frame)
    result = figures.panels(["", ""], height=300, legend=True)
    figures.line(
        result, rows["layer"], rows["layer_chance"], name="by chance, at the loads of the layer", style=figures.NULL,
        fill=True,
    )  # fmt: skip
    figures.line(
        result, rows["layer"], rows["layer_value"], rows["layer_low"], rows["layer_high"],
        name=f"mean over {rows['n_ids'].iloc[0]:,} ids ({frame['ids'].iloc[0]})", style=figures.MAIN,
    )  # fmt: skip
    figures.layer_axes(result, frame["layer"])
    result.update_yaxes(title="share of the favourite expert", rangemode="tozero", row=1, col=1)
    shown = strongest(frame)
    names = [
        f"{spelled(row['text'], row['token_id'])} → layer {row['layer']}, expert {row['expert']}"
        for row in shown.to_dict("records")
    ]
    figures.dots(result, shown["value"], names, shown["low"], shown["high"], panel=1)
    result.update_xaxes(title="share of the favourite expert", row=2, col=1, tickmode="auto", autorange=True)
    result.update_yaxes(autorange="reversed", tickmode="linear", dtick=1, row=2, col=1)
    return result


def spelled(text: str | None, token_id: int) -> str:
    """A token for a label, in quotes that show its spaces."""
    return f"id {token_id}" if not isinstance(text, str) else f"“{figures.plain(text)}”"


def strongest(frame: pd.DataFrame) -> pd.DataFrame:
    """The ids whose favourite is surest (largest lower end), at most once each, over all layers."""
    known = frame[frame["value"].notna()].sort_values(["low", "n_tokens"], ascending=False)
    return known.drop_duplicates("token_id").head(3 * MOST_NAMED)


def findings(frame: pd.DataFrame) -> list[str]:
    """Where ids decide most, against chance, and the surest id, in sentences."""
    rows = summary(frame)
    if rows["layer_value"].isna().all():
        return ["No token used any expert."]
    top = rows.iloc[rows["layer_value"].argmax()]
    least = rows.iloc[rows["layer_value"].argmin()]
    what = {"input": "token", "gold": "next token", "predicted": "predicted token"}[frame["ids"].iloc[0]]
    sentences = [
        f"The {what} alone decides most in layer {top['layer']:.0f}: on average {top['layer_value']:.0%} "
        f"[{top['layer_low']:.0%}, {top['layer_high']:.0%}] of an id's tokens go to its favourite expert, where chance "
        f"gives {top['layer_chance']:.0%}; least in layer {least['layer']:.0f} ({least['layer_value']:.0%}).",
        f"{rows['specialised'].mean():.0%} of ids × layers have a favourite that chance doesn't explain "
        f"(false-discovery rate {SIGNIFICANT:.0%}; {int(rows['n_ids'].iloc[0]):,} ids).",
    ]
    return sentences
