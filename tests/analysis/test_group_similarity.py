"""Similarity of groups against loops; equal groups aren't called different, however small, and different ones are."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from routed import choose, random_trace, with_profiles, write

from workbench.analysis.counting import Cells
from workbench.analysis.group_similarity import cosine, figure, findings, group_similarity, js, pairwise, table
from workbench.errors import InputError

QUICK = {"n_resamples": 60}


def slow_js(p, q) -> float:
    total = 0.0
    for a, b in zip(p, q, strict=True):
        middle = (a + b) / 2
        total += sum(x * math.log2(x / middle) / 2 for x in (a, b) if x > 0)
    return total


@pytest.mark.parametrize("by", ["domain", "lang", "position"])
def test_against_loop(tmp_path, by):
    routed = random_trace(tmp_path / "t.duckdb", n_texts=9)
    frame = group_similarity(routed.trace, by=by, **QUICK)
    labels = {}
    place = np.concatenate([np.arange(n) for n in np.bincount(routed.seq)])
    for token, seq in enumerate(routed.seq):
        if by == "position":
            label = "0" if place[token] == 0 else "1–3" if place[token] < 4 else "4–15"
        else:
            label = routed.sequences[by][seq]
        if pd.notna(label):
            labels.setdefault(label, []).append(token)
    pairs = len(labels) * (len(labels) - 1) // 2
    assert len(frame) == pairs * 3
    vectors = {}
    for label, tokens in labels.items():
        for layer in range(2):
            chosen = [int(e) for token in tokens for e in routed.experts[token, layer] if e >= 0]
            vectors[label, layer] = [chosen.count(expert) / len(chosen) for expert in range(6)]
    for _, row in frame[frame["layer"].notna()].iterrows():
        p, q = vectors[row["group"], row["layer"]], vectors[row["other"], row["layer"]]
        inner = sum(a * b for a, b in zip(p, q, strict=True))
        assert row["cosine"] == pytest.approx(inner / math.sqrt(sum(a * a for a in p) * sum(b * b for b in q)))
        assert row["js"] == pytest.approx(slow_js(p, q))
        assert row["excess"] == pytest.approx(row["js"] - row["null"])
        assert row["n_tokens"] == len(labels[row["group"]]) and row["n_tokens_other"] == len(labels[row["other"]])
    pooled = frame[frame["layer"].isna()].set_index(["group", "other"])
    mean = frame[frame["layer"].notna()].groupby(["group", "other"])[["cosine", "js", "null"]].mean()
    for name in ("cosine", "js", "null"):
        assert pooled[name].to_numpy() == pytest.approx(mean[name].reindex(pooled.index).to_numpy())
    assert frame["p"].between(1 / 61, 1).all() and (frame["q"] >= frame["p"] - 1e-12).all()


def test_probabilities(tmp_path):
    """Texts weigh by their tokens."""
    q = np.random.default_rng(0).dirichlet(np.ones(4), 4)
    sequences = pd.DataFrame({"domain": ["a", "a", "b", "b"], "source": ["x", "y", "z", "w"]})
    trace = with_profiles(tmp_path / "t.duckdb", [q], sequences, [1, 3, 2, 2])
    frame = group_similarity(trace, vectors="probabilities", **QUICK)
    expected = slow_js((q[0] + 3 * q[1]) / 4, (q[2] + q[3]) / 2)
    assert frame["js"].tolist() == pytest.approx([expected] * 2, abs=1e-5)
    with pytest.raises(InputError, match="recorded a sequence, not a token: 'position'"):
        group_similarity(trace, by="position", vectors="probabilities")
    with pytest.raises(InputError, match="vectors is 'logits'; expected one of"):
        group_similarity(trace, vectors="logits")


# The oracle halves probabilities: the smallest numbers there are would become 0 in it.
probabilities = st.just(0.0) | st.floats(1e-12, 1)
distributions = arrays(float, 5, elements=probabilities).filter(lambda a: a.sum() > 1e-3).map(lambda a: a / a.sum())


@settings(max_examples=50, deadline=None)
@given(distributions, distributions)
def test_laws(p, q):
    value = float(js(p, q))
    assert 0 <= value <= 1 and float(js(q, p)) == pytest.approx(value, abs=1e-12)
    assert value == pytest.approx(slow_js(p, q), abs=1e-9)
    assert float(js(p, p)) == pytest.approx(0, abs=1e-12) and float(cosine(p, p)) == pytest.approx(1)
    assert float(js(p[::-1], q[::-1])) == pytest.approx(value, abs=1e-9)
    assert -1e-12 <= float(cosine(p, q)) <= 1 + 1e-12


def simulated(random, sizes, lengths, taste):
    """Counts of texts of groups of these sizes; taste (n_groups, E)."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    rows = [random.multinomial(random.integers(1, 2 * lengths[g]), random.dirichlet(20 * taste[g])) for g in group]
    nothing = np.zeros(0)
    cells = Cells(
        labels=[str(g) for g in range(len(sizes))], group=group, text=np.arange(len(group)), strata=None,
        of_token=nothing, n_tokens=nothing, n_sequences=nothing, n_texts=np.array(sizes), n_unlabelled=0,
    )  # fmt: skip
    return np.array(rows, float), cells


