"""Filters: what each condition means, against loops over the tokens, and what a wrong one is told."""

import numpy as np
import pandas as pd
import pytest
from routed import full_trace, write

from workbench.analysis.filters import mask
from workbench.errors import InputError
from workbench.schema import PHASES

WORDS = {0: "a", 1: " the", 2: "the", 3: ",", 4: "<think>", 5: "\n", 6: '"', 7: "<", 8: "think", 9: ">"}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    sequences = pd.DataFrame(
        {
            "lang": ["en", "de", "en", None],
            "domain": ["code & prose", "a,b", "law", "law"],
            "score": [1, 2, 1, 2],
            "n_prompt": [4, 3, 0, 2],
        }
    )
    ids = [4, 1, 3, 2, 0, 7, 8, 9, 5, 6, 1, 0]
    return full_trace(
        tmp_path_factory.mktemp("filters") / "t.duckdb", np.zeros((12, 1, 1), int), n_experts=2,
        seq=[0] * 5 + [1] * 3 + [2] * 2 + [3] * 2, sequences=sequences, token_ids=ids, vocabulary=WORDS,
        phase=[0, 1, 1, 1, 2, 1, 1, 1, 2, 2, 1, 1],
    )  # fmt: skip


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("lang=en", [0, 1, 2, 3, 4, 8, 9]),
        ("lang=en,de", range(10)),
        ("lang=en & phase=generated", [4, 8, 9]),
        ("phase=prompt,template & lang=en", [0, 1, 2, 3]),
        ("score=1", [0, 1, 2, 3, 4, 8, 9]),
        ("score=1.0 & position=0", [0, 8]),
        ("domain=code & prose", [0, 1, 2, 3, 4]),
        ('domain="a,b"', [5, 6, 7]),
        ("domain~^[al]", [5, 6, 7, 8, 9, 10, 11]),
        ("position=0", [0, 5, 8, 10]),
        ("position=1-2", [1, 2, 6, 7, 9, 11]),
        ("position=1–1,3+", [1, 3, 4, 6, 9, 11]),
        ("token=the", [3]),
        ('token=" the"', [1, 10]),
        ('token=",","\\n"', [2, 8]),
        ('token="\\""', [9]),
        ("token~^.the$", [1, 10]),
        ("text~<think>", [0, 5, 6, 7]),
        ("text~hin", [0, 6]),
        ("text~the.?a & lang=en", [3, 4]),
        ("text~ the", [1, 10]),
        ("  lang=de  ", [5, 6, 7]),
    ],
)
def test_conditions(trace, text, tokens):
    chosen = mask(trace, text)
    assert chosen.dtype == bool and chosen.shape == (12,)
    assert np.flatnonzero(chosen).tolist() == list(tokens)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a condition.*lang=de.*A condition names .*lang, .*score, phase, position, token, text"),
        ("lang", "not a condition"),
        ("=de", "not a condition"),
        ("colour=red", "nothing called 'colour'.*lang"),
        ("lang=xx", "no sequence has lang 'xx'; there is de, en"),
        ("lang=en,xx", "no sequence has lang 'xx'"),
        ("lang=", "a value is missing"),
        ("lang=en,,de", "a value is missing"),
        ('lang="e', "not a quoted value.*Unterminated"),
        ('lang="e"n', "not a quoted value"),
        ('lang="\\ud800"', "not Unicode text"),
        ('token="\\udfff"', "not Unicode text"),
        ("phase=middle", f"phase is 'middle'; expected {', '.join(PHASES)}"),
        ("phase~gen", "patterns are for text, token and columns"),
        ("position=first", "position is 'first'; expected a number"),
        ("position=40", "no token has position 40; the longest sequence ends at 4"),
        ("token=The", 'no token is "The"; there is " the", "the"'),
        ("token=banana", "may be made of several: use text~"),
        ("text=the", "write text~the"),
        ("text~", "has no pattern"),
        ("text~(", "not a regular expression"),
        ("text~x*", "no token meets"),
        ("lang=de & domain=law", "no token meets 'lang=de & domain=law'"),
    ],
)
def test_errors(trace, text, message):
    with pytest.raises(InputError, match=message):
        mask(trace, text)


def test_what_a_trace_lacks(tmp_path):
    many = pd.DataFrame({"lang": [f"l{number:02}" for number in range(40)]})
    bare = write(tmp_path / "t.duckdb", np.zeros((40, 1, 1), int), np.arange(40), many, 2).trace
    for text in ("token=a", "text~a", "token~a"):
        with pytest.raises(InputError, match="doesn't know its tokens.*workbench trace.*from_arrays"):
            mask(bare, text)
    with pytest.raises(InputError, match="l14 and 25 more"):
        mask(bare, "lang=xx")
    with pytest.raises(InputError, match="no token has phase 'generated'; there is prompt"):
        mask(bare, "phase=generated")
    with pytest.raises(InputError, match="nothing called 'domain'"):
        mask(bare, "domain=law")  # a column that is empty
