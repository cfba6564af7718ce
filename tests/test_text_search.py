"""Search of texts and occurrences of tokens against plain loops over what the tokens spell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import routed

from workbench import spelling, text_search
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

WORDS = ["The", " law", " of", " the", " LAND", "Stra", "ße", " \u200b", "\n", " law", "yer"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    random = np.random.default_rng(3)
    lengths = random.integers(0, 9, 40)
    seq = np.repeat(np.arange(40), lengths)
    rows = pd.DataFrame(
        {"lang": [["en", "de", None][at % 3] for at in range(40)], "domain": ["code", "law"] * 20,
         "topic": [f"t{at % 5}" for at in range(40)], "year": [2000 + at % 2 for at in range(40)]}
    )  # fmt: skip
    experts = np.stack([[random.permutation(6)[:2] for _ in range(2)] for _ in seq])
    experts[random.random(experts.shape) < 0.1] = -1
    return routed.full_trace(
        tmp_path_factory.mktemp("search") / "t.duckdb", experts, n_experts=6, seq=seq, sequences=rows,
        token_ids=random.integers(0, len(WORDS), len(seq)), vocabulary=dict(enumerate(WORDS)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def index(trace: Trace) -> pd.DataFrame:
    return text_search.texts(trace)


def test_texts_are_what_the_tokens_spell(trace: Trace, index: pd.DataFrame):
    tokens = trace.tokens()
    for row in index.itertuples():
        ids = tokens.loc[tokens["seq"] == row.seq, "token_id"]
        assert row.text == "".join(WORDS[each] for each in ids)


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("", {}), ("law", {}), ("LAW the", {}), ('"the land"', {}), ("strasse", {}), ("nothing", {}), ("yer", {}),
        ("", {"lang": "de"}), ("law", {"lang": "en", "topic": "t3"}), ("of", {"year": 2001}), ("of", {"lang": ""}),
        ("of", {"lang": None}),
    ],
)  # fmt: skip
def test_finds_what_a_loop_finds(index: pd.DataFrame, words: str, where: dict):
    found, seqs = text_search.search(index, words, **where)
    wanted = []
    for row in index.to_dict("records"):
        terms = ["the land"] if '"' in words else words.split()
        if all(term.casefold() in row["text"].casefold() for term in terms) and all(
            str(row[name]) == str(value) for name, value in where.items() if value
        ):
            wanted.append(row["seq"])
    assert seqs == found["seq"].tolist() == wanted
    assert {"snippet", "n_tokens"} <= set(found) and not {"text", "folded", "sha256"} & set(found)


def test_a_limit_cuts_the_table_and_not_the_ids(index: pd.DataFrame):
    found, seqs = text_search.search(index, limit=3)
    assert len(found) == 3 and len(seqs) == 40


def test_columns_that_are_missing_are_left_out(index: pd.DataFrame):
    found, _ = text_search.search(index)
    assert "source" not in found and "topic" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "limit is 0"), ({"colour": "x"}, "can't be searched by 'colour'; choose from lang, domain"),
     ({"text": "x"}, "can't be searched by 'text'")],
)  # fmt: skip
def test_refuses(index: pd.DataFrame, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        text_search.search(index, **options)


def test_snippets_show_the_match_and_every_character():
    text = "x" * 100 + " law\u200b\n  of\tthe land" + "y" * 300
    found = text_search.snippet(text, ["law"])
    assert found.startswith("… ") and found.endswith(" …")
    assert "law⟨U+200B⟩ of the land" in found and len(found) < 200
    assert text_search.snippet("short") == "short" and text_search.snippet("") == ""


@pytest.mark.parametrize(
    ("words", "terms"),
    [("", []), ('a "b c" D', ["a", "b c", "d"]), ('"open end', ["open end"]), ('""', []), ("Straße", ["strasse"])],
)
def test_words_and_phrases(words: str, terms: list[str]):
    assert text_search.terms(words) == terms


def test_choices_are_the_columns_that_tell_texts_apart(index: pd.DataFrame):
    found = text_search.choices(index)
    assert sorted(found["lang"]) == ["de", "en"] and set(found["year"]) == {"2000", "2001"}
    assert "source" not in found and "seq" not in found and "text" not in found
    assert "topic" not in text_search.choices(index, most=4)


@pytest.mark.parametrize("token_id", [0, 3, 7, 50])
@pytest.mark.parametrize("limit", [3, 1000])
def test_occurrences_are_all_places_of_a_token(trace: Trace, index: pd.DataFrame, token_id: int, limit: int):
    tokens = trace.tokens()
    places = np.flatnonzero(tokens["token_id"] == token_id)
    besides = None
    if len(places):
        besides = (int(tokens["seq"][places[0]]), int(tokens["pos"][places[0]]))
        places = places[1:]
    found, n = text_search.occurrences(trace, index, token_id, 1, besides=besides, limit=limit)
    assert n == len(places) and len(found) == min(n, limit)
    spelled = {seq: parts for seq, (_, parts) in zip(index["seq"], spelling.texts(trace), strict=True)}
    for at, row in zip(places, found.itertuples(), strict=False):
        assert (row.seq, row.pos) == (tokens["seq"][at], tokens["pos"][at])
        assert row.experts == [expert for expert in trace.experts(1)[at].tolist() if expert != NO_EXPERT]
        assert "".join(spelled[row.seq][: row.pos]).endswith(
            str(row.before).replace("⟨U+200B⟩", "\u200b").replace("↵", "\n")
        )
        assert row.token == text_search.visible(WORDS[token_id])
        assert row.domain == ["code", "law"][int(str(row.seq)) % 2]


def test_occurrences_stay_in_the_texts_of_the_index(trace: Trace, index: pd.DataFrame):
    german = index[index["lang"] == "de"]
    found, n = text_search.occurrences(trace, german, 1, 0)
    assert n == len(found) and set(found["seq"]) <= set(german["seq"])
    with pytest.raises(InputError, match="layer 2: run 'full' has layers 0 to 1"):
        text_search.occurrences(trace, index, 1, 2)


def test_a_run_without_texts_can_be_listed(tmp_path: Path):
    trace = routed.random_trace(tmp_path / "ids.duckdb").trace
    found, seqs = text_search.search(text_search.texts(trace))
    assert len(seqs) == trace.n_sequences and set(found["snippet"]) == {""}


def test_metadata_called_like_columns_of_the_search(tmp_path: Path):
    rows = pd.DataFrame({"text": ["x", "y"], "folded": ["x", "y"], "snippet": ["x", "y"]})
    trace = routed.full_trace(
        tmp_path / "t.duckdb", np.zeros((2, 1, 1), int), n_experts=1, seq=[0, 1], sequences=rows, token_ids=[0, 1],
        vocabulary=dict(enumerate(WORDS)),
    )  # fmt: skip
    index = text_search.texts(trace)
    assert set(text_search.choices(index)) == {"metadata_text", "metadata_folded", "metadata_snippet"}
    found, seqs = text_search.search(index, "law", metadata_text="y")
    assert seqs == [1] and found["snippet"].tolist() == ["law"] and found["metadata_snippet"].tolist() == ["y"]
