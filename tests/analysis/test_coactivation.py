"""Pairs of experts in a layer against loops over tokens; the null against enumeration and simulation."""

import itertools
import math
from collections import Counter
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import Routed, random_trace, write

from workbench.analysis.chance_pairs import chance_pairs
from workbench.analysis.coactivation import coactivation
from workbench.analysis.pairs import Blocks, Pairs, count_pairs, deviation, independent, text_blocks
from workbench.analysis.partners import partners
from workbench.errors import InputError

file = import_module("workbench.analysis.coactivation")
partners_file = import_module("workbench.analysis.partners")


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("coactivation") / "t.duckdb", k=3, n_texts=10)


def looped(routed: Routed, layer: int) -> tuple[Counter, Counter, int]:
    """Pairs, single choices and tokens with any expert, by a loop."""
    pairs, single, tokens = Counter(), Counter(), 0
    for chosen in routed.experts[:, layer]:
        used = [int(expert) for expert in chosen if expert >= 0]
        tokens += bool(used)
        single.update(used)
        pairs.update(itertools.permutations(used, 2))
    return pairs, single, tokens


def test_counts_and_probabilities_against_loop(routed):
    frame = coactivation(routed.trace, n_resamples=50)
    assert len(frame) == 2 * 6 * 5
    for layer in range(2):
        pairs, single, tokens = looped(routed, layer)
        for _, row in frame[frame["layer"] == layer].iterrows():
            i, j = row["expert"], row["other"]
            assert row["count"] == pairs[i, j] and row["n_expert"] == single[i] and row["n_tokens"] == tokens
            assert row["probability"] == pytest.approx(pairs[i, j] / single[i])
            assert row["lift"] == pytest.approx(row["count"] / row["expected"])
    assert (frame["low"] <= frame["probability"] + 1e-9).all() and (frame["probability"] <= frame["high"] + 1e-9).all()
    assert (frame["q"] >= frame["p"] - 1e-12).all() and frame["n_texts"].eq(10).all() and frame["n_blocks"].eq(10).all()
    mirrored = frame.rename(columns={"expert": "other", "other": "expert"}).set_index(["layer", "expert", "other"])
    again = frame.set_index(["layer", "expert", "other"])
    for name in ("count", "expected", "lift", "p", "q"):
        assert np.allclose(again[name], mirrored[name].reindex(again.index), atol=1e-9)
    pd.testing.assert_frame_equal(frame, coactivation(routed.trace, n_resamples=50))


