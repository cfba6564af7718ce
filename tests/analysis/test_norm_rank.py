"""Ranks of norms against ranks of weights, token by token in plain Python with scipy's correlations."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import full_trace, write
from scipy.stats import kendalltau, spearmanr

from workbench.analysis.norm_rank import figure, findings, norm_rank, rank_tokens, rows_of
from workbench.errors import InputError
from workbench.routing import NO_EXPERT

E = 7


def tokens_of(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts with gaps, and weights and norms of few values, so that some are equal."""
    random = np.random.default_rng(seed)
    experts = np.argsort(random.random((n, E)), axis=1)[:, :k]
    experts[random.random(experts.shape) < 0.2] = -1
    weights, norms = random.integers(1, 6, experts.shape) / 8, random.integers(0, 6, experts.shape) * 1.0
    return experts, np.where(experts < 0, 0, weights), np.where(experts < 0, 0, norms)


def ranks(values: list[float]) -> list[int]:
    order = sorted(range(len(values)), key=lambda at: (-values[at], at))
    return [order.index(at) + 1 for at in range(len(values))]


def loop(experts, weights, norms, used) -> dict:
    """All measures over the tokens `used`, as lists of values to average."""
    found: dict = {}
    for token in used:
        kept = experts[token] >= 0
        g, e = weights[token][kept].tolist(), norms[token][kept].tolist()
        if len(g) < 2:
            continue
        gate, norm = ranks(g), ranks(e)
        found.setdefault(("top_match", 0, 0), []).append(norm[gate.index(1)] == 1)
        if len(set(g)) > 1 and len(set(e)) > 1:
            found.setdefault(("kendall", 0, 0), []).append(kendalltau(g, e)[0])
            found.setdefault(("spearman", 0, 0), []).append(spearmanr(g, e)[0])
        for r, s, value in zip(gate, norm, e, strict=True):
            found.setdefault(("mean_norm", r, 0), []).append(value)
            if sum(e):
                found.setdefault(("relative_norm", r, 0), []).append(value / np.mean(e))
            for t in range(1, len(g) + 1):
                found.setdefault(("frequency", r, t), []).append(s == t)
    return found


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(0, 8))
def test_kernel_against_scipy(seed, k, n):
    experts, weights, norms = tokens_of(seed, n, k)
    names = rows_of(k)
    total, number, chance = (np.zeros((1, len(names))) for _ in range(3))
    cell = np.zeros(n, np.int32)
    cell[n // 2 :] = -1 if seed % 3 == 0 else 0
    ids = np.where(experts < 0, NO_EXPERT, experts).astype(np.uint16)
    rank_tokens(ids, weights.astype(np.float32), norms.astype(np.float32), cell, total, number, chance)
    expected = loop(experts, weights, norms, np.flatnonzero(cell == 0))
    for at, name in enumerate(names):
        values = expected.get(name, [])
        assert number[0, at] == len(values) and total[0, at] == pytest.approx(sum(values), abs=1e-6), name


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Norms that follow the weights in layer 0 and run against them in layer 1."""
    random = np.random.default_rng(2)
    seq = np.repeat(np.arange(12), 10)
    sequences = pd.DataFrame({"lang": ["en", "de", None] * 4})
    experts = np.argsort(random.random((120, 2, E)), axis=2)[..., :3]
    weights = random.random(experts.shape)
    norms = np.stack([weights[:, 0] * 4 + 0.3 * random.random((120, 3)), 2 - weights[:, 1]], axis=1)
    path = tmp_path_factory.mktemp("norm_rank") / "t.duckdb"
    both = {"n_experts": E, "seq": seq, "sequences": sequences}
    return full_trace(path, experts, weights=weights, norms=norms, **both), experts, norms, both


@pytest.mark.parametrize("by", [None, "lang"])
def test_against_loop(routed, by):
    trace, experts, norms, both = routed
    frame = norm_rank(trace, by=by, n_resamples=60)
    label = both["sequences"]["lang"][both["seq"]].to_numpy(object)
    for (group, layer), part in frame.groupby(["group", "layer"]):
        used = [token for token in range(120) if by is None or label[token] == group]
        expected = loop(experts[:, layer], trace.weights(layer), np.float32(norms[:, layer]), used)
        table = part.set_index(["measure", "gate_rank", "norm_rank"])
        assert set(table.index) == set(expected)
        for name, values in expected.items():
            assert table.loc[name, "value"] == pytest.approx(np.mean(values), rel=1e-5), name
            assert table.loc[name, "n_compared"] == len(values)
        frequency = part[part["measure"] == "frequency"]
        assert np.allclose(frequency.groupby("gate_rank")["value"].sum(), 1)
        assert np.allclose(frequency["chance"], 1 / 3)
        assert np.allclose(part[part["measure"] == "top_match"]["chance"], 1 / 3)
    assert (frame["low"] <= frame["value"] + 1e-9).all() and (frame["value"] <= frame["high"] + 1e-9).all()
    assert frame[frame["measure"] == "mean_norm"]["chance"].isna().all()
    assert (frame["n_unlabelled"] == (0 if by is None else 4)).all()


def test_planted_order_is_found(routed):
    frame = norm_rank(routed[0], n_resamples=100)
    table = frame[frame["measure"] == "spearman"]
    assert table["low"].iloc[0] > 0.8 and table["value"].iloc[1] == pytest.approx(-1)
    first, top = findings(frame)
    assert "largest in layer 0" in first and "smallest in layer 1: -1.00" in first and "33%" in top


def test_unrelated_norms_give_chance(tmp_path):
    random = np.random.default_rng(0)
    shape = (3000, 1, 4)
    experts = np.argsort(random.random((3000, 1, E)), axis=2)[..., :4]
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=E, seq=np.repeat(np.arange(300), 10),
        sequences=pd.DataFrame({"lang": ["en"] * 300}), weights=random.random(shape), norms=random.random(shape),
    )  # fmt: skip
    frame = norm_rank(trace, n_resamples=300)
    known = frame["chance"].notna()
    inside = (frame["low"] <= frame["chance"])[known] & (frame["chance"] <= frame["high"])[known]
    assert inside.mean() > 0.8


def test_what_was_not_recorded(tmp_path):
    texts = pd.DataFrame({"lang": ["en"]})
    ids = write(tmp_path / "ids", np.zeros((2, 1, 1), int), [0, 0], texts, 2).trace
    with pytest.raises(InputError, match="has no weights and no norms: trace again with --record ids,norms,weights"):
        norm_rank(ids)
    some = full_trace(
        tmp_path / "some",
        np.zeros((2, 1, 1), int),
        n_experts=2,
        seq=[0, 0],
        sequences=texts,
        weights=np.ones((2, 1, 1)),
    )
    with pytest.raises(InputError, match="has no norms: trace again with --record ids,norms,weights"):
        norm_rank(some)


@pytest.mark.parametrize("experts", [[[[0]]], [[[-1, -1]]], [[[0, 1]]], [[[299, 3, -1]], [[2, -1, -1]]]])
def test_degenerate(tmp_path, experts):
    experts = np.array(experts)
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=300, seq=[0] * len(experts),
        sequences=pd.DataFrame({"lang": ["en"]}), weights=np.ones(experts.shape), norms=np.ones(experts.shape),
    )  # fmt: skip
    frame = norm_rank(trace, n_resamples=5)
    table = frame.set_index("measure")["value"]
    assert np.isnan(table["spearman"]) and np.isnan(table["top_match"]) == ((experts >= 0).sum(axis=2).max() < 2)
    assert frame["low"].isna().all()
    figure(frame)
    assert "nothing to rank" in findings(frame)[0]


def test_layers_of_different_k(tmp_path):
    layers = [np.array([[0, 1, 2], [2, 0, 1]]), np.array([[1, 0], [0, 3]])]
    trace = full_trace(
        tmp_path / "t.duckdb", layers, n_experts=[3, 4], seq=[0, 1], sequences=pd.DataFrame({"lang": ["en", "de"]}),
        weights=[np.array([[3, 2, 1]] * 2) / 6, np.array([[2, 1]] * 2) / 3],
        norms=[np.array([[9, 5, 1]] * 2), np.array([[1, 2]] * 2)],
    )  # fmt: skip
    frame = norm_rank(trace, n_resamples=5)
    assert frame.groupby("layer")["top_k"].first().tolist() == [3, 2]
    assert frame[frame["measure"] == "kendall"]["value"].tolist() == pytest.approx([1, -1])
    figure(frame)


def titles(drawn) -> list[str]:
    """What stands above the panels."""
    return [text["text"] for text in drawn.to_dict()["layout"]["annotations"]]


def test_figures(routed):
    frame = norm_rank(routed[0], n_resamples=5)
    drawn = figure(frame)
    assert titles(drawn)[1] == "layer 1, Spearman -1.00" and np.shape(drawn.data[0].z) == (3, 3)
    diagonal = np.diag(np.array(drawn.data[0].z))
    assert all(x > 0 for x in diagonal) and all(a == b for a, b in pairwise(drawn.data[0].x[:1] * 2))
    by = norm_rank(routed[0], by="lang", n_resamples=5)
    assert {"en", "de"} <= {line.name for line in figure(by).data}
    assert "language" in findings(by)[0]
    many = pd.concat([frame.assign(group=f"<i>{number}") for number in range(9)])
    assert figure(many).data[0].y[0].startswith("&lt;i&gt;")
