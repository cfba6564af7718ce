"""SCH against one cache stepped by hand, and against numbers of the authors' scripts."""

import numpy as np
import pandas as pd
import pytest
from one_cache import brute
from routed import WHOLE, Routed, full_trace, numbered, random_trace, write

from workbench.analysis.segment_cache import figure, findings, segment_cache
from workbench.errors import InputError

TOKENS = [
    [0, 5], [3, 1], [5, 3], [0, 5], [0, 5], [6, 4], [5, 3], [2, 0], [5, 3], [1, 6], [2, 0], [2, 0], [2, 0], [0, 5],
    [4, 2], [1, 6], [3, 1], [4, 2], [5, 3], [4, 2], [2, 0], [0, 5], [3, 1], [5, 3],
]  # fmt: skip
PUBLISHED = {
    "lru": [7, 15, 22, 28, 36, 43, 48],
    "lfu": [7, 13, 24, 32, 37, 43, 48],
    "belady": [7, 21, 30, 37, 42, 45, 48],
    "sch-2": [7, 20, 28, 34, 38, 43, 48],
    "sch-4": [7, 19, 29, 37, 41, 45, 48],
    "sch-8": [7, 19, 29, 35, 39, 43, 48],
}
"""Hits at capacities 1 to 7 that calc_fsf, calc_lru, calc_lfu and calc_beladi of moe-lrc (commit 7b3ca46) count."""


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("segment") / "t.duckdb", n_experts=7, k=2, dropped=0.2)


def runs_of(routed: Routed, layer: int) -> list[list[list[int]]]:
    split = [routed.experts[routed.seq == number, layer] for number in range(len(routed.sequences))]
    return [[[int(expert) for expert in row if expert >= 0] for row in text] for text in split]


def test_compatible_count_is_that_of_the_published_scripts(tmp_path):
    experts = np.array(TOKENS * 2)[:, None]
    sequences = pd.DataFrame({"lang": ["en", "de"]})
    trace = write(tmp_path / "t.duckdb", experts, np.repeat([0, 1], 24), sequences, 7).trace
    frame = segment_cache(trace, windows=(2, 4, 8), ratios=tuple(c / 2 for c in range(1, 8)), n_resamples=0)
    part = frame[(frame["layer"] == 0) & (frame["count"] == "compatible")]
    for policy, hits in PUBLISHED.items():
        found = part[part["policy"] == policy]
        assert found["capacity"].tolist() == list(range(1, 8))
        assert (found["hits"] / 2).tolist() == hits
        assert np.allclose(found["share_of_belady"], np.array(hits) / PUBLISHED["belady"])


@pytest.mark.parametrize("access", ["snapshot", "token"])
def test_against_loop(routed, access):
    ratios = (0.5, 1.0, 1.5, 3.0, 9.0)
    frame = segment_cache(routed.trace, windows=(2, 5), ratios=ratios, access=access, n_resamples=30)
    places = numbered(frame).set_index(["layer", "policy", "count", "ratio"])
    for policy, name, span in (("sch-2", "lookahead", 2), ("sch-5", "lookahead", 5), ("lfu", "lfu", 1)):
        for ratio, capacity in zip(ratios, (1, 2, 3, 6, 7), strict=True):
            total = {"honest": 0, "compatible": 0}
            for layer in range(2):
                row = places.loc[(layer, policy, "honest", ratio)]
                assert row["capacity"] == capacity and row["window"] == (span if name == "lookahead" else 0)
                if access == "token" and capacity < 2:
                    assert np.isnan(row["hit_rate"])
                    continue
                runs = runs_of(routed, layer)
                hits, free, first = brute(runs, capacity, name, access=access, keep=False, span=span)
                accesses = sum(len(event) for run in runs for event in run)
                assert row["hits"] == hits and row["accesses"] == accesses and row["first_touches"] == first
                assert places.loc[(layer, policy, "compatible", ratio), "hits"] == hits + free
                total["honest"] += hits
                total["compatible"] += hits + free
            for count, hits in total.items():
                if access == "snapshot" or capacity > 1:
                    row = places.loc[(WHOLE, policy, count, ratio)]
                    assert row["hits"] == hits and row["capacity"] == 2 * capacity and row["n_experts"] == 14
    known = frame[frame["hit_rate"].notna()]
    assert (known["low"] <= known["hit_rate"] + 1e-9).all() and (known["hit_rate"] <= known["high"] + 1e-9).all()
    pairs = known.pivot_table(index=["layer", "policy", "ratio"], columns="count", values="hit_rate")
    assert (pairs["compatible"] >= pairs["honest"]).all()
    assert figure(frame) and len(findings(frame)) == 2


