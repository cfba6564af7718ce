"""Features against loops over tokens: dropped tokens, differing k, more than 256 experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import N_EXPERTS, planted
from routed import full_trace, with_profiles
from scipy import sparse

from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench_probes.features import beside, check, of_layer, of_tokens, spread

SIZES, KS = (300, 5), (3, 1)
LENGTHS = (4, 1, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """k and E differ by layer, a fifth of the places are empty, one token has no expert at all."""
    random = np.random.default_rng(3)
    seq = np.repeat(np.arange(3), LENGTHS)
    experts = [
        np.stack([random.choice(size, k, replace=False) for _ in seq]) for size, k in zip(SIZES, KS, strict=True)
    ]
    for one in experts:
        one[random.random(one.shape) < 0.2] = -1
        one[2] = -1
    experts[0][4] = -1  # all of the second text
    weights = [np.where(one >= 0, random.integers(1, 5, one.shape) / 4, 0) for one in experts]
    ids = random.integers(0, 4, len(seq))
    logits = [random.normal(size=(len(seq), size)) for size in SIZES]
    path = tmp_path_factory.mktemp("features") / "t.duckdb"
    trace = full_trace(
        path, experts, n_experts=SIZES, seq=seq, sequences=pd.DataFrame({"lang": list("abc")}), weights=weights,
        token_ids=ids, logits=logits,
    )  # fmt: skip
    return trace, experts, weights, seq, ids, logits


def dense(matrix) -> np.ndarray:
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["choices", "weights"])
def test_layers_against_loops(made, layer: int, name: str):
    trace, experts, weights, seq, _, _ = made
    expected = np.zeros((len(seq), SIZES[layer]))
    for token, row in enumerate(experts[layer]):
        for place, expert in enumerate(row):
            if expert >= 0:
                expected[token, expert] = 1 if name == "choices" else weights[layer][token, place]
    rows = np.array([0, 2, 5, 10])
    found = of_layer(trace, name, layer, rows, "token")
    assert sparse.issparse(found) and found.dtype == np.float32
    np.testing.assert_allclose(dense(found), expected[rows], atol=1e-4)

    sums = np.stack([expected[seq == text].sum(axis=0) for text in range(3)])
    by = sums.sum(axis=1) if name == "choices" else np.array(LENGTHS)
    shares = np.divide(sums, by[:, None], out=np.zeros_like(sums), where=by[:, None] > 0)
    np.testing.assert_allclose(dense(of_layer(trace, name, layer, np.arange(3), "sequence")), shares, atol=1e-4)


def test_tokens_against_loops(made):
    trace, _, _, seq, ids, _ = made
    known = np.unique(ids)
    expected = (ids[:, None] == known).astype(float)
    rows = np.array([1, 3, 7])
    np.testing.assert_array_equal(dense(of_tokens(trace, rows, "token")), expected[rows])
    shares = np.stack([expected[seq == text].mean(axis=0) for text in range(3)])
    np.testing.assert_allclose(dense(of_tokens(trace, np.array([0, 2]), "sequence")), shares[[0, 2]], atol=1e-6)
    for unit in ("token", "sequence"):  # what all of scikit-learn takes
        found = [of_tokens(trace, np.arange(3), unit), of_layer(trace, "choices", 0, np.arange(3), unit)]
        joined = beside([of_layer(trace, "weights", layer, np.arange(3), unit) for layer in (0, 1)])
        assert {one.indices.dtype for one in (*found, joined)} == {np.dtype(np.int32)}
        assert {one.indptr.dtype for one in (*found, joined)} == {np.dtype(np.int32)}


def test_probabilities(made, tmp_path: Path):
    trace, *_, logits = made
    expected = np.exp(logits[0]) / np.exp(logits[0]).sum(axis=1, keepdims=True)
    rows = np.array([0, 9])
    np.testing.assert_allclose(of_layer(trace, "probabilities", 0, rows, "token"), expected[rows], atol=1e-5)
    profile = np.array([[0.5, 0.5], [0.1, 0.9]])
    other = with_profiles(tmp_path / "p.duckdb", [profile], pd.DataFrame({"lang": ["a", "b"]}), [2, 3])
    found = of_layer(other, "probabilities", 0, np.array([1, 0]), "sequence")
    np.testing.assert_allclose(found, profile[::-1], atol=1e-6)
    with pytest.raises(InputError, match="probabilities of a token take recorded logits"):
        check(other, ["probabilities"], None, "token")
    with pytest.raises(InputError, match="probabilities of a sequence take recorded profiles"):
        check(trace, ["probabilities"], None, "sequence")


ids = st.lists(st.lists(st.sampled_from([0, 1, 2, 7, NO_EXPERT]), min_size=3, max_size=3), min_size=1, max_size=9)


@given(ids)
@settings(deadline=None)
def test_spread_puts_every_choice_in_its_column(rows: list[list[int]]):
    unique = [list(dict.fromkeys(one for one in row if one != NO_EXPERT)) for row in rows]
    experts = np.array([row + [NO_EXPERT] * (3 - len(row)) for row in unique], np.uint16)
    found = spread(experts, 8).toarray()
    assert [np.flatnonzero(row).tolist() for row in found] == [sorted(row) for row in unique]
    assert set(np.unique(found)) <= {0, 1}
    joined = beside([spread(experts, 8), spread(experts, 8)])
    np.testing.assert_array_equal(dense(joined), np.concatenate([found, found], axis=1))


def test_what_isnt_there_is_refused(tmp_path: Path):
    trace = planted(tmp_path / "t.duckdb", n_texts=2, weights=None, token_ids=[-1] * 48)
    for names, layers, said in [
        (["votes"], None, "no features 'votes'"),
        ([], None, "no features were asked for"),
        (["weights"], None, "holds no weights"),
        (["choices"], [3], "layer 3: run 'full' has layers 0 to 2"),
        (["choices"], [], "layer none"),
    ]:
        with pytest.raises(InputError, match=said):
            check(trace, names, layers, "token")
    with pytest.raises(InputError, match="doesn't know its token ids"):
        of_tokens(trace, np.arange(2), "token")
    assert check(trace, ["choices"], [2, 0, 2], "token") == [0, 2]
    assert of_layer(trace, "choices", 0, np.arange(2), "token").shape == (2, N_EXPERTS)
