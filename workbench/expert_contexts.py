"""Where in the texts an expert fires: the tokens with the largest gate weight, or drawn at random, and what is around.

    index = token_index(trace)
    fired = firings(trace, layer=3, expert=5)
    contexts(index, fired, most=20, per_text=1)

The largest weights show an expert at its clearest; tokens drawn at random show what it usually does, which is often
less clear. At most a few tokens of one text are shown, so that no text fills the list.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.expert_profile import TokenIndex
from workbench.spelling import pieces, spell

ORDERS = ("weight", "random")
MARGIN = 4
"""Tokens beyond the window that are spelled, too: a character may begin or end there."""


def contexts(
    index: TokenIndex,
    fired: pd.DataFrame,
    *,
    most: int = 20,
    per_text: int | None = 1,
    per_token: int | None = None,
    order: str = "weight",
    token_id: int | None = None,
    sequences: np.ndarray | None = None,
    width: int = 24,
    seed: int = 0,
) -> pd.DataFrame:
    """Tokens that fire the expert, with the text around them.

    fired      as workbench.expert_profile.firings returns
    most       so many tokens
    per_text   at most so many of one text (its pieces and translations together); None: any number
    per_token  at most so many of one token id; None: any number
    order      "weight": the largest gate weights, equal ones in a random order; without recorded weights the first
               choices of the router; "random": drawn at random
    token_id   only tokens with this id
    sequences  bool (n_sequences,): only tokens of these; None: all
    width      tokens before and after
    seed       of the random order

    Returns one row a token: seq, pos, token_id; before, token, after (text; a token that is a piece of a character has
    its vocabulary entry); weight, rank (from 0); lang, domain, source; place among all tokens. It may be empty.
    """
    if order not in ORDERS:
        raise InputError(f"order is {order!r}; expected one of {', '.join(ORDERS)}.")
    if most < 1 or width < 0 or any(limit is not None and limit < 1 for limit in (per_text, per_token)):
        raise InputError(
            f"most is {most}, per_text {per_text}, per_token {per_token} and width {width}; expected at least 1, and "
            "for width at least 0."
        )
    token = fired["token"].to_numpy()
    kept = np.ones(len(token), bool)
    if token_id is not None:
        kept &= index.token_id[token] == token_id
    if sequences is not None:
        kept &= sequences[index.of_sequence[token]]
    chosen = fired[kept]
    chosen = chosen.iloc[np.random.default_rng(seed).permutation(len(chosen))]
    if order == "weight":
        weight, rank = chosen["weight"].to_numpy(float), chosen["rank"].to_numpy()
        chosen = chosen.iloc[np.lexsort((rank, -np.nan_to_num(weight)))]
    place = chosen["token"].to_numpy()
    first = _first(most, ((per_text, index.text[place]), (per_token, index.token_id[place])))
    chosen, place = chosen.iloc[first], place[first]
    row = index.of_sequence[place]
    around = [window(index, int(at), width) for at in place]
    columns: dict[str, Any] = {
        "seq": index.sequences["seq"].to_numpy()[row],
        "pos": place - index.first[row],
        "token_id": index.token_id[place],
        "before": ["".join(texts[: at - start]) for at, (start, texts) in zip(place, around, strict=True)],
        "token": [texts[at - start] for at, (start, texts) in zip(place, around, strict=True)],
        "after": ["".join(texts[at - start + 1 :]) for at, (start, texts) in zip(place, around, strict=True)],
        "weight": chosen["weight"].to_numpy(),
        "rank": chosen["rank"].to_numpy(),
    }
    for name in ("lang", "domain", "source"):
        columns[name] = index.sequences[name].to_numpy(object)[row]
    return pd.DataFrame({**columns, "place": place})


def _first(most: int, limits: Sequence[tuple[int | None, np.ndarray]]) -> list[int]:
    """The first `most` places at which no label (one array a limit) is taken more often than its limit allows."""
    seen = [Counter() for _ in limits]
    kept: list[int] = []
    for place, labels in enumerate(zip(*(labels.tolist() for _, labels in limits), strict=True)):
        if any(limit is not None and seen[at][labels[at]] >= limit for at, (limit, _) in enumerate(limits)):
            continue
        for at, label in enumerate(labels):
            seen[at][label] += 1
        kept.append(place)
        if len(kept) == most:
            break
    return kept


def window(index: TokenIndex, place: int, width: int) -> tuple[int, list[str]]:
    """First token and the texts of the tokens around one, within its sequence.

    A piece of a character that begins in an earlier token spells nothing; the token at `place` itself then has its
    vocabulary entry. A token of unknown id is `�`.
    """
    row = index.of_sequence[place]
    end_of_all = len(index.token_id)
    first = int(index.first[row])
    last = int(index.first[row + 1]) if row + 1 < len(index.first) else end_of_all
    start, end = max(first, place - width), min(last, place + width + 1)
    begin = max(first, start - MARGIN)
    ids = index.token_id[begin : min(last, end + MARGIN)]
    entries = [index.vocabulary.get(int(token_id), "\ufffd") for token_id in ids]
    spelled = spell(entries, [pieces(entry) for entry in entries])[0]
    at = place - begin
    spelled[at] = spelled[at] or entries[at]
    return start, spelled[start - begin : end - begin]


def excerpts(
    index: TokenIndex, fired: pd.DataFrame, found: pd.DataFrame, *, width: int = 24
) -> list[list[dict[str, Any]]]:
    """The contexts token by token, for a page: for each row of `contexts` a list of {text, weight, fires, here}.

    weight  gate weight of the expert at that token as a part of the largest of `fired`, 0 to 1 (1 where weights were
            not recorded); 0 where it doesn't fire
    """
    token = fired["token"].to_numpy()
    weight = fired["weight"].to_numpy(float)
    top = np.nanmax(weight, initial=0.0) if len(weight) and not np.isnan(weight).all() else 0.0
    result = []
    for place in found["place"].tolist():
        start, texts = window(index, place, width)
        low, high = np.searchsorted(token, [start, start + len(texts)])
        strength = {int(token[at]): float(weight[at] / top) if top > 0 else 1.0 for at in range(low, high)}
        result.append(
            [
                {
                    "text": text,
                    "weight": round(strength.get(start + at, 0.0), 3),
                    "fires": start + at in strength,
                    "here": start + at == place,
                }
                for at, text in enumerate(texts)
            ]
        )
    return result