def test_one_cache_for_all_layers(routed):
    frame = segment_cache(routed.trace, windows=(3,), ratios=(1.0, 2.0), scope="global", n_resamples=0)
    assert set(frame["scope"]) == {"global"} and set(frame["capacity"]) == {4, 8}
    joint = []
    for first, second in zip(runs_of(routed, 0), runs_of(routed, 1), strict=True):
        joint.append([a + [e + 7 for e in b] for a, b in zip(first, second, strict=True)])
    hits, free, _ = brute(joint, 8, "lookahead", access="snapshot", keep=False, span=3)
    found = frame[(frame["policy"] == "sch-3") & (frame["ratio"] == 2)].set_index("count")["hits"]
    assert found.to_dict() == {"honest": hits, "compatible": hits + free}
    figure(frame)
    assert "one cache for all layers" in findings(frame)[0]


def test_paper_text_leaves_no_choice_at_ratio_1(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", dropped=0)
    frame = segment_cache(routed.trace, windows=(4,), ratios=(1.0,), access="token", n_resamples=0)
    assert (frame.groupby(["layer", "count"])["hit_rate"].nunique() == 1).all()


def test_without_baselines(routed):
    frame = segment_cache(routed.trace, windows=(16, 16, 4), baselines=False, n_resamples=5)
    assert list(dict.fromkeys(frame["policy"])) == ["sch-16", "sch-4"] and frame["share_of_belady"].isna().all()
    assert len(findings(frame)) == 1
    figure(frame)


def test_longer_windows_than_texts_and_layers_of_different_size(tmp_path):
    random = np.random.default_rng(2)
    ids = [np.argsort(random.random((9, 5)), axis=1)[:, :2], np.argsort(random.random((9, 3)), axis=1)[:, :1]]
    sequences = pd.DataFrame({"lang": ["en"] * 3})
    seq = np.repeat([0, 1, 2], [1, 3, 5])
    trace = full_trace(tmp_path / "t.duckdb", ids, n_experts=[5, 3], seq=seq, sequences=sequences)
    frame = segment_cache(trace, windows=(5, 1000), ratios=(1.0, 5.0), n_resamples=5)
    hits = frame.set_index(["policy", "layer", "ratio", "count"])["hits"]
    assert hits["sch-5"].equals(hits["sch-1000"])
    assert frame[frame["layer"].isna()].set_index("ratio")["capacity"].to_dict() == {1.0: 3, 5.0: 8}
    figure(frame)


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 3), (300, 2, 40), (3, 1, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    frame = segment_cache(routed.trace, n_resamples=5)
    assert frame["low"].isna().all() and frame["hit_rate"].notna().all()
    figure(frame)
    assert findings(frame)


def test_nothing_chosen(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    frame = segment_cache(routed.trace)
    assert frame["hit_rate"].isna().all() and findings(frame) == ["No token used any expert."]
    figure(frame)


def test_too_small_for_a_token(routed):
    frame = segment_cache(routed.trace, ratios=(0.5,), access="token", n_resamples=0)
    assert "larger ratios" in findings(frame)[0]
    figure(frame)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"windows": ()}, "windows are"),
        ({"windows": (4, 0)}, r"windows are \(4, 0\)"),
        ({"ratios": ()}, "ratios are"),
        ({"ratios": (1.0, -2.0)}, "each above 0"),
        ({"access": "x"}, "access is 'x'"),
        ({"scope": "x"}, "scope is 'x'"),
    ],
)
def test_refused(routed, options, said):
    with pytest.raises(InputError, match=said):
        segment_cache(routed.trace, **options)
