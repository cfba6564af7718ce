"""Vocabulary specialisation against loops over tokens; ids that decide are found, ids that don't are not."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import choose, full_trace, write
from scipy.stats import binom

from workbench.analysis.vocabulary import (
    chance,
    effective,
    figure,
    findings,
    jackknife,
    reached,
    summary,
    vocabulary,
    wilson,
)
from workbench.errors import InputError


def made(path, *, seed=0, n_texts=12, length=30, n_ids=8, k=2, strength=2.0, n_experts=6, dropped=0.1):
    """Ids with a taste for experts, some places without an expert; an unknown id now and then."""
    random = np.random.default_rng(seed)
    seq = np.repeat(np.arange(n_texts), length)
    ids = random.integers(0, n_ids, len(seq))
    experts = np.stack(
        [choose(random, strength * random.normal(size=(n_ids, n_experts))[ids], k) for _ in range(2)], axis=1
    )
    experts[random.random(experts.shape[:2]) < dropped] = -1
    ids[random.random(len(seq)) < 0.05] = -1
    predicted = random.integers(0, n_ids, len(seq))
    trace = full_trace(
        path, experts, n_experts=n_experts, seq=seq, token_ids=ids, predictions=predicted,
        sequences=pd.DataFrame({"segment_id": [f"s{text // 2}" for text in range(n_texts)]}),
        vocabulary={number: "<b>&\n" if number == 1 else f"w{number}" for number in range(n_ids)},
    )  # fmt: skip
    return trace, experts, seq, ids, predicted


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return made(tmp_path_factory.mktemp("vocabulary") / "t.duckdb")


@pytest.mark.parametrize("kind", ["input", "gold", "predicted"])
@pytest.mark.parametrize("ranks", [0, 1])
def test_against_loop(example, kind, ranks):
    trace, experts, seq, ids, predicted = example
    frame = vocabulary(trace, ids=kind, ranks=ranks, minimum=10)
    for layer in range(2):
        counts, n_tokens, texts = {}, Counter(), {}
        for token in range(len(seq)):
            key = predicted[token] if kind == "predicted" else ids[token]
            if kind == "gold":
                last = token + 1 == len(seq) or seq[token + 1] != seq[token]
                key = -1 if last else ids[token + 1]
            if key < 0:
                continue
            n_tokens[key] += 1
            texts.setdefault(key, set()).add(seq[token] // 2)
            chosen = experts[token, layer][: ranks or None]
            counts.setdefault(key, Counter()).update(int(expert) for expert in chosen if expert >= 0)
        part = frame[frame["layer"] == layer].set_index("token_id")
        assert sorted(part.index) == sorted(key for key in n_tokens if n_tokens[key] >= 10)
        for key, row in part.iterrows():
            best = max(counts[key].values())
            assert row["count"] == best == counts[key][row["expert"]]
            assert row["value"] == pytest.approx(best / n_tokens[key])
            assert row["n_tokens"] == n_tokens[key] and row["n_texts"] == len(texts[key])
            assert 1 <= row["n_effective"] <= row["n_tokens"]
            assert row["low"] <= row["value"] <= row["high"]
        assert part["layer_value"].iloc[0] == pytest.approx(part["value"].mean())
        assert part["layer_low"].iloc[0] <= part["layer_value"].iloc[0] <= part["layer_high"].iloc[0]
    assert (frame["chance"] <= frame["chance_high"]).all() and frame["text"].notna().all()


def test_minimum_and_most(example):
    trace = example[0]
    every = vocabulary(trace, minimum=1)
    assert len(vocabulary(trace, minimum=45)) < len(every) == 2 * 8
    few = vocabulary(trace, minimum=1, most=3)
    numbers = every.drop_duplicates("token_id").set_index("token_id")["n_tokens"].sort_values(ascending=False)
    assert set(few["token_id"]) == set(numbers.index[:3])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.lists(st.floats(0.01, 0.9), min_size=1, max_size=5), st.data())
def test_chance_against_binomials(n, load, data):
    count = data.draw(st.integers(1, n))
    below = np.prod([binom.cdf(count - 1, n, rate) for rate in load])
    found = reached(np.array([float(count)]), np.array([float(n)]), np.array(load))[0]
    assert found == pytest.approx(1 - below, abs=1e-9)


def test_chance_against_simulation():
    random = np.random.default_rng(0)
    load = np.array([0.4, 0.2, 0.2, 0.1, 0.1])
    n = np.array([5.0, 20.0, 200.0])
    median, high = chance(n, load, (0.5, 0.95))
    for at, size in enumerate(n.astype(int)):
        most = random.multinomial(size, load, 4000).max(axis=1) / size
        assert abs(median[at] - np.median(most)) <= 1.2 / size + 0.02
        assert abs(high[at] - np.quantile(most, 0.95)) <= 1.2 / size + 0.02
    nothing = chance(n, np.zeros(3), (0.5,))[0]
    assert np.isnan(nothing).all()


def test_wilson_and_jackknife():
    low, high = wilson(np.array([0.5, 0.0, 1.0]), np.array([100.0, 10.0, 10.0]))
    assert low == pytest.approx([0.4038, 0, 0.7225], abs=1e-3) and high == pytest.approx([0.5962, 0.2775, 1], abs=1e-3)
    ends = jackknife(0.5, np.array([0.4, 0.5, 0.6]))
    half = 4.3027 * np.sqrt(2 / 3 * 0.02)
    assert ends == pytest.approx((max(0, 0.5 - half), min(1, 0.5 + half)), abs=1e-3)
    assert np.isnan(jackknife(0.5, np.array([0.4, np.nan, 0.6]))).all()


def test_effective_number_of_tokens():
    """Tokens of one text that choose alike count once; tokens that don't depend on their text count all."""
    random = np.random.default_rng(1)
    n_ids, n_texts, repeat = 40, 20, 6
    code, text = (grid.ravel() for grid in np.meshgrid(np.arange(n_ids), np.arange(n_texts * repeat) // repeat))
    pairs = {"of_token": code * n_texts + text, "id": np.repeat(np.arange(n_ids), n_texts)}
    pairs |= {"size": np.full(n_ids * n_texts, repeat), "n_texts": np.full(n_ids, n_texts)}
    n_tokens = np.full(n_ids, n_texts * repeat)
    for alike, expected in ((True, n_texts), (False, n_texts * repeat)):
        hit = (random.random(n_ids * n_texts) < 0.4)[pairs["of_token"]] if alike else random.random(len(code)) < 0.4
        experts = np.where(hit, 0, 1).astype(np.uint16)[:, None]
        value = np.bincount(code, hit) / n_tokens
        found = effective(experts, np.zeros(n_ids, int), value, n_tokens, code, pairs)
        assert found.mean() == pytest.approx(expected, rel=0.1)


def test_planted_and_null(tmp_path):
    """Ids 0–3 decide in layer 0, no id does in layer 1, though texts have a taste of their own."""
    random = np.random.default_rng(3)
    seq = np.repeat(np.arange(60), 40)
    ids = random.integers(0, 30, len(seq))
    planted = np.zeros((len(seq), 8))
    planted[np.arange(len(seq)), ids % 8] = np.where(ids < 4, 4.0, 0)
    taste = random.normal(size=(60, 8))[seq] * 0.5
    experts = np.stack([choose(random, planted, 1), choose(random, taste, 1)], axis=1)
    trace = full_trace(
        tmp_path / "t.duckdb",
        experts,
        n_experts=8,
        seq=seq,
        token_ids=ids,
        sequences=pd.DataFrame({"lang": ["en"] * 60}),
    )
    frame = vocabulary(trace)
    first, second = (frame[frame["layer"] == layer].set_index("token_id") for layer in (0, 1))
    assert (first.loc[:3, "q"] < 1e-6).all() and (first.loc[:3, "expert"] == [0, 1, 2, 3]).all()
    assert (first.loc[4:, "q"] > 0.05).mean() > 0.9 and (second["q"] > 0.05).all()
    rows = summary(frame).set_index("layer")
    assert rows["specialised"][0] >= 4 / 30 and rows["specialised"][1] == 0
    assert rows.loc[1, "layer_value"] == pytest.approx(rows.loc[1, "layer_chance"], abs=0.05)
    assert "layer 0" in findings(frame)[0]


def test_noise_is_significant_at_the_nominal_rate(tmp_path):
    random = np.random.default_rng(4)
    seq = np.repeat(np.arange(40), 60)
    load = np.log([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
    experts = choose(random, np.tile(load, (len(seq), 20, 1)).reshape(-1, 6), 1).reshape(len(seq), 20, 1)
    ids = random.integers(0, 80, len(seq))
    trace = full_trace(
        tmp_path / "t.duckdb",
        experts,
        n_experts=6,
        seq=seq,
        token_ids=ids,
        sequences=pd.DataFrame({"lang": ["en"] * 40}),
    )
    frame = vocabulary(trace)
    assert 0.01 <= (frame["p"] <= 0.05).mean() <= 0.06  # p is discrete: the level is not fully used
    assert (frame["value"] <= frame["chance_high"]).mean() >= 0.93
    assert (frame["q"] < 0.05).mean() <= 0.01


def test_errors(tmp_path, example):
    trace = example[0]
    with pytest.raises(InputError, match="ids is 'output'; expected one of input, predicted, gold"):
        vocabulary(trace, ids="output")
    with pytest.raises(InputError, match="no token id occurs 1000 times as gold; lower minimum"):
        vocabulary(trace, ids="gold", minimum=1000)
    with pytest.raises(InputError, match="ranks is -1"):
        vocabulary(trace, ranks=-1)
    with pytest.raises(InputError, match="expected at least 1"):
        vocabulary(trace, minimum=0)
    bare = write(tmp_path / "t.duckdb", np.zeros((3, 1, 1), int), [0, 0, 0], pd.DataFrame({"lang": ["en"]}), 2).trace
    with pytest.raises(InputError, match="doesn't know its token ids.*token_ids"):
        vocabulary(bare)
    with pytest.raises(InputError, match="predictions were not recorded.*--record ids,predictions"):
        vocabulary(bare, ids="predicted")


def test_degenerate(tmp_path):
    """Nothing chosen in layer 0, one expert in layer 1, one text, no texts of ids."""
    experts = [np.full((12, 1), -1), np.zeros((12, 1), int)]
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=[4, 1], seq=[0] * 12, token_ids=[5] * 12, vocabulary={0: "x"},
        sequences=pd.DataFrame({"lang": ["en"]}),
    )  # fmt: skip
    frame = vocabulary(trace, minimum=1).set_index("layer")
    assert np.isnan(frame.loc[0, "value"]) and frame.loc[0, "expert"] == -1 and np.isnan(frame.loc[0, "p"])
    assert frame.loc[1, "value"] == 1 and frame.loc[1, "p"] == 1 and np.isnan(frame.loc[1, "layer_low"])
    assert frame["text"].isna().all()
    shown = figure(frame.reset_index())
    assert "id 5" in shown.to_dict()["data"][-1]["y"][0] and findings(frame.reset_index())
    only = frame.reset_index()
    assert findings(only[only["layer"] == 0]) == ["No token used any expert."]


def test_figure_escapes_tokens(example):
    names = figure(vocabulary(example[0], minimum=1)).to_dict()["data"][-1]["y"]
    assert any("&lt;b&gt;&amp;" in name for name in names) and not any("<b>" in name for name in names)
