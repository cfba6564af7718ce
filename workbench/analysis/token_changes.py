"""For which token ids, or which texts, two runs over the same tokens choose other experts.

Both runs must be of one architecture, over the same texts with the same tokenizer, as for `agreement`; only tokens that
both have are counted. Of the tokens of one id (`per="id"`), or of one text (`per="text"`):

- **overlap**: mean of |S ∩ S'| / max(|S|, |S'|) over tokens and layers, 0 to 1, as in `agreement`.
- **differs_anywhere**: share of the tokens with S ≠ S' in at least one layer.
- **worst_layer**: the layer in which the overlap is smallest, **worst** being that overlap.
- **nll_difference** = nll' − nll, nats a token: above 0 where the other run predicts the token worse.

Compare the overlap with that of all tokens, and with what chance gives (`agreement`): an id whose experts changed
stands far below. Intervals cover 95% of bootstrap resamples of texts; a single text, and an id in a single text, has
none.

Source: ours.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.choice_overlap import choices
from workbench.analysis.counting import cells_of_labels
from workbench.analysis.matching import match, name_of, need_same_layers, other_run
from workbench.analysis.token_means import by_group, drawn_texts, in_blocks, means, only, ratio, sums
from workbench.errors import InputError
from workbench.schema import UNKNOWN_TOKEN
from workbench.spelling import pieces, spell
from workbench.tracefile import Trace

PER = ("id", "text")
MOST_NAMED = 30
"""Ids or texts that the figure names."""
FEW_TEXTS = 5
N_START = 16
"""Tokens of a text that its row begins with."""


def token_changes(
    trace: Trace,
    *,
    other: Trace | str | None = None,
    per: str = "id",
    minimum: int = 10,
    most: int = 2000,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far two runs route the tokens of each id, or of each text, alike.

    other        a Trace, the name of a run of the same file, the path of another file, or `path#run`; None: the other
                 run of a file that holds exactly two
    per          "id": a row a token id; "text": a row a sequence
    minimum      ids and texts with fewer tokens in both runs are left out
    most         at most so many, those with the most tokens
    n_resamples  bootstrap resamples of texts; 0 leaves the intervals NaN

    Returns one row an id or a text, the least overlap first: run, other, per, token_id or seq (the other is missing),
    text (of the id; of a text its beginning), lang, domain (of a text; missing of an id); overlap with low, high;
    differs_anywhere; worst_layer, worst; nll_difference with nll_low, nll_high (NaN where a run has no losses);
    n_tokens, n_texts; n_left_out ids or texts with too few tokens, or beyond `most`.

    Raises InputError if the runs can't be compared, share no token, or nothing has so many tokens.
    """
    if per not in PER:
        raise InputError(f"per is {per!r}; expected one of {', '.join(PER)}.")
    if minimum < 1 or most < 1:
        raise InputError(f"minimum is {minimum}, most {most}; expected at least 1.")
    other = other_run(trace, other)
    need_same_layers(trace, other)
    matched = match(trace, other)
    of_sequence, tokens = trace.sequence_index(), trace.tokens()
    key = tokens["token_id"].to_numpy(np.int64) if per == "id" else of_sequence.astype(np.int64)
    items, label, n_left_out = chosen(key, matched.first, minimum, most)
    kept = np.zeros(len(key), bool)
    kept[matched.first] = True
    cells = cells_of_labels(trace.sequences(), of_sequence, label, [str(item) for item in items])
    cells = in_blocks(only(cells, kept, of_sequence), seed)
    drawn = drawn_texts(cells, n_resamples, seed)
    aligned = replace(cells, of_token=cells.of_token[matched.first])

    total = number = np.zeros((len(cells.group), 1))
    worst, worst_layer = np.full(len(items), np.nan), np.full(len(items), -1)
    differs = np.zeros(len(matched.first))
    for layer in range(trace.n_layers):
        columns = choices(trace, other, layer, matched).columns
        differs[columns["exact_match"] == 0] = 1
        of_layer = sums([columns["overlap"]], aligned)
        value = ratio(*(by_group(part, aligned) for part in of_layer))[:, 0]
        lower = np.isfinite(value) & ~(worst <= value)
        worst, worst_layer = np.where(lower, value, worst), np.where(lower, layer, worst_layer)
        total, number = total + of_layer[0], number + of_layer[1]
    loss = [
        run.tokens()["nll"].to_numpy(np.float64)[at] for run, at in ((trace, matched.first), (other, matched.second))
    ]
    value, low, high = (part[:, 0] for part in means(total, number, aligned, drawn))
    nll, nll_low, nll_high = (part[:, 0] for part in means(*sums([loss[1] - loss[0]], aligned), aligned, drawn))
    differing, counted = (by_group(part, aligned)[:, 0] for part in sums([differs], aligned))
    frame = pd.DataFrame(
        {
            "run": trace.run, "other": name_of(other, trace), "per": per,
            **described(trace, items, per),
            "overlap": value, "low": low, "high": high,
            "differs_anywhere": ratio(differing, counted),
            "worst_layer": pd.array(worst_layer, dtype="Int64"), "worst": worst,
            "nll_difference": nll, "nll_low": nll_low, "nll_high": nll_high,
            "n_tokens": cells.n_tokens, "n_texts": cells.n_texts, "n_left_out": n_left_out,
        }
    )  # fmt: skip
    frame.loc[frame["worst_layer"] < 0, "worst_layer"] = pd.NA
    return frame.sort_values("overlap", kind="stable", na_position="last", ignore_index=True)