@pytest.mark.parametrize("sizes, lengths", [((30, 30), (20, 20)), ((6, 60), (30, 30)), ((25, 25), (6, 100))])
def test_equal_groups_are_not_called_different(sizes, lengths):
    random = np.random.default_rng(0)
    first, second = np.array([0]), np.array([1])
    p = []
    for trial in range(100):
        rows, cells = simulated(random, sizes, lengths, np.tile(random.dirichlet(np.full(12, 2.0)), (2, 1)))
        found = pairwise(rows, cells, first, second, 99, trial)
        p.append(table(found, 0, np.array([min(sizes)]))["p"][0])
    assert np.mean(np.array(p) <= 0.05) <= 0.11


def test_planted_groups_are_found(tmp_path):
    """Domains a and b route alike, c otherwise; d is tiny and like a."""
    random = np.random.default_rng(1)
    domain = ["a"] * 30 + ["b"] * 30 + ["c"] * 30 + ["d"] * 4
    seq = np.repeat(np.arange(len(domain)), 15)
    logits = np.zeros((len(seq), 6))
    logits[(seq >= 60) & (seq < 90), :3] = 1.5
    trace = write(
        tmp_path / "t.duckdb", choose(random, logits, 2)[:, None], seq, pd.DataFrame({"domain": domain}), 6
    ).trace
    frame = group_similarity(trace, n_resamples=300)
    pooled = frame[frame["layer"].isna()].set_index(["group", "other"])
    assert (pooled.loc[[("a", "c"), ("b", "c")], "q"] < 0.05).all()
    assert (pooled.loc[[("a", "b"), ("a", "d"), ("b", "d")], "q"] > 0.05).all()
    assert pooled["null"][("a", "d")] > 2 * pooled["null"][("a", "b")]
    order = list(figure(frame).to_dict()["data"][0]["x"])
    assert order.index("c") in (0, 3)
    text = findings(frame)
    assert "c" in text[0].split("least")[0] and "of 6 pairs differ" in text[1]


def test_degenerate(tmp_path):
    zeros, seq, both = np.zeros((4, 1, 1), int), [0, 0, 1, 1], pd.DataFrame({"domain": ["a", "b"]})
    one = write(tmp_path / "a.duckdb", zeros, seq, pd.DataFrame({"domain": ["a"] * 2}), 2).trace
    with pytest.raises(InputError, match="at least two values.*'a'"):
        group_similarity(one)
    with pytest.raises(InputError, match="no 'lang'"):
        group_similarity(one, by="lang")
    single = group_similarity(write(tmp_path / "b.duckdb", zeros, seq, both, 1).trace, **QUICK)
    assert (single["js"] == 0).all() and (single["cosine"] == 1).all()
    assert single[["js_low", "null", "p", "q"]].isna().all(axis=None)
    # b uses no expert
    empty = write(tmp_path / "c.duckdb", np.array([0, 1, -1, -1])[:, None, None], seq, both, 2).trace
    nothing = group_similarity(empty, **QUICK)
    assert nothing[["js", "cosine", "p"]].isna().all(axis=None)
    without = group_similarity(empty, n_resamples=0)
    for frame in (single, nothing, without):
        figure(frame)
        assert findings(frame)
