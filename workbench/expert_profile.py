"""What one expert fires on: the token ids and the texts whose tokens chose it, against all tokens.

    index = token_index(trace)                       # once a trace
    fired = firings(trace, layer=3, expert=5)        # the tokens that chose it
    token_table(index, fired)                        # by token id
    group_table(trace, index, fired, "lang")         # by language, domain, any column, phase, position, token class

A token *fires* an expert if the expert is among those that its router chose, in any rank. With N tokens, C of which
fire the expert, n of which have a label (a token id, a language), and c of which do both:

- **share** = c / C, the label's part of what the expert fires on; **overall** = n / N, its part of all tokens.
- **rate** = c / n, the part of the label's tokens that fire the expert.
- **lift** = share / overall = rate / (C / N): 1 is what the expert does on all tokens together, 2 twice as often.

Intervals cover 95%. Those of groups are from bootstrap resamples of texts. Those of token ids are Wilson's, with as
many independent tokens as the id's tokens are worth: tokens of one text depend on each other, so **n_effective** is
less than their number (workbench.analysis.vocabulary has the formula). **q** is the false-discovery rate
(Benjamini–Hochberg over the ids of the table) of chance alone giving an id so many firing tokens, at the rate of all
tokens together.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy.special import betainc

from workbench import figures
from workbench.analysis.counting import Cells, cells_of_labels, experts_of, sum_by, text_codes, token_labels
from workbench.analysis.resampling import bootstrap_sums, q_values, text_interval
from workbench.analysis.token_means import MOST_BLOCKS, in_blocks, ratio
from workbench.analysis.vocabulary import frequent, texts_of_ids, wilson, worth
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.schema import UNKNOWN_TOKEN
from workbench.spelling import BYTE_NAME
from workbench.token_classes import CLASSES, token_class
from workbench.tracefile import Trace

CLASS = "token class"
"""A grouping that every trace with a vocabulary has: workbench.token_classes, from the text of the token alone."""


@dataclass(frozen=True)
class TokenIndex:
    """What all experts of a trace share: whose token each is. Tokens are in the order of `Trace.tokens`.

    sequences    as in `Trace.sequences`
    first        int64 (n_sequences,)  first token of each sequence
    of_sequence  int32 (n_tokens,)     row in sequences
    text         int64 (n_tokens,)     what resampling draws (see workbench.analysis.counting), numbered without gaps
    token_id     int32 (n_tokens,)     -1 unknown
    ids          int64 (n_ids,)        the ids that occur, ascending; n_tokens: int64 (n_ids,), how often
    code         int32 (n_tokens,)     place in ids, -1 unknown
    pairs        of ids and texts, as in workbench.analysis.vocabulary.texts_of_ids
    vocabulary   token id → text
    """

    sequences: pd.DataFrame
    first: np.ndarray
    of_sequence: np.ndarray
    text: np.ndarray
    token_id: np.ndarray
    ids: np.ndarray
    n_tokens: np.ndarray
    code: np.ndarray
    pairs: dict[str, np.ndarray]
    vocabulary: dict[int, str]

    @property
    def known(self) -> bool:
        """Whether the ids of tokens are known."""
        return len(self.ids) > 0

    def spelled(self, token_ids: Any) -> list[str | None]:
        """The vocabulary's text of each id, None where it has none."""
        return [self.vocabulary.get(int(token_id)) for token_id in token_ids]


