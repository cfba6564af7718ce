"""Changes of experts between two runs against loops over tokens; laws; what can't be compared."""

import math

import numpy as np
import pandas as pd
import pytest
from routed import full_trace

from workbench.analysis.expert_changes import expert_changes, figure, findings
from workbench.errors import InputError

E, K, LAYERS = 7, 3, 2
LENGTHS = [5, 1, 7, 4, 6]
SEQ = np.repeat(np.arange(5), LENGTHS)
SEQUENCES = pd.DataFrame({"lang": ["en", "de", "en", None, "de"], "segment_id": ["a", "a", "b", "c", "d"]})


def route(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    experts = np.argsort(random.random((len(SEQ), LAYERS, E - 1)), axis=-1)[..., :K]  # the last is never used
    experts[random.random(experts.shape) < 0.15] = -1
    return experts


def record(path, run, experts, *, n_experts=E, seq=SEQ, sequences=SEQUENCES):
    mode = "append" if path.exists() else "new"
    ids = np.arange(len(seq)) % 11
    return full_trace(
        path, experts, n_experts=n_experts, seq=seq, sequences=sequences, token_ids=ids, run=run, mode=mode
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("changes") / "t.duckdb"
    routed = [route(1), route(2)]
    return [record(path, name, one) for name, one in zip(("first", "second"), routed, strict=True)], routed


def users(experts, layer, expert, tokens):
    return {token for token in tokens if expert in experts[token, layer]}


def share(experts, layer, expert, tokens):
    total = sum(int((experts[token, layer] >= 0).sum()) for token in tokens)
    return len(users(experts, layer, expert, tokens)) / total if total else math.nan


def test_against_loop(runs):
    (first, _), routed = runs
    frame = expert_changes(first, n_resamples=50)
    assert len(frame) == LAYERS * E and set(frame["other"]) == {"second"}
    tokens = range(len(SEQ))
    for row in frame.itertuples():
        here, there = (users(one, row.layer, row.expert, tokens) for one in routed)
        shares = [share(one, row.layer, row.expert, tokens) for one in routed]
        assert (row.n_here, row.n_there, row.n_both) == (len(here), len(there), len(here & there))
        assert [row.share, row.share_other] == pytest.approx(shares)
        assert row.difference == pytest.approx(shares[1] - shares[0])
        assert row.ratio == pytest.approx(shares[1] / shares[0] if here else math.nan, nan_ok=True)
        most = max(len(here), len(there))
        assert row.kept == pytest.approx(len(here & there) / most if most else math.nan, nan_ok=True)
        assert row.n_tokens == len(SEQ) and row.n_texts == 4
        assert row.low <= row.difference <= row.high
    moved = frame.groupby("layer").agg(moved=("moved", "first"), each=("difference", lambda d: d.abs().sum() / 2))
    assert moved["moved"].to_numpy() == pytest.approx(moved["each"].to_numpy())
    assert frame[frame["expert"] == E - 1][["ratio", "kept"]].isna().all(axis=None)  # used by nobody
    figure(frame)
    assert any("kept fewest" in sentence for sentence in findings(frame))


def test_interval_against_drawing_texts(runs):
    """The interval is that of shares recomputed on texts drawn with replacement; texts are segments."""
    (first, _), routed = runs
    row = expert_changes(first, n_resamples=4000, seed=3).iloc[2]
    of_text = [[t for t in range(len(SEQ)) if SEQUENCES["segment_id"][SEQ[t]] == name] for name in "abcd"]
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        tokens = [t for text in random.integers(4, size=4) for t in of_text[text]]
        counts = [
            [sum(row.expert in one[t, 0] for t in tokens), sum(int((one[t, 0] >= 0).sum()) for t in tokens)]
            for one in routed
        ]
        drawn.append(counts[1][0] / counts[1][1] - counts[0][0] / counts[0][1])
    assert [row.low, row.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.012)


def test_only_shared_tokens_count(runs, tmp_path):
    """Of a part of the other run only what both have is compared."""
    (first, second), routed = runs
    frame = expert_changes(first, other=second.only([0, 2]), n_resamples=0)
    tokens = [token for token in range(len(SEQ)) if SEQ[token] in (0, 2)]
    assert (frame["n_tokens"] == len(tokens)).all() and (frame["n_texts"] == 2).all()
    for row in frame.itertuples():
        assert row.n_here == len(users(routed[0], row.layer, row.expert, tokens))
    assert frame[["low", "high", "kept_low", "share_low"]].isna().all(axis=None)


def test_same_run_changes_nothing(runs):
    (first, _), _ = runs
    frame = expert_changes(first, other=first, n_resamples=10)
    assert (frame["difference"] == 0).all() and (frame["kept"].dropna() == 1).all() and (frame["moved"] == 0).all()
    assert findings(frame) == ["first and first choose every expert for the same tokens."]


@pytest.mark.parametrize("case", ["one token", "k = E", "300 experts", "nothing chosen"])
def test_degenerate(case, tmp_path):
    n = 1 if case == "one token" else 4
    n_experts = {"300 experts": 300, "k = E": 3}.get(case, 5)
    seq, sequences = np.zeros(n, int), pd.DataFrame({"segment_id": ["a"]})
    experts = np.tile(np.array([n_experts - 1, 0, 1]), (n, 1, 1))
    if case == "nothing chosen":
        experts[:] = -1
    path = tmp_path / "t.duckdb"
    traces = [record(path, run, experts, n_experts=n_experts, seq=seq, sequences=sequences) for run in ("one", "two")]
    frame = expert_changes(traces[0], n_resamples=5)
    assert len(frame) == n_experts and frame["low"].isna().all()  # a single text has no interval
    figure(frame)
    said = findings(frame)
    assert said == (
        ["Neither one nor two chose any expert for the tokens they share."]
        if case == "nothing chosen"
        else ["one and two choose every expert for the same tokens."]
    )


def test_refused(runs, tmp_path):
    (first, _), _ = runs
    small = record(tmp_path / "s.duckdb", "small", route(1) % 4, n_experts=4)
    with pytest.raises(InputError, match="only runs of one architecture"):
        expert_changes(first, other=small)
    with pytest.raises(InputError, match="which run shall 'small' be compared with"):
        expert_changes(small)
