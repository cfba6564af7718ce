"""Likeness of experts by what they fire on, against loops; planted twins are found."""

import numpy as np
import pandas as pd
import pytest
from routed import full_trace, write

from workbench import analysis
from workbench.analysis.similar_experts import figure, findings
from workbench.errors import InputError


def made(path, seed=0, n_texts=30, length=40):
    """Experts 0 and 1 of layer 0 and expert 4 of layer 1 like the same ids; ids are unknown now and then."""
    random = np.random.default_rng(seed)
    seq = np.repeat(np.arange(n_texts), length)
    ids = random.integers(0, 10, len(seq))
    ids[random.random(len(seq)) < 0.05] = -1
    liked = (ids >= 0) & (ids < 3)
    first = np.where(
        liked & (random.random(len(seq)) < 0.8), random.integers(0, 2, len(seq)), random.integers(2, 6, len(seq))
    )
    second = np.where(liked & (random.random(len(seq)) < 0.8), 4, random.integers(0, 7, len(seq)))
    experts = [first[:, None], second[:, None]]
    sequences = pd.DataFrame({"segment_id": [f"s{text // 2}" for text in range(n_texts)]})
    trace = full_trace(path, experts, n_experts=[6, 7], seq=seq, sequences=sequences, token_ids=ids)
    return trace, experts, seq, ids


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return made(tmp_path_factory.mktemp("similar") / "t.duckdb")


def taste(chose: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """By a loop: what the expert likes, in units of chance."""
    kept = labels >= 0
    result = []
    for label in np.unique(labels[kept]):
        here = kept & (labels == label)
        expected = chose[kept].sum() * here.sum() / kept.sum()
        result.append((chose[here].sum() - expected) / np.sqrt(expected) if expected > 0 else 0.0)
    return np.array(result)


@pytest.mark.parametrize("by", ["token", "text"])
def test_against_loop(example, by):
    trace, experts, seq, ids = example
    frame = analysis.similar_experts(trace, 0, 1, by=by)
    labels = ids if by == "token" else seq // 2
    mine = taste(experts[0][:, 0] == 1, labels)
    assert len(frame) == 6 + 7 - 1 and frame["value"].is_monotonic_decreasing
    for row in frame.to_dict("records"):
        chose = experts[row["other_layer"]][:, 0] == row["other"]
        other = taste(chose, labels)
        cosine = mine @ other / np.sqrt((mine @ mine) * (other @ other))
        assert row["value"] == pytest.approx(cosine)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["count"] == (chose & (labels >= 0)).sum()
        assert row["both"] == (0 if row["other_layer"] == 0 else -1)
        assert row["n_labels"] == (10 if by == "token" else 15) and row["n_texts"] == 15


def test_twins_are_found(example):
    frame = analysis.similar_experts(example[0], 0, 0)
    best = frame.head(2)
    assert {(row.other_layer, row.other) for row in best.itertuples()} == {(0, 1), (1, 4)}
    assert (best["low"] > 0.8).all() and (frame["value"].iloc[2:] < 0.5).all()
    own = analysis.similar_experts(example[0], 0, 0, layers=(0,))
    pd.testing.assert_frame_equal(own, frame[frame["other_layer"] == 0].reset_index(drop=True))
    assert "is expert" in findings(frame)[0] and "the same tokens" in findings(frame)[0]
    assert len(figure(frame).data[0]["y"]) == 12


def test_pairs_on_one_token(tmp_path):
    experts = np.array([[[0, 1]], [[1, 0]], [[0, 2]], [[2, -1]]])
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=4, seq=[0, 1, 2, 3], token_ids=[1, 1, 2, 3],
                       sequences=pd.DataFrame({"lang": ["a"] * 4}))  # fmt: skip
    frame = analysis.similar_experts(trace, 0, 0).set_index("other")
    assert frame["both"].to_dict() == {1: 2, 2: 1, 3: 0}
    assert np.isnan(frame.loc[3, "value"]) and frame.loc[3, "count"] == 0


def test_most_labels(example):
    trace = example[0]
    few = analysis.similar_experts(trace, 0, 0, most=4)
    assert (few["n_labels"] == 4).all() and (few["n_tokens"] < trace.n_tokens).all()
    groups = analysis.similar_experts(trace, 0, 0, by="text", most=4)
    assert (groups["n_labels"] == 4).all() and (groups["n_tokens"] == trace.n_tokens).all()


def test_the_interval_covers(tmp_path):
    """The cosine of a long trace lies in most intervals of short ones like it."""
    long, *_ = made(tmp_path / "long.duckdb", seed=99, n_texts=400)
    key = ["other_layer", "other"]
    truth = analysis.similar_experts(long, 0, 0).set_index(key)["value"]
    hits = []
    for seed in range(6):
        short, *_ = made(tmp_path / f"{seed}.duckdb", seed=seed, n_texts=60)
        frame = analysis.similar_experts(short, 0, 0).set_index(key).loc[[(0, 1), (1, 4)]]
        hits += list((frame["low"] <= truth.loc[frame.index]) & (truth.loc[frame.index] <= frame["high"]))
    assert np.mean(hits) > 0.7


def test_degenerate_traces(tmp_path):
    sequences = pd.DataFrame({"lang": ["a", "b"]})
    two = full_trace(tmp_path / "two.duckdb", np.zeros((2, 1, 1), int), n_experts=2, seq=[0, 1], token_ids=[1, 2],
                     sequences=sequences)  # fmt: skip
    frame = analysis.similar_experts(two, 0, 0)
    assert len(frame) == 1 and frame[["value", "low", "high"]].isna().all(axis=None)
    assert "no other expert" in findings(frame)[0]
    figure(frame)
    many = write(tmp_path / "many.duckdb", np.array([[[299]], [[0]]]), [0, 1], sequences, 300).trace
    frame = analysis.similar_experts(many, 0, 299, by="text")
    assert len(frame) == 299 and frame.set_index("other").loc[0, "value"] == pytest.approx(-1)
    empty = many.only([])
    assert analysis.similar_experts(empty, 0, 0, by="text")["value"].isna().all()


def test_errors(example, tmp_path):
    trace = example[0]
    for wrong, message in (
        ({"by": "smell"}, "by is 'smell'; expected one of token, text"),
        ({"most": 1}, "most is 1"),
        ({"layer": 9}, "layer 9"),
        ({"layers": (7,)}, "layer 7"),
        ({"expert": 6}, "expert 6: layer 0 has experts 0 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            analysis.similar_experts(trace, **wrong)
    routed = write(tmp_path / "t.duckdb", np.zeros((2, 1, 1), int), [0, 1], pd.DataFrame({"lang": ["a", "b"]}), 2)
    with pytest.raises(InputError, match="doesn't know its token ids"):
        analysis.similar_experts(routed.trace)