def token_index(trace: Trace) -> TokenIndex:
    """Read the tokens of a trace: about 0.5 s for a million."""
    sequences, of_sequence = trace.sequences(), trace.sequence_index()
    lengths = np.bincount(of_sequence, minlength=len(sequences))
    token_id = trace.tokens()["token_id"].to_numpy(np.int32)
    text = np.unique(text_codes(sequences)[lengths > 0], return_inverse=True)[1]
    text = text[(np.cumsum(lengths > 0) - 1)[of_sequence]]
    if (token_id != UNKNOWN_TOKEN).any():
        ids, code, n_tokens = frequent(token_id, 1, None)
    else:
        ids, code, n_tokens = np.empty(0, np.int64), np.full(len(token_id), -1, np.int32), np.empty(0, np.int64)
    words = trace.vocabulary()
    return TokenIndex(
        sequences=sequences,
        first=np.cumsum(lengths) - lengths,
        of_sequence=of_sequence,
        text=text,
        token_id=token_id,
        ids=ids,
        n_tokens=n_tokens,
        code=code,
        pairs=texts_of_ids(code, text, len(ids)),
        vocabulary=dict(zip(words["token_id"].tolist(), words["text"].tolist(), strict=True)),
    )


def choices(trace: Trace, layer: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What a layer chose: experts uint16 (n_tokens, k), and weights float32 beside them, None if not recorded."""
    return trace.experts(layer), trace.weights(layer) if "weights" in trace.recorded else None


def firings(trace: Trace, layer: int, expert: int) -> pd.DataFrame:
    """The tokens that chose an expert, see `firings_among`. InputError for a layer or expert that isn't there."""
    if not 0 <= layer < trace.n_layers:
        raise InputError(f"layer {layer}: run {trace.run!r} has layers 0 to {trace.n_layers - 1}.")
    if not 0 <= expert < experts_of(trace, layer):
        raise InputError(f"expert {expert}: layer {layer} has experts 0 to {experts_of(trace, layer) - 1}.")
    return firings_among(*choices(trace, layer), expert)


def firings_among(experts: np.ndarray, weights: np.ndarray | None, expert: int) -> pd.DataFrame:
    """One row a token that chose the expert, in the order of tokens: token (its place among all tokens), rank (from 0,
    in the router's own order), weight (gate weight, NaN where weights were not recorded)."""
    token, rank = np.nonzero(experts == expert)
    weight = np.full(len(token), np.nan, np.float32) if weights is None else weights[token, rank]
    return pd.DataFrame({"token": token, "rank": rank, "weight": weight})


def summary(index: TokenIndex, fired: pd.DataFrame, experts: np.ndarray, n_experts: int, seed: int = 0) -> pd.Series:
    """The expert in numbers, each with its interval from resampling texts.

    Returns n_fired tokens and n_texts_fired texts, of n_tokens and n_texts; rate = n_fired / n_tokens with rate_low,
    rate_high; load, its share of the layer's assignments × n_experts (1: even), with load_low, load_high; mean_weight
    with mean_weight_low, mean_weight_high; max_weight; first, the part of n_fired where it was the first choice. NaN:
    what has nothing to be divided by, weights that were not recorded, intervals of a single text.
    """
    token, weight = fired["token"].to_numpy(), fired["weight"].to_numpy(float)
    n_texts = int(index.text.max(initial=-1)) + 1
    rows = np.column_stack(
        [
            np.bincount(index.text[token], minlength=n_texts),
            np.bincount(index.text, minlength=n_texts),
            np.bincount(index.text, (experts != NO_EXPERT).sum(axis=1), minlength=n_texts),
            np.bincount(index.text[token], np.nan_to_num(weight), minlength=n_texts),
        ]
    )
    block = np.random.default_rng(seed).permutation(n_texts) % MOST_BLOCKS
    drawn = bootstrap_sums(rows, block, np.zeros(n_texts, np.int64), 1, 1000, seed)[:, 0]
    known = not np.isnan(weight).any()

    def measures(sums: np.ndarray) -> dict[str, np.ndarray]:
        count, tokens, assignments, total = np.moveaxis(sums, -1, 0)
        mean = ratio(total, count) if known else np.full(count.shape, np.nan)
        return {"rate": ratio(count, tokens), "load": ratio(count, assignments) * n_experts, "mean_weight": mean}

    result: dict[str, Any] = {
        "n_fired": len(fired),
        "n_tokens": len(index.text),
        "n_texts_fired": len(np.unique(index.text[token])),
        "n_texts": n_texts,
    }
    resampled = measures(drawn)
    for name, value in measures(rows.sum(axis=0)).items():
        low, high = text_interval(resampled[name], n_texts)
        result |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    result["max_weight"] = weight.max() if len(fired) and known else np.nan
    result["first"] = (fired["rank"] == 0).mean() if len(fired) else np.nan
    return pd.Series(result)


def token_table(index: TokenIndex, fired: pd.DataFrame, *, minimum: int = 10) -> pd.DataFrame:
    """Which token ids fire the expert, the surest preference (largest lift_low) first.

    minimum  ids that occur less often among all tokens are left out: their rates mean little

    Returns one row a token id: token_id, text; count, n_tokens with the id; share, overall; rate with low, high; lift
    with lift_low, lift_high; q; mean_weight, max_weight (NaN where not recorded, or none fired); n_texts in which the
    id fired the expert; n_effective. Tokens of unknown id count nowhere. InputError where no id is known or occurs
    often enough.
    """
    if minimum < 1:
        raise InputError(f"minimum is {minimum}; expected at least 1.")
    if not index.known:
        raise InputError("the ids of the tokens are not known: this routing was recorded without its text.")
    kept = index.n_tokens >= minimum
    if not kept.any():
        raise InputError(f"no token id occurs {minimum} times; lower the minimum, or trace more text.")
    code = index.code[fired["token"].to_numpy()]
    counted = code >= 0
    n_ids, n_pairs = len(index.ids), len(index.pairs["id"])
    count = np.bincount(code[counted], minlength=n_ids)
    pair = index.pairs["of_token"][fired["token"].to_numpy()[counted]]
    hits = np.bincount(pair, minlength=n_pairs)
    base = counted.sum() / index.n_tokens.sum()
    rate = count / index.n_tokens
    n_effective = worth(hits, rate, index.n_tokens, index.pairs)
    low, high = wilson(rate, n_effective)
    n_hit = rate * n_effective
    chance = betainc(np.maximum(n_hit, 1e-12), np.maximum(n_effective - n_hit, 0) + 1, base)
    weight = fired["weight"].to_numpy(float)[counted]
    largest = np.full(n_ids, -np.inf)
    np.maximum.at(largest, code[counted], np.nan_to_num(weight))
    known = (count > 0) & ~np.isnan(weight).any()
    frame = pd.DataFrame(
        {
            "token_id": index.ids,
            "text": np.array(index.spelled(index.ids), object),
            "count": count,
            "n_tokens": index.n_tokens,
            "share": ratio(count, count.sum()),
            "overall": index.n_tokens / index.n_tokens.sum(),
            "rate": rate,
            "low": low,
            "high": high,
            "lift": ratio(rate, base),
            "lift_low": ratio(low, base),
            "lift_high": ratio(high, base),
            "p": np.where(count > 0, chance, 1.0),
            "mean_weight": ratio(np.bincount(code[counted], weight, minlength=n_ids), count),
            "max_weight": np.where(known, largest, np.nan),
            "n_texts": np.bincount(index.pairs["id"][hits > 0], minlength=n_ids),
            "n_effective": n_effective,
        }
    )[kept]
    frame.insert(list(frame).index("p"), "q", q_values(frame.pop("p").to_numpy()))
    return frame.sort_values(["lift_low", "count"], ascending=False, kind="stable", ignore_index=True)


def group_table(
    trace: Trace, index: TokenIndex, fired: pd.DataFrame, by: str, *, n_resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Which groups of tokens fire the expert, in the order of all figures.

    by  column of the sequences, `phase`, `position`, or `token class`

    Returns one row a group: by, group; count, n_tokens of the group; share with share_low, share_high; overall; rate;
    lift with low, high; n_texts; n_sequences that have tokens of the group. Tokens without a label count nowhere. NaN:
    what has nothing to be divided by, intervals of a single text.
    """
    token = fired["token"].to_numpy()
    cells, of_token = _cells(trace, index, by)
    labelled = of_token >= 0
    n_cells, n_groups = len(cells.group), len(cells.labels)
    rows = np.column_stack(
        [
            np.bincount(of_token[token][labelled[token]], minlength=n_cells),
            np.bincount(of_token[labelled], minlength=n_cells),
        ]
    )
    sums = sum_by(rows, cells.group, n_groups)
    n_texts = np.bincount(cells.group, minlength=n_groups)  # a cell is a text and a label
    n_drawn = len(np.unique(cells.text))
    few = in_blocks(cells, seed)
    if few is not cells:
        merged = few.of_token  # by the things that were given a cell: see _cells
        cell = np.full(n_cells, -1, np.int64)
        cell[cells.of_token[cells.of_token >= 0]] = merged[cells.of_token >= 0]
        rows = sum_by(rows, cell, len(few.group))
    drawn = bootstrap_sums(rows, few.text, few.group, n_groups, n_resamples, seed)

    def measures(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        both, n = sums[..., 0], sums[..., 1]
        total, everything = both.sum(axis=-1, keepdims=True), n.sum(axis=-1, keepdims=True)
        return ratio(both, total), ratio(ratio(both, n), ratio(total, everything))

    (share, lift), resampled = measures(sums), measures(drawn)
    share_low, share_high = text_interval(resampled[0], n_drawn)
    low, high = text_interval(resampled[1], n_texts)
    frame = pd.DataFrame(
        {
            "by": by,
            "group": cells.labels,
            "count": sums[:, 0].astype(np.int64),
            "n_tokens": sums[:, 1].astype(np.int64),
            "share": share,
            "share_low": share_low if n_drawn > 1 else np.nan,
            "share_high": share_high if n_drawn > 1 else np.nan,
            "overall": sums[:, 1] / max(sums[:, 1].sum(), 1),
            "rate": ratio(sums[:, 0], sums[:, 1]),
            "lift": lift,
            "low": low,
            "high": high,
            "n_texts": n_texts,
        }
    )
    if by not in index.sequences.columns:  # phases, positions and classes have an order of their own
        return frame
    return frame.set_index("group", drop=False).loc[figures.ordered(cells.labels)].reset_index(drop=True)


def groupings(index: TokenIndex, most: int = 256) -> list[str]:
    """What `group_table` can group by here: columns of two to `most` values, then phase, position and token class."""
    left_out = ("seq", "sha256", "n_prompt", "n_tokens", "segment_id")
    columns = [str(name) for name in index.sequences.columns if name not in left_out]
    varied = [name for name in columns if 2 <= index.sequences[name].dropna().astype(str).nunique() <= most]
    others = ["phase", "position", *([CLASS] if index.vocabulary and index.known else [])]
    return list(dict.fromkeys([*varied, *others]))


def group_labels(trace: Trace, index: TokenIndex, by: str) -> list[str]:
    """The groups that `group_table` would have, in its order."""
    labels = _cells(trace, index, by)[0].labels
    return figures.ordered(labels) if by in index.sequences.columns else labels


def _cells(trace: Trace, index: TokenIndex, by: str) -> tuple[Cells, np.ndarray]:
    """Cells (text × label) and the cell of each token, int (n_tokens,), -1 for none.

    Where the label is the sequence's, what is sorted into cells are the sequences: there are far fewer of them.
    """
    sequences = index.sequences
    if by in sequences.columns:
        rows = np.arange(len(sequences))
        label, labels = token_labels(trace, sequences, rows, by)
        cells = cells_of_labels(sequences, rows.astype(np.int32), label, labels)
        return cells, cells.of_token[index.of_sequence]
    if by == CLASS:
        label, labels = _classes(index)
    else:
        label, labels = token_labels(trace, sequences, index.of_sequence, by)
    cells = cells_of_labels(sequences, index.of_sequence, label, labels)
    return cells, cells.of_token


def _classes(index: TokenIndex) -> tuple[np.ndarray, list[str]]:
    """Class of each token, int64 (n_tokens,), -1 where its text is unknown, and the classes that occur."""
    texts = index.spelled(index.ids)
    named = ["byte" if text and BYTE_NAME.fullmatch(text) else token_class(text or "") for text in texts]
    of_id = np.array([CLASSES.index(name) if text is not None else -1 for name, text in zip(named, texts, strict=True)])
    if not (of_id >= 0).any():
        raise InputError("this trace has no vocabulary, so the classes of its tokens are not known.")
    used = np.unique(of_id[of_id >= 0])
    place = np.append(np.searchsorted(used, of_id), -1)  # the last one is for tokens of unknown id
    place[:-1][of_id < 0] = -1
    return place[index.code].astype(np.int64), [CLASSES[at] for at in used]


def group_figure(frame: pd.DataFrame, most: int = 40) -> Figure:
    """The lift of every group with its interval, on a logarithmic axis; of very many, those furthest from 1."""
    with np.errstate(divide="ignore"):
        far = np.abs(np.log(frame["lift"].to_numpy(float)))
    shown = frame
    if len(frame) > most:
        kept = np.sort(np.argsort(-np.nan_to_num(far, nan=-1, posinf=99), kind="stable")[:most])
        shown = frame.iloc[kept]
    hover = "%{y}<br>%{customdata[0]:.2f} × all tokens [%{customdata[1]:.2f}, %{customdata[2]:.2f}]<br>"
    hover += "%{customdata[3]:.1%} of what the expert fires on, %{customdata[4]:.1%} of all tokens"
    names = [figures.plain(group) for group in shown["group"]]
    result = _lifts(names, shown[["lift", "low", "high", "share", "overall"]].to_numpy(float), hover)
    return result.update_xaxes(title="lift: × as often as on all tokens")


def partner_figure(frame: pd.DataFrame, most: int = 15) -> Figure:
    """Of one expert's rows of `coactivation`: those it meets most above chance, with the interval of the lift."""
    shown = frame[frame["lift"].notna()].sort_values("lift_low", ascending=False).head(most)
    names = [f"expert {other}" for other in shown["other"]]
    hover = "%{y}<br>%{customdata[0]:.2f} × chance [%{customdata[1]:.2f}, %{customdata[2]:.2f}]<br>"
    hover += "on %{customdata[3]:.1%} of this expert's tokens, %{customdata[4]:,.0f} tokens"
    numbers = shown[["lift", "lift_low", "lift_high", "probability", "count"]].to_numpy(float)
    return _lifts(names, numbers, hover).update_xaxes(title="lift: × as often as their loads explain")


def _lifts(names: list[str], numbers: np.ndarray, hover: str) -> Figure:
    """Lifts with intervals on a logarithmic axis; numbers (n, …): lift, low, high and what else the hover text says."""
    floor = 2.0**-figures.REACH / 2
    lift, low, high = numbers[:, 0], numbers[:, 1], numbers[:, 2]
    at = np.maximum(lift, floor)  # a logarithm has no place for 0
    result = figures.panels([""], height=max((22 if len(names) <= 20 else 16) * len(names), 80))
    result.add_scatter(
        x=at, y=names, mode="markers", marker={"size": 8, "color": figures.MAIN.colour}, showlegend=False,
        error_x={
            "type": "data", "array": np.nan_to_num(high - at).clip(0), "thickness": 1.5, "width": 0,
            "arrayminus": np.nan_to_num(at - np.maximum(low, floor)).clip(0),
            "color": figures.faded(figures.MAIN.colour, 0.55),
        },
        customdata=numbers, hovertemplate=f"{hover}<extra></extra>",
    )  # fmt: skip
    result.add_vline(x=1, line={"color": figures.NULL.colour, "dash": "dot", "width": 1.5})
    steps = range(-4, 11)
    result.update_xaxes(
        type="log", tickvals=[2.0**step for step in steps],
        ticktext=[str(2**step) if step >= 0 else f"1/{2**-step}" for step in steps],
    )  # fmt: skip
    return result.update_yaxes(autorange="reversed", ticks="", tickmode="linear", dtick=1)
