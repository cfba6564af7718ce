"""Agreement of two runs, token by token, against the analysis `agreement`, and what can't be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import routed

from workbench import reading, token_agreement
from workbench.analysis import agreement as analysis
from workbench.arrays import from_arrays
from workbench.errors import InputError
from workbench.tracefile import Trace

SEQ = np.repeat([0, 1, 2, 3], [3, 2, 4, 2])
TOKENS = [1, 2, 3, 4, 5, 1, 2, 3, 9, 4, 5]  # sequences 1 and 3 are the same text twice
DIGESTS = ["aa", "bb", "cc", "bb"]


def run(path: Path, seed: int, **changes) -> Trace:
    random = np.random.default_rng(seed)
    experts = np.stack([[random.permutation(6)[:3] for _ in range(2)] for _ in SEQ])
    experts[random.random(experts.shape) < 0.15] = -1
    experts[4, 1] = -1
    given = {
        "seq": SEQ,
        "token_ids": np.array(TOKENS),
        "sequences": pd.DataFrame({"sha256": DIGESTS}),
        "vocabulary": {},
        **changes,
    }
    return from_arrays(path, experts, n_experts=6, run=f"run{seed}", **given)


def by_hand(a: Trace, b: Trace, pairs: list[tuple[int, int]]) -> np.ndarray:
    """(L, n) of tokens of a: pairs of places that are the same token."""
    out = np.full((a.n_layers, a.n_tokens), np.nan)
    for layer in range(a.n_layers):
        x, y = a.experts(layer), b.experts(layer)
        for here, there in pairs:
            p, q = set(x[here].tolist()) - {65535}, set(y[there].tolist()) - {65535}
            if p or q:
                out[layer, here] = len(p & q) / max(len(p), len(q))
    return out


def test_agrees_with_the_sets_and_with_the_analysis(tmp_path: Path):
    a, b = run(tmp_path / "a.duckdb", 1), run(tmp_path / "b.duckdb", 2)
    text = reading.read(a, [0, 1, 2, 3])
    found = token_agreement.agreement(a, text, b)
    np.testing.assert_allclose(found, by_hand(a, b, [(at, at) for at in range(len(SEQ))]), rtol=1e-6)
    table = analysis(a, other=b, n_resamples=0)
    overlap = table[(table["measure"] == "overlap") & table["layer"].notna()]["value"]
    np.testing.assert_allclose(np.nanmean(found, axis=1), overlap, rtol=1e-6)


def test_compares_up_to_the_first_difference_and_by_occurrence(tmp_path: Path):
    a = run(tmp_path / "a.duckdb", 1, sequences=pd.DataFrame({"sha256": DIGESTS, "n_prompt": [3, 2, 2, 2]}))
    order = [9, 10, 0, 1, 2, 5, 6, 7, 8]  # of b: the text "bb" once, then "aa", then "cc" with another third token
    tokens = np.array(TOKENS)[order]
    tokens[7] = 7
    b = from_arrays(
        tmp_path / "b.duckdb", np.stack([[np.arange(3)] * 2] * 9), n_experts=6, run="b", token_ids=tokens,
        seq=[0, 0, 1, 1, 1, 2, 2, 2, 2], vocabulary={},
        sequences=pd.DataFrame({"sha256": ["bb", "aa", "cc"], "n_prompt": [2, 3, 2]}),
    )  # fmt: skip
    found = token_agreement.agreement(a, reading.read(a, range(4)), b)
    same = [(0, 2), (1, 3), (2, 4), (3, 0), (4, 1), (5, 5), (6, 6)]
    np.testing.assert_allclose(found, by_hand(a, b, same), rtol=1e-6)
    assert token_agreement.counterparts(a, [3, 2, 1, 0], b) == {2: 2, 1: 0, 0: 1}


def test_one_sequence_alone_is_matched_as_all_are(tmp_path: Path):
    a, b = run(tmp_path / "a.duckdb", 1), run(tmp_path / "b.duckdb", 2)
    whole = token_agreement.agreement(a, reading.read(a, range(4)), b)
    for seq in range(4):
        part = token_agreement.agreement(a, reading.read(a, seq), b)
        np.testing.assert_array_equal(part, whole[:, seq == SEQ])


def test_without_digests_the_ids_decide_and_without_ids_the_digests(tmp_path: Path):
    a = run(tmp_path / "a.duckdb", 1)
    text = reading.read(a, range(4))
    expected = by_hand(a, run(tmp_path / "b.duckdb", 2), [(at, at) for at in range(len(SEQ))])
    for number, changes in enumerate(({"sequences": None}, {"token_ids": None})):
        b = run(tmp_path / f"c{number}.duckdb", 2, **changes)
        np.testing.assert_allclose(token_agreement.agreement(a, text, b), expected, rtol=1e-6)


def test_a_text_that_the_other_run_lacks_has_no_value(tmp_path: Path):
    a = run(tmp_path / "a.duckdb", 1)
    b = run(tmp_path / "b.duckdb", 2, sequences=pd.DataFrame({"sha256": ["xx", "bb", "yy", "bb"]}))
    found = token_agreement.agreement(a, reading.read(a, [0, 1]), b)
    assert np.isnan(found[:, :3]).all() and np.isfinite(found[0, 3:]).all()
    assert np.isnan(token_agreement.agreement(a, reading.read(a, 0), b)).all()


def test_refuses_what_can_not_be_compared(tmp_path: Path):
    a = run(tmp_path / "a.duckdb", 1)
    other = routed.random_trace(tmp_path / "o.duckdb", n_layers=3).trace
    with pytest.raises(InputError, match="only runs of one architecture"):
        token_agreement.agreement(a, reading.read(a, 0), other)
    blind = run(tmp_path / "b.duckdb", 2, sequences=None, token_ids=None)
    with pytest.raises(InputError, match="can't be matched"):
        token_agreement.agreement(a, reading.read(a, 0), blind)