def chosen(key: np.ndarray, matched: np.ndarray, minimum: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The ids or sequences with enough matched tokens, ascending; the place of each token's among them (-1: none); how
    many were left out."""
    there = key[matched]
    found, number = np.unique(there[there != UNKNOWN_TOKEN], return_counts=True)
    enough = np.flatnonzero(number >= minimum)
    if not len(enough):
        raise InputError(
            f"nothing has {minimum:,} tokens in both runs"
            + (f": the most frequent has {number.max():,}. Give a smaller `minimum`." if len(number) else
               ", as the token ids are not known.")
        )  # fmt: skip
    enough = np.sort(enough[np.argsort(-number[enough], kind="stable")[:most]])
    items = found[enough]
    place = np.minimum(np.searchsorted(items, key), len(items) - 1)
    return items, np.where(items[place] == key, place, -1), len(found) - len(items)


def described(trace: Trace, items: np.ndarray, per: str) -> dict[str, object]:
    """token_id, seq, text, lang and domain of each row."""
    vocabulary = trace.vocabulary().set_index("token_id")["text"]
    if per == "id":
        nothing = pd.array([None] * len(items), dtype="object")
        return {
            "token_id": pd.array(items, dtype="Int64"), "seq": pd.array([pd.NA] * len(items), dtype="Int64"),
            "text": vocabulary.reindex(items).to_numpy(object), "lang": nothing, "domain": nothing,
        }  # fmt: skip
    sequences = trace.sequences().iloc[items]
    tokens = trace.tokens()
    begun = tokens[(tokens["pos"] < N_START) & tokens["seq"].isin(sequences["seq"])]
    start = begun["token_id"].map(vocabulary).fillna("").groupby(begun["seq"]).agg(beginning)
    return {
        "token_id": pd.array([pd.NA] * len(items), dtype="Int64"),
        "seq": pd.array(sequences["seq"].to_numpy(), dtype="Int64"),
        "text": start.reindex(sequences["seq"]).to_numpy(object),
        "lang": sequences["lang"].to_numpy(object), "domain": sequences["domain"].to_numpy(object),
    }  # fmt: skip


def beginning(entries: Iterable[str]) -> str:
    """The text of the first tokens of a sequence."""
    known = list(entries)
    return "".join(spell(known, [pieces(entry) for entry in known])[0])


def least(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that surely changed most: the smallest upper ends of the intervals first, where there are any.

    Ids in fewer than FEW_TEXTS texts come last: their intervals rest on next to nothing.
    """
    known = frame[frame["overlap"].notna()]
    upper = known["high"].fillna(np.inf) if known["high"].notna().any() else known["overlap"]
    few = (known["n_texts"] < FEW_TEXTS) & (known["per"] == "id")
    return known.assign(few=few, upper=upper).sort_values(["few", "upper"], kind="stable")[frame.columns]


def spelled(row: pd.Series) -> str:
    """An id or a text."""
    if row["per"] == "text":
        about = " ".join(str(row[name]) for name in ("lang", "domain") if isinstance(row[name], str))
        return f"text {row['seq']}" + (f" ({about})" if about else "")
    return (f"“{row['text']}” · " if isinstance(row["text"], str) else "") + f"id {row['token_id']}"


def figure(frame: pd.DataFrame) -> Figure:
    """How the overlaps are spread; below, the ids or texts that changed most, with their intervals."""
    noun = {"id": "token ids", "text": "texts"}[str(frame["per"].iloc[0])]
    top = least(frame).head(MOST_NAMED)
    result = figures.panels(["", ""], height=max(18 * len(top), 140))
    edges = np.linspace(0, 1, 41)
    number = np.histogram(frame["overlap"].dropna(), edges)[0]
    result.add_bar(
        x=(edges[:-1] + edges[1:]) / 2, y=number, width=edges[1] - edges[0], showlegend=False,
        marker={"color": figures.MAIN.colour, "line": {"width": 0}},
        customdata=np.column_stack([edges[:-1], edges[1:]]),
        hovertemplate="overlap %{customdata[0]:.1%} to %{customdata[1]:.1%}<br>%{y} " + noun + "<extra></extra>",
    )  # fmt: skip
    result.update_xaxes(range=[0, 1], tickformat=".0%", title="overlap of the experts of both runs", row=1, col=1)
    result.update_yaxes(title=noun, row=1, col=1)
    if len(top):
        names = [figures.plain(spelled(row)) for _, row in top.iterrows()]
        figures.dots(result, top["overlap"], names, top["low"], top["high"], panel=1)
    result.update_xaxes(title=f"overlap, {noun} that changed most", tickformat=".0%", row=2, col=1)
    result.update_yaxes(autorange="reversed", tickmode="linear", dtick=1, row=2, col=1)
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Which id or text changed most, and how the others lie, in sentences."""
    run, other, per = (frame[name].iloc[0] for name in ("run", "other", "per"))
    known = frame[frame["overlap"].notna()]
    nouns = {"id": "token ids", "text": "texts"}[per]
    if known.empty:
        return [f"Neither {run} nor {other} chose any expert for the tokens of these {nouns}."]
    if (known["overlap"] == 1).all():
        return [f"{run} and {other} choose the same experts for all tokens of these {len(known):,} {nouns}."]
    low, middle, high = known["overlap"].quantile([0.1, 0.5, 0.9])
    sentences = [
        f"Of {len(known):,} {nouns} the middle one keeps {middle:.1%} of its experts, a tenth at most {low:.1%}, a "
        f"tenth at least {high:.1%}."
    ]
    found = least(known)
    if len(found):
        row = found.iloc[0]
        between = f" [{row['low']:.1%}, {row['high']:.1%}]" if np.isfinite(row["low"]) else ""
        name = (
            f"“{row['text']}” (id {row['token_id']})" if per == "id" and isinstance(row["text"], str) else spelled(row)
        )
        sentences.append(
            f"What changed most is {name}: {row['overlap']:.1%}{between} of its experts are the same, "
            f"least in layer {row['worst_layer']} ({row['worst']:.1%}); {row['n_tokens']:,} tokens."
        )
    return sentences
