"""Contrast of two sets of tokens against loops; planted differences are found, chance is at the stated rate."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import choose, full_trace, random_trace, write

from workbench.analysis import rates
from workbench.analysis.contrast import contrast, figure, findings
from workbench.errors import InputError

QUICK = {"n_resamples": 50, "n_permutations": 99}


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    return random_trace(tmp_path_factory.mktemp("contrast") / "t.duckdb", n_texts=9, strength=0.5)


def tokens_of(routed, column, value) -> list[int]:
    return [token for token, seq in enumerate(routed.seq) if routed.sequences[column][seq] == value]


@pytest.mark.parametrize("group, versus", [("lang=de", "lang=en"), ("domain=a", "domain=b"), ("lang=de", None)])
def test_against_loop(routed, group, versus):
    frame = contrast(routed.trace, group=group, versus=versus, tau=0.05, **QUICK)
    assert len(frame) == 2 * 6
    first = tokens_of(routed, *group.split("="))
    everything = range(len(routed.seq))
    second = [t for t in everything if t not in first] if versus is None else tokens_of(routed, *versus.split("="))
    for _, row in frame.iterrows():
        counts = []
        for tokens in (first, second):
            counts.append(sum(row["expert"] in routed.experts[token, row["layer"]] for token in tokens))
        k, m, n = counts[0], len(first), len(first) + len(second)
        assert [row["count"], row["count_versus"]] == counts
        assert row["rate"] == pytest.approx(counts[0] / len(first))
        assert row["difference"] == pytest.approx(counts[0] / len(first) - counts[1] / len(second))
        assert row["above"] == (row["difference"] > 0.05)
        assert row["n_tokens"] == len(first) and row["n_tokens_versus"] == len(second)
        total = sum(counts)
        if k:
            rice = (math.log2(k / m) + math.log2(n / total)) / math.log2(n / k)
            assert row["npmi"] == pytest.approx(rice)
        elif total:
            assert row["npmi"] == -1
        assert np.sign(round(row["npmi"], 9)) == np.sign(round(row["difference"], 9))
        assert row["low"] <= row["difference"] <= row["high"] and row["npmi_low"] <= row["npmi_high"]
    texts = {routed.sequences["segment_id"][routed.seq[token]] for token in first}
    assert (frame["n_texts"] == len(texts)).all()
    assert frame["p"].between(1 / 100, 1).all() and (frame["q"] >= frame["p"] - 1e-12).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 9), st.integers(1, 9))
def test_npmi_laws(k, other, m, rest):
    """-1 to 1, and 0 exactly where the rates are equal; 1 for an expert that serves the group alone, and all of it."""
    k, other = min(k, m), min(other, rest)
    value = float(rates.npmi(np.array([[k, m], [other, rest]], float))[0])
    if k + other == 0:
        assert math.isnan(value)
        return
    assert -1 <= value <= 1 + 1e-12
    assert np.sign(round(value, 9)) == np.sign(k * rest - other * m)
    assert (abs(value - 1) < 1e-9) == (k == m and other == 0)
    assert (value == -1) == (k == 0)


def test_tokens_and_patterns(tmp_path):
    """Expert 2 serves the token "x" and nothing else, in texts that hold both."""
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(40), 12)
    ids = (random.random(len(seq)) < 0.25).astype(int)
    logits = np.zeros((len(seq), 5))
    logits[:, 2] = np.where(ids == 1, 6, -6)
    experts = choose(random, logits, 2)[:, None]
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=5, seq=seq, sequences=pd.DataFrame({"lang": ["en"] * 40}),
        token_ids=ids, vocabulary={0: "o", 1: "x"},
    )  # fmt: skip
    frame = contrast(trace, group="token=x", **QUICK).set_index("expert")
    assert (frame.loc[[2], ["difference", "npmi"]] > 0.9).all(axis=None) and (frame.loc[[2], "q"] <= 0.05).all()
    assert frame.loc[[0, 1, 3, 4], "difference"].lt(0).all()
    assert frame["n_texts"].iloc[0] <= 40 and frame["versus"].eq("everything else").all()
    same = contrast(trace, group="text~x", versus="token=o", **QUICK).set_index("expert")
    assert np.allclose(same["difference"], frame["difference"])
    assert "expert 2 of layer 0" in findings(frame.reset_index())[1]


def test_planted_and_null(tmp_path):
    """Layer 1 knows code (expert 0), layer 0 knows nothing."""
    random = np.random.default_rng(1)
    seq = np.repeat(np.arange(60), 15)
    planted = np.zeros((len(seq), 8))
    planted[seq % 2 == 0, 0] = 3
    experts = np.stack([choose(random, np.zeros((len(seq), 8)), 2), choose(random, planted, 2)], axis=1)
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"domain": ["code", "law"] * 30}), 8).trace
    frame = contrast(trace, group="domain=code", versus="domain=law", n_resamples=200, n_permutations=999)
    assert (frame.loc[frame["layer"] == 0, "q"] > 0.05).all()
    top = frame.loc[frame["difference"].idxmax()]
    assert (top["layer"], top["expert"]) == (1, 0) and top["q"] < 0.02 and top["low"] > 0.3
    text = findings(frame)
    assert "expert 0 of layer 1" in text[1]
    nothing = findings(contrast(trace, group="domain=code", versus="domain=law", n_permutations=0, n_resamples=0))
    assert "No expert" in nothing[0]


def noise(random, n_texts, lengths, shared):
    """Two sets of tokens of texts that differ from each other, but not by set; of unlike lengths, or in one text."""
    long = np.concatenate([random.integers(1, 2 * length, n_texts) for length in lengths]).astype(float)
    taste = random.beta(3, 9, (n_texts if shared else 2 * n_texts, 3))
    taste = np.tile(taste, (2, 1)) if shared else taste
    group = np.repeat([0, 1], n_texts)
    text = np.tile(np.arange(n_texts), 2) if shared else np.arange(2 * n_texts)
    return random.binomial(long[:, None].astype(int), taste).astype(float), long, group, text


@pytest.mark.parametrize("lengths", [(20, 20), (6, 120)])
@pytest.mark.parametrize("shared", [False, True])
def test_noise_is_significant_at_the_nominal_rate(lengths, shared):
    random = np.random.default_rng(2)
    p = [rates.chance(*noise(random, 30, lengths, shared), 99, trial) for trial in range(150)]
    assert 0.02 <= (np.array(p) <= 0.05).mean() <= 0.085


def test_shuffles_and_signs_against_enumeration():
    """With few texts every arrangement can be listed."""
    activations, n_tokens = np.array([[5.0], [4.0], [1.0], [0.0], [2.0]]), np.array([6.0, 7.0, 8.0, 3.0, 9.0])
    group = np.array([0, 0, 1, 1, 1])
    rows = np.column_stack(
        [activations, activations**2, activations * n_tokens[:, None], n_tokens, n_tokens**2, [1] * 5]
    )

    def statistic(chosen):
        member = np.isin(np.arange(5), chosen).astype(float)
        return float(rates.studentised(member @ rows, rows.sum(axis=0), 1)[0])

    def slow(chosen):
        total, variance = 0.0, 0.0
        for sign, part in ((1, chosen), (-1, [i for i in range(5) if i not in chosen])):
            n = sum(n_tokens[i] for i in part)
            rate = sum(activations[i, 0] for i in part) / n
            squares = sum((activations[i, 0] - rate * n_tokens[i]) ** 2 for i in part)
            variance += squares / n**2 * len(part) / (len(part) - 1)
            total += sign * rate
        return abs(total) / math.sqrt(variance)

    pairs = [(i, j) for i in range(5) for j in range(i)]
    assert [statistic(pair) for pair in pairs] == pytest.approx([slow(pair) for pair in pairs])
    exact = np.mean([slow(pair) >= slow((0, 1)) - 1e-9 for pair in pairs])
    p = rates.chance(activations, n_tokens, group, np.arange(5), 4999, 0)[0]
    assert p == pytest.approx(exact, abs=0.03)

    text = np.array([0, 1, 0, 1, 2])
    together = activations.sum() / n_tokens.sum()
    parts = [0.0, 0.0, 0.0]
    for i in range(5):
        size = n_tokens[group == group[i]].sum()
        parts[text[i]] += (1 - 2 * group[i]) * (activations[i, 0] - together * n_tokens[i]) / size
    assert sum(parts) == pytest.approx(9 / 13 - 3 / 20)
    flips = [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    sums = [abs(sum(s * x for s, x in zip(flip, parts, strict=True))) for flip in flips]
    exact = np.mean([value >= sum(parts) - 1e-9 for value in sums])
    assert rates.chance(activations, n_tokens, group, text, 4999, 0)[0] == pytest.approx(exact, abs=0.03)


def test_errors(routed):
    with pytest.raises(InputError, match="give group="):
        contrast(routed.trace)
    with pytest.raises(InputError, match="tokens are both 'lang=de' and 'domain=a'"):
        contrast(routed.trace, group="lang=de", versus="domain=a")
    with pytest.raises(InputError, match="nothing is left to compare"):
        contrast(routed.trace, group="phase=prompt")
    with pytest.raises(InputError, match="no sequence has lang 'xx'"):
        contrast(routed.trace, group="lang=xx")


def test_degenerate(tmp_path):
    seq, both = [0, 0, 1, 1, 2], pd.DataFrame({"lang": ["en", "de", "de"]})
    # one expert, and none at all; a single text on one side
    for number, experts in enumerate(([0, 0, 0, 0, 0], [-1, -1, -1, -1, -1], [0, -1, 1, -1, 1])):
        trace = write(tmp_path / f"{number}.duckdb", np.array(experts)[:, None, None], seq, both, 3).trace
        frame = contrast(trace, group="lang=en", versus="lang=de", **QUICK)
        assert frame["low"].isna().all() and frame["npmi_low"].isna().all()
        assert frame["n_texts"].eq(1).all() and frame["n_texts_versus"].eq(2).all()
        assert frame.loc[frame["count"] + frame["count_versus"] == 0, ["npmi", "p"]].isna().all(axis=None)
        figure(frame)
        assert findings(frame)
        if number == 0:
            assert frame["difference"].eq(0).all() and frame["p"].isna().all()


def test_same_seed_same_table(routed):
    one, two = (contrast(routed.trace, group="lang=de", versus="lang=en", **QUICK) for _ in range(2))
    pd.testing.assert_frame_equal(one, two)
    shown = figure(one)
    assert np.shape(shown.data[0]["z"]) == (2, 6)
    assert "lang=de minus lang=en" in shown.to_dict()["layout"]["annotations"][0]["text"]


def test_hostile_filter_is_escaped(tmp_path):
    sequences = pd.DataFrame({"lang": ["<script>", "en"]})
    trace = write(tmp_path / "t.duckdb", np.arange(4)[:, None, None], [0, 0, 1, 1], sequences, 4).trace
    frame = contrast(trace, group="lang=<script>", **QUICK)
    assert "<script>" not in figure(frame).to_dict()["layout"]["annotations"][0]["text"]


@pytest.mark.parametrize("shared", [False, True])
def test_chance_with_a_divisor_for_each_expert(shared):
    """As if every expert stood alone; one that can't be divided in a set is not tested."""
    random = np.random.default_rng(3)
    activations, long, group, text = noise(random, 12, (20, 40), shared)
    activations[group == 0, 0] += long[group == 0] / 2
    divisors = np.column_stack([long, random.integers(1, 50, len(long)), np.where(group == 0, 0, long)])
    together = rates.chance(activations, divisors, group, text, 99, 0)
    for expert in (0, 1):
        alone = rates.chance(activations[:, [expert]], divisors[:, expert], group, text, 99, 0)
        assert together[expert] == pytest.approx(alone[0])
    assert together[0] <= 0.05 and math.isnan(together[2])


@pytest.mark.parametrize("shared", [False, True])
def test_noise_with_a_divisor_for_each_expert_is_significant_at_the_nominal_rate(shared):
    random = np.random.default_rng(4)
    p = []
    for trial in range(150):
        used, _, group, text = noise(random, 30, (20, 60), shared)
        taste = random.gamma(20, 1 / 20, used.shape)
        p.append(rates.chance(used * taste, used, group, text, 99, trial))
    assert 0.02 <= (np.array(p) <= 0.05).mean() <= 0.085
