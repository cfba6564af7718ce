"""Texts of a trace by what they say and what is known of them, and where else a token occurs.

index = texts(trace)                     # 0.6 s for a million tokens; after that a search takes milliseconds
search(index, "law", lang="de")[0]       # a table: seq, snippet, …
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench import connection, spelling
from workbench.errors import InputError
from workbench.reading import visible
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace, matrix

BEFORE, AFTER = 40, 120
"""Characters of a snippet before and after the beginning of a match."""
NOT_SEARCHED = ("seq", "text", "folded", "sha256", "n_prompt", "n_tokens")
"""Columns that a search can't be narrowed by."""


def texts(trace: Trace) -> pd.DataFrame:
    """The table `sequences` with the columns `text`, what the tokens of each spell, and `folded`, that in one case.

    Metadata called like a column that a search adds gets the prefix `metadata_`.
    """
    spelled = ["".join(parts) for _, parts in spelling.texts(trace)]
    sequences = trace.sequences().rename(columns={name: f"metadata_{name}" for name in ("text", "folded", "snippet")})
    return sequences.assign(text=spelled, folded=[text.casefold() for text in spelled])


def search(
    index: pd.DataFrame, words: str = "", *, limit: int = 200, **where: object
) -> tuple[pd.DataFrame, list[int]]:
    """The texts that hold every one of the words, in order, at most `limit` of them, and `seq` of all there are.

    index   what `texts` returns
    words   looked for as they are, wherever they stand, whatever their case; "in quotes" a phrase. Empty: every text
    where   column=value, such as lang="de" or any metadata; None or "" is no condition

    Columns seq, snippet (with the first word, one line, every character visible), n_tokens, and those of lang, domain,
    source, segment_id and the metadata that the index has values of.
    Raises InputError for a column that there isn't, and a limit below 1.
    """
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 text.")
    chosen = np.ones(len(index), bool)
    for name, value in where.items():
        if name not in index or name in NOT_SEARCHED:
            known = ", ".join(str(column) for column in index if column not in NOT_SEARCHED)
            raise InputError(f"texts can't be searched by {name!r}; choose from {known}.")
        if value not in (None, ""):
            chosen &= (index[name].astype(str) == str(value)).to_numpy(bool) & index[name].notna().to_numpy()
    wanted = terms(words)
    rows = np.flatnonzero(chosen)
    if wanted:
        folded = index["folded"].to_numpy()
        rows = np.array([row for row in rows if all(term in folded[row] for term in wanted)], np.int64)
    found = index.iloc[rows[:limit]].reset_index(drop=True)
    result = found.drop(columns=["text", "folded", "sha256", "n_prompt"]).dropna(axis="columns", how="all")
    for name in ("seq", "n_tokens"):
        result[name] = found[name]
    result.insert(1, "snippet", [snippet(text, wanted[:1]) for text in found["text"]])
    return result, index["seq"].to_numpy()[rows].tolist()


def terms(words: str) -> list[str]:
    """The words and "quoted phrases" of a search, case-folded.

    >>> terms('Law "of the land" ')
    ['law', 'of the land']
    """
    parts = words.split('"')
    found = [term for at, part in enumerate(parts) for term in ([part] if at % 2 and part else part.split())]
    return [term.casefold() for term in found]


def snippet(text: str, wanted: Sequence[str] = ()) -> str:
    """The part of a text around the first of these words, or its beginning; on one line."""
    at = text.casefold().find(wanted[0]) if wanted else 0  # folding may lengthen a text: the place is about right
    start = max(at - BEFORE, 0)
    part = " ".join(text[start : at + AFTER].split())
    return f"{'… ' if start else ''}{visible(part)}{' …' if at + AFTER < len(text) else ''}"


def choices(index: pd.DataFrame, most: int = 1000) -> dict[str, list[str]]:
    """What a search can be narrowed by: the columns with 2 to `most` values, and these, the most frequent first."""
    found = {}
    for name in index.columns.difference(list(NOT_SEARCHED), sort=False):
        counts = index[name].dropna().astype(str).value_counts(sort=True)
        if 1 < len(counts) <= most:
            found[str(name)] = counts.index.tolist()
    return found


def occurrences(
    trace: Trace,
    index: pd.DataFrame,
    token_id: int,
    layer: int,
    *,
    besides: tuple[int, int] | None = None,
    limit: int = 50,
) -> tuple[pd.DataFrame, int]:
    """Where else a token occurs in the texts of `index`, at most `limit` places by seq and pos, and how many there are.

    besides  seq and pos of a place that is left out

    Columns seq, pos, before, token, after (what is written around it), lang, domain, experts (a list of int: those of
    the layer, by rank).
    """
    if not 0 <= layer < trace.n_layers:
        raise InputError(f"layer {layer}: run {trace.run!r} has layers 0 to {trace.n_layers - 1}.")
    with connection.reading(trace.path) as con:
        query = "SELECT seq, pos FROM tokens WHERE run = ? AND token_id = ? ORDER BY seq, pos"
        places = con.execute(query, [trace.run, int(token_id)]).df()
    places = places[places["seq"].isin(index["seq"])]
    if besides is not None:
        places = places[(places["seq"] != besides[0]) | (places["pos"] != besides[1])]
    n, places = len(places), places.head(limit).reset_index(drop=True)
    seqs = places["seq"].unique().tolist()
    if not seqs:
        return places.assign(before="", token="", after="", experts=None), 0
    given = [trace.run, seqs[0], seqs[-1], seqs]
    where = "run = ? AND seq BETWEEN ? AND ? AND seq IN (SELECT unnest(?))"
    with connection.reading(trace.path) as con:
        query = f"SELECT seq, pos, experts FROM routing WHERE {where} AND layer = ?"
        rows = con.sql(query, params=[*given, layer]).to_arrow_table()
    part = trace.only(seqs)
    spelled = dict(zip(sorted(seqs), (parts for _, parts in spelling.texts(part)), strict=True))
    at = {place: row for row, place in enumerate(zip(rows["seq"].to_pylist(), rows["pos"].to_pylist(), strict=True))}
    here = [at[place] for place in zip(places["seq"], places["pos"], strict=True)]
    experts = matrix(rows["experts"], int(trace.layers["top_k"].iloc[layer]), np.uint16, NO_EXPERT)[here]
    around = [(spelled[seq], pos) for seq, pos in zip(places["seq"], places["pos"], strict=True)]
    known = index.set_index("seq").loc[places["seq"], ["lang", "domain"]].reset_index(drop=True)
    places["before"] = [_line("".join(parts[max(pos - 20, 0) : pos])[-BEFORE:]) for parts, pos in around]
    places["token"] = [_line(parts[pos]) for parts, pos in around]
    places["after"] = [_line("".join(parts[pos + 1 : pos + 21])[:BEFORE]) for parts, pos in around]
    places = places.join(known)
    places["experts"] = [[int(expert) for expert in row if expert != NO_EXPERT] for row in experts]
    return places, n


def _line(text: str) -> str:
    """Every character visible, on one line."""
    return visible(text).replace("\n", "")
