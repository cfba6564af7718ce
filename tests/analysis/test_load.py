"""Load and balance against loops over tokens."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import Routed, random_trace, write

from workbench import analysis
from workbench.analysis.balance import measure
from workbench.errors import InputError


def counted(routed: Routed, layer: int, lang: str | None = None, every: bool = True) -> Counter:
    """Choices of each expert, by a loop."""
    total = Counter()
    for token, number in enumerate(routed.seq):
        if every or routed.sequences["lang"][number] == lang:
            total.update(int(expert) for expert in routed.experts[token, layer] if expert >= 0)
    return total


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("load") / "t.duckdb")


def test_load_against_loop(routed):
    frame = analysis.load(routed.trace, n_resamples=50)
    assert len(frame) == 2 * 6 and set(frame["group"]) == {"all"}
    for layer in range(2):
        expected = counted(routed, layer)
        part = frame[frame["layer"] == layer].set_index("expert")
        assert part["count"].to_dict() == {expert: expected[expert] for expert in range(6)}
        assert np.allclose(part["share"], part["count"] / sum(expected.values()))
        assert np.allclose(part["load"], 6 * part["share"])
    assert (frame["low"] <= frame["share"]).all() and (frame["share"] <= frame["high"]).all()
    assert (frame["n_tokens"] == len(routed.seq)).all() and (frame["n_texts"] == 8).all()
    pd.testing.assert_frame_equal(frame, analysis.load(routed.trace, n_resamples=50))


def test_load_by_group_leaves_out_what_has_no_label(routed):
    frame = analysis.load(routed.trace, by="lang", n_resamples=10)
    assert set(frame["group"]) == {"en", "de"}
    assert (frame["n_unlabelled"] == 8).all() and (frame["n_sequences"] == 8).all()
    for (group, layer), part in frame.groupby(["group", "layer"]):
        expected = counted(routed, layer, group, every=False)
        assert part.set_index("expert")["count"].to_dict() == {expert: expected[expert] for expert in range(6)}
        assert part["share"].sum() == pytest.approx(1)


def test_position_and_phase(routed):
    frame = analysis.load(routed.trace, by="position", n_resamples=0)
    assert list(dict.fromkeys(frame["group"])) == ["0", "1–3", "4–15"]
    assert frame.drop_duplicates("group").set_index("group")["n_tokens"].sum() == len(routed.seq)
    assert set(analysis.load(routed.trace, by="phase", n_resamples=0)["group"]) == {"prompt"}


def test_unknown_column_is_named(routed):
    with pytest.raises(InputError, match="no 'style'.*lang, domain"):
        analysis.load(routed.trace, by="style")


def gini(shares: list[float]) -> float:
    n = len(shares)
    return sum(abs(a - b) for a in shares for b in shares) / (2 * n * sum(shares))


def test_balance_against_loop(routed):
    frame = analysis.balance(routed.trace, n_resamples=50, dead_below=0.5)
    for layer in range(2):
        total = counted(routed, layer)
        shares = [total[expert] / sum(total.values()) for expert in range(6)]
        mean = sum(shares) / 6
        expected = {
            "normalised_entropy": -sum(p * math.log(p) for p in shares if p) / math.log(6),
            "coefficient_of_variation": math.sqrt(sum((p - mean) ** 2 for p in shares) / 6) / mean,
            "gini": gini(shares),
            "max_violation": max(shares) / mean - 1,
            "dead_experts": sum(p < 0.5 / 6 for p in shares),
        }
        part = frame[frame["layer"] == layer].set_index("measure")["value"]
        assert part.to_dict() == pytest.approx(expected)
    assert (frame["low"] <= frame["value"] + 1e-9).all() and (frame["value"] <= frame["high"] + 1e-9).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any))
def test_balance_laws(counts):
    n = len(counts)
    found = measure(np.array(counts, float), 0.1)
    assert found["gini"] == pytest.approx(gini(counts), abs=1e-9)
    assert -1e-9 <= found["gini"] <= 1 - 1 / n + 1e-9
    assert -1e-9 <= found["max_violation"] <= n - 1 + 1e-9
    assert np.isnan(found["normalised_entropy"]) if n == 1 else 0 <= found["normalised_entropy"] <= 1 + 1e-9
    moved = measure(np.array(counts[::-1], float) * 3, 0.1)  # order and size of the counts don't matter
    assert all(np.allclose(found[name], moved[name], equal_nan=True) for name in found)


def test_even_and_single():
    even = measure(np.full(8, 5.0), 0.1)
    assert even["normalised_entropy"] == pytest.approx(1) and even["dead_experts"] == 0
    assert even["gini"] == pytest.approx(0) and even["max_violation"] == pytest.approx(0)
    single = measure(np.array([9.0, 0, 0, 0]), 0.1)
    assert single["normalised_entropy"] == 0 and single["dead_experts"] == 3
    assert single["gini"] == pytest.approx(0.75) and single["max_violation"] == pytest.approx(3)
    assert all(np.isnan(value) for value in measure(np.zeros(4), 0.1).values())


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 3), (300, 2, 40), (3, 1, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    frame = analysis.load(routed.trace, n_resamples=20)
    assert frame["share"].sum() == pytest.approx(1) and len(frame) == n_experts
    assert frame["low"].isna().all()  # one text has no interval
    if k == n_experts:
        assert np.allclose(frame["load"], 1)
    for name in ("load", "balance"):
        ask, draw = analysis.find(name)
        table = ask(routed.trace, n_resamples=5)
        draw(table)
        assert analysis.file(name).findings(table)


def test_nothing_chosen(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    frame = analysis.load(routed.trace)
    assert frame["share"].isna().all() and (frame["count"] == 0).all()
    assert analysis.balance(routed.trace)["value"].isna().all()
    assert analysis.file("load").findings(frame) == ["No token used any expert."]


def test_find_and_arguments():
    ask, draw = analysis.find("mutual-information")
    assert ask is analysis.mutual_information and callable(draw) and analysis.load is analysis.find("load")[0]
    assert analysis.arguments(ask, {"by": "domain", "n_resamples": "50"}) == {"by": "domain", "n_resamples": 50}
    assert analysis.arguments(analysis.balance, {"dead_below": "0.2"}) == {"dead_below": 0.2}
    with pytest.raises(InputError, match="no analysis 'nope'"):
        analysis.find("nope")
    with pytest.raises(InputError, match="no option 'nope'"):
        analysis.arguments(ask, {"nope": "1"})
    with pytest.raises(InputError, match="whole number"):
        analysis.arguments(ask, {"seed": "x"})