def enumerated(weights: list[float], sizes: dict[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Loads and pairs of sets drawn with probability ∝ the product of weights, by listing all sets."""
    n = len(weights)
    load, pairs = np.zeros(n), np.zeros((n, n))
    for k, tokens in sizes.items():
        sets = list(itertools.combinations(range(n), k))
        total = sum(math.prod(weights[e] for e in chosen) for chosen in sets)
        for chosen in sets:
            p = tokens * math.prod(weights[e] for e in chosen) / total
            load[list(chosen)] += p
            for i, j in itertools.permutations(chosen, 2):
                pairs[i, j] += p
    return load, pairs


@pytest.mark.parametrize(
    "weights, sizes", [([1, 2, 3, 0.5, 7], {2: 100}), ([1, 1, 1, 1], {3: 60}), ([5, 1, 2, 2, 0.1, 1], {1: 30, 3: 80})]
)
def test_chance_is_the_distribution_over_sets(weights, sizes):
    load, pairs = enumerated(weights, sizes)
    counts = np.zeros(max(sizes) + 1, int)
    for k, tokens in sizes.items():
        counts[k] = tokens
    found = chance_pairs(load, counts)
    np.fill_diagonal(found, 0)
    assert np.allclose(found, pairs, rtol=1e-5, atol=1e-5)


def test_chance_in_the_extremes():
    even = chance_pairs(np.full(8, 50), np.array([0, 0, 200]))
    assert np.allclose(even[~np.eye(8, dtype=bool)], 200 * 2 / (8 * 7))  # less than 50 · 50 / 200
    always = chance_pairs(np.array([10, 5, 5, 0]), np.array([0, 0, 10]))
    assert always[0, 1] == pytest.approx(5) and always[1, 2] == pytest.approx(0, abs=1e-6) and always[3].sum() == 0
    everything = chance_pairs(np.full(3, 7), np.array([0, 0, 0, 7]))
    assert np.allclose(everything, 7)
    assert chance_pairs(np.zeros(3, int), np.array([9, 0])).sum() == 0
    one_each = chance_pairs(np.array([3, 4]), np.array([2, 7]))
    assert one_each[0, 1] == 0


def drawn_sets(random: np.random.Generator, n_tokens: int, n_experts: int, k: int) -> np.ndarray:
    """k different experts a token with uneven chances and nothing else: conditional Poisson by rejection."""
    chance = random.uniform(0.1, 0.6, n_experts) * k / n_experts
    rows = []
    while len(rows) < n_tokens:
        chosen = random.random((4096, n_experts)) < chance
        rows += [np.flatnonzero(row) for row in chosen[chosen.sum(axis=1) == k]]
    return np.array(rows[:n_tokens])


def test_noise_is_not_found_and_what_is_planted_is(tmp_path):
    random = np.random.default_rng(0)
    false, tested = 0, 0
    seq = np.repeat(np.arange(60), 20)
    texts = pd.DataFrame({"lang": ["en"] * 60})
    for turn in range(4):
        experts = drawn_sets(random, len(seq), 10, 3)[:, None]
        frame = coactivation(write(tmp_path / f"{turn}.duckdb", experts, seq, texts, 10).trace, n_resamples=0)
        once = frame[frame["expert"] < frame["other"]]
        false += (once["p"] < 0.05).sum()
        tested += len(once)
        assert (once["q"] < 0.05).sum() <= 1
    assert tested == 180 and false <= 18  # 9 expected

    noise = drawn_sets(random, len(seq), 10, 3)
    planted = random.random((len(seq), 1)) < 0.2
    experts = np.where(planted, [2, 7, 0], noise)[:, None]
    frame = coactivation(write(tmp_path / "planted.duckdb", experts, seq, texts, 10).trace, n_resamples=100)
    row = frame[(frame["expert"] == 2) & (frame["other"] == 7)].iloc[0]
    assert row["q"] < 0.01 and row["lift"] > 1.2 and row["lift_low"] > 1


def test_rare_pairs_are_no_certainty():
    """Two tokens are expected in a pair and none is seen, in no block: that is no certainty."""
    left, right = np.zeros((50, 2), int), np.zeros((50, 2), int)
    left[:40, 0], right[:, 0] = 1, 1
    left[:, 1], right[:, 1] = 20 - left[:, 0], 20 - right[:, 0]
    both = np.stack([np.zeros(50, int), left[:, 0], right[:, 0], 20 - left[:, 0] - right[:, 0]], axis=1)
    pairs = Pairs(both.reshape(50, 2, 2), left, right, np.full(50, 20))
    expected = independent(pairs)
    assert expected[0, 0] == pytest.approx(2)
    assert 0.1 < deviation(pairs, expected, np.ones((2, 2)))[0, 0] < 0.3


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_pairs_do_not_depend_on_the_numbers_of_experts(seed):
    random = np.random.default_rng(seed)
    n_experts, k = int(random.integers(2, 8)), 2
    experts = np.argsort(random.random((40, n_experts)), axis=1)[:, :k].astype(np.uint16)
    rename = random.permutation(n_experts).astype(np.uint16)
    block = (np.arange(40) % 4).astype(np.int32)
    blocks = Blocks(block, np.arange(4, dtype=np.int32), 4)
    before = count_pairs(experts, experts, n_experts, n_experts, blocks)
    after = count_pairs(rename[experts], rename[experts], n_experts, n_experts, blocks)
    assert np.array_equal(before.both, after.both[:, rename][:, :, rename])
    sizes = np.array([0, 0, 40])
    load = before.left.sum(axis=0)
    assert np.allclose(
        chance_pairs(load, sizes), chance_pairs(load[np.argsort(rename)], sizes)[np.ix_(rename, rename)], atol=1e-4
    )
    assert chance_pairs(load, sizes).sum() - load.sum() == pytest.approx(40 * k * (k - 1), rel=1e-4)


def test_many_texts_share_blocks(tmp_path):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((300, 1, 5)), axis=2)[..., :2]
    trace = write(tmp_path / "t.duckdb", experts, np.arange(300), pd.DataFrame({"lang": ["en"] * 300}), 5).trace
    blocks = text_blocks(trace)
    assert blocks.n_blocks == 64 and blocks.n_texts == 300 and len(np.unique(blocks.of_token)) == 64
    assert np.bincount(blocks.of_token).max() == 5
    assert text_blocks(trace, 1 << 24).n_blocks == 8  # large tables leave fewer
    frame = coactivation(trace, n_resamples=50)
    assert (frame["n_blocks"] == 64).all() and (frame["n_texts"] == 300).all()


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 3), (2, 1, 6), (300, 2, 40), (3, 2, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    frame = coactivation(routed.trace, n_resamples=5)
    assert len(frame) == n_experts * (n_experts - 1)
    assert frame["low"].isna().all() and frame["p"].isna().all()  # a single text
    if k == n_experts > 1:
        assert np.allclose(frame["lift"], 1) and np.allclose(frame["probability"], 1)
    if k == 1:
        assert frame["lift"].isna().all() and file.findings(frame) == ["No token used two experts of a layer."]
    file.figure(frame)
    assert file.findings(frame)
    found = partners(routed.trace, n_resamples=5)
    assert len(found) == n_experts and (k > 1 or found["partner"].eq(-1).all())
    partners_file.figure(found)
    assert partners_file.findings(found)


def test_dropped_tokens_and_layers_asked_for(tmp_path):
    experts = np.array([[[0, 1], [0, -1]], [[-1, -1], [1, 2]], [[1, 0], [2, 1]]])
    trace = write(tmp_path / "t.duckdb", experts, [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 3).trace
    frame = coactivation(trace, n_resamples=20)
    counts = frame.set_index(["layer", "expert", "other"])["count"]
    assert counts[0, 0, 1] == 2 and counts[1, 1, 2] == 2 and counts[1, 0, 1] == 0
    assert frame.groupby("layer")["n_tokens"].first().tolist() == [2, 3]
    assert coactivation(trace, layers=(1,), n_resamples=0)["layer"].unique().tolist() == [1]
    with pytest.raises(InputError, match="layer 7: .* layers 0 to 1"):
        coactivation(trace, layers=(7,))


def test_partners_against_loop(routed):
    frame = partners(routed.trace, n_resamples=50)
    for layer in range(2):
        pairs, _, _ = looped(routed, layer)
        first = {}
        for expert in range(6):
            own = {other: pairs[expert, other] for other in range(6) if other != expert}
            first[expert] = max(own, key=lambda other: (own[other], -other))
        for _, row in frame[frame["layer"] == layer].iterrows():
            expert = row["expert"]
            own = {other: pairs[expert, other] for other in range(6) if pairs[expert, other]}
            total = sum(own.values())
            assert row["partner"] == first[expert] and row["n_pairs"] == total
            assert row["share"] == pytest.approx(own[first[expert]] / total)
            assert row["mutual"] == (first[first[expert]] == expert)
            effective = math.exp(-sum(n / total * math.log(n / total) for n in own.values()))
            assert row["effective_partners"] == pytest.approx(effective)
    assert (frame["low"] <= frame["share"] + 1e-9).all() and (frame["effective_low"] <= frame["effective_high"]).all()
    assert (frame["expected_partners"] <= 5 + 1e-9).all()
    partners_file.figure(frame)
    assert len(partners_file.findings(frame)) == 2


def test_fixed_partners_with_depth(tmp_path):
    """Layer 0 pairs at random, layer 1 always 0 with 1, 2 with 3, …"""
    random = np.random.default_rng(0)
    first = np.argsort(random.random((600, 8)), axis=1)[:, :2]
    second = random.integers(4, size=600)
    experts = np.stack([first, np.column_stack([2 * second, 2 * second + 1])], axis=1)
    trace = write(tmp_path / "t.duckdb", experts, np.arange(600) // 20, pd.DataFrame({"lang": ["en"] * 30}), 8).trace
    frame = partners(trace, n_resamples=50)
    by_layer = frame.groupby("layer")
    assert np.allclose(frame[frame["layer"] == 1]["effective_partners"], 1)
    assert frame[frame["layer"] == 1]["mutual"].all() and (frame[frame["layer"] == 1]["share"] == 1).all()
    assert by_layer["effective_partners"].median()[0] > 6.5
    assert np.allclose(by_layer["expected_partners"].median(), 7, atol=0.2)


def test_figures(routed):
    drawn = file.figure(coactivation(routed.trace, n_resamples=10))
    assert len(drawn.data) == 2 and drawn.data[0].z.shape == (6, 6)
