"""Importance scores against loops over tokens, how they are named and given to others, and bits."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import full_trace, write

from workbench.analysis.importance import NEEDS, allot, figure, findings, importance
from workbench.analysis.importance_difference import importance_difference
from workbench.errors import InputError

E, K, LAYERS = 5, 3, 2
LENGTHS = [4, 6, 1, 7]
SEQ = np.repeat(np.arange(4), LENGTHS)
SEQUENCES = pd.DataFrame({"lang": ["en", "de", None, "en"], "segment_id": list("abcd")})


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    random = np.random.default_rng(7)
    shape = (len(SEQ), LAYERS, K)
    experts = np.argsort(random.random((len(SEQ), LAYERS, E)), axis=2)[..., :K]
    experts[:, 1][experts[:, 1] == 2] = -1  # expert 2 of layer 1 is never chosen
    experts[random.random(shape) < 0.1] = -1
    given = {
        "weights": random.random(shape),
        "norms": random.gamma(2, size=shape),
        "shift": random.random((LAYERS, len(SEQ))),
    }
    given["shift"][1, 5] = np.nan
    both = {"n_experts": E, "seq": SEQ, "sequences": SEQUENCES}
    trace = full_trace(tmp_path_factory.mktemp("importance") / "t.duckdb", experts, **both, **given)
    return trace, experts, given, both


def loop(routed, used, layer: int, expert: int) -> dict:
    """The scores of one expert over the tokens `used`, token by token."""
    trace, experts, given, _ = routed
    weights, shift = trace.weights(layer), given["shift"][layer]
    total = dict.fromkeys(("count", "all", "weight", "all_weight", "norm", "output", "shifted"), 0.0)
    for token in used:
        place = 0  # the file closes gaps between experts
        for rank in range(K):
            if experts[token, layer, rank] < 0:
                continue
            g, norm = float(weights[token, place]), float(given["norms"][token, layer, rank])
            place += 1
            total["all"] += 1
            total["all_weight"] += g
            if experts[token, layer, rank] == expert:
                total["count"] += 1
                total["weight"] += g
                total["norm"] += norm
                total["output"] += g * norm
                total["shifted"] += g * norm * shift[token] if np.isfinite(shift[token]) else 0
    times = max(total["count"], 1)
    return {
        "frequency": total["count"] / total["all"],
        "weighted_frequency": total["weight"] / total["all_weight"],
        "output_norm": total["norm"] / times,
        "weighted_norm": total["output"] / len(used),
        "reap": total["output"] / times,
        "easy_ep": total["shifted"] / sum(np.isfinite(shift[token]) for token in used),
    }


@pytest.mark.parametrize("by", [None, "lang"])
def test_against_loop(routed, by):
    frame = importance(routed[0], by=by, n_resamples=50)
    assert len(frame) == LAYERS * E * (1 if by is None else 2)
    for (group, layer), part in frame.groupby(["group", "layer"]):
        used = [t for t in range(len(SEQ)) if by is None or SEQUENCES["lang"][SEQ[t]] == group]
        expected = {expert: loop(routed, used, layer, expert) for expert in range(E)}
        for name in NEEDS:
            values = part.set_index("expert")[name]
            assert values.to_dict() == pytest.approx({e: row[name] for e, row in expected.items()}, rel=1e-5), name
            order = part.sort_values(name, ascending=False)[f"{name}_rank"].to_numpy()
            assert (np.diff(order) >= 0).all() and order.sum() == E * (E + 1) / 2
        assert part["frequency"].sum() == pytest.approx(1) == part["weighted_frequency"].sum()
    assert (frame["n_unlabelled"] == (0 if by is None else 1)).all() and "bits" not in frame
    several = frame["n_texts"] > 1
    for name in ("frequency", "weighted_norm", "easy_ep"):
        part = frame[several]
        assert (part[f"{name}_low"] <= part[name] + 1e-12).all() and (part[name] <= part[f"{name}_high"] + 1e-12).all()
        assert frame.loc[~several, f"{name}_low"].isna().all()
    unused = frame[(frame["layer"] == 1) & (frame["expert"] == 2)]
    assert (unused[["frequency", "output_norm", "reap", "easy_ep", "count"]] == 0).all(axis=None)
    assert np.isfinite(frame[list(NEEDS)]).all(axis=None)  # as `workbench prune` wants it


def test_interval_of_a_share(routed):
    """Resampled as `load` resamples: the same shares, the same ends."""
    from workbench.analysis.load import load

    frame, loads = importance(routed[0], n_resamples=80, seed=3), load(routed[0], n_resamples=80, seed=3)
    for ours, theirs in (("frequency", "share"), ("frequency_low", "low"), ("frequency_high", "high")):
        np.testing.assert_allclose(frame[ours], loads[theirs], rtol=1e-5)
    pd.testing.assert_frame_equal(frame, importance(routed[0], n_resamples=80, seed=3))


def test_only_what_was_recorded(routed, tmp_path):
    _, experts, given, both = routed
    for number, kept in enumerate([(), ("weights",), ("norms",), ("weights", "norms"), ("norms", "shift")]):
        trace = full_trace(tmp_path / str(number), experts, **both, **{name: given[name] for name in kept})
        frame = importance(trace, n_resamples=5)
        allowed = {name for name, needs in NEEDS.items() if set(needs) <= set(kept)}
        assert set(NEEDS) & set(frame) == allowed and findings(frame)
    bare = full_trace(tmp_path / "bare", experts, **both)
    with pytest.raises(
        InputError, match="easy_ep needs weights and norms and shift.*no weights and no norms and no shift"
    ):
        importance(bare, scores=("frequency", "easy_ep"))
    weighted = full_trace(tmp_path / "weighted", experts, weights=given["weights"], **both)
    with pytest.raises(InputError, match="reap needs weights and norms.*has no norms: .*--record ids,norms,weights"):
        importance(weighted, scores=("reap",))
    with pytest.raises(InputError, match="scores has 'typo'; expected some of frequency, weighted"):
        importance(bare, scores=("typo",))
    with pytest.raises(InputError, match="scores names none"):
        importance(bare, scores=())
    assert set(NEEDS) & set(importance(weighted, scores=("frequency",), n_resamples=0)) == {"frequency"}


def test_renaming_experts_renames_rows(routed, tmp_path):
    _, experts, given, both = routed
    names = np.random.default_rng(1).permutation(E)
    renamed = np.where(experts < 0, -1, names[experts])
    trace = full_trace(tmp_path / "t.duckdb", renamed, **both, **given)
    before, after = (importance(t, n_resamples=20).set_index(["layer", "expert"]) for t in (routed[0], trace))
    for layer in range(LAYERS):
        for expert in range(E):
            a, b = before.loc[layer, expert], after.loc[layer, names[expert]]
            pd.testing.assert_series_equal(a, b, check_names=False)


def test_bits(routed):
    frame = importance(routed[0], bits=3, bits_by="weighted_norm", n_resamples=0)
    for _, part in frame.groupby("layer"):
        assert part["bits"].sum() == 3 * E and part["bits"].between(1, 8).all()
        ordered = part.sort_values("weighted_norm", ascending=False)["bits"].to_numpy()
        assert (np.diff(ordered) <= 0).all()
    default = importance(routed[0], bits=3, n_resamples=0)
    assert default["bits"].equals(importance(routed[0], bits=3, bits_by="easy_ep", n_resamples=0)["bits"])
    with pytest.raises(InputError, match="bits is 9; expected a mean of 1 to 8"):
        importance(routed[0], bits=9)
    with pytest.raises(InputError, match="bits_by is 'reap', but no bits"):
        importance(routed[0], bits_by="reap")
    with pytest.raises(InputError, match="bits_by is 'typo'; expected one of the scores of this table, frequency"):
        importance(routed[0], bits=4, bits_by="typo")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=4), st.floats(1, 8))
def test_bits_are_optimal(scores, mean):
    found = allot(np.array(scores), mean)
    budget = int(mean * len(scores) + 1e-9)
    assert found.sum() == budget and found.min() >= 1 and found.max() <= 8

    def error(bits) -> float:
        return sum(s * 4.0**-b for s, b in zip(scores, bits, strict=True))

    best = min(error(bits) for bits in itertools.product(range(1, 9), repeat=len(scores)) if sum(bits) <= budget)
    assert error(found) == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("experts, n_experts", [([[[0]]], 1), ([[[-1]], [[-1]]], 3), ([[[299, 0]], [[5, 299]]], 300)])
def test_degenerate(tmp_path, experts, n_experts):
    experts = np.array(experts)
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=n_experts, seq=np.arange(len(experts)),
        sequences=pd.DataFrame({"lang": ["en"] * len(experts)}), weights=np.ones(experts.shape),
        norms=np.ones(experts.shape), shift=np.ones((1, len(experts))),
    )  # fmt: skip
    frame = importance(trace, n_resamples=5, bits=4)
    assert len(frame) == n_experts and frame["bits"].sum() == 4 * n_experts
    figure(frame)
    assert (findings(frame) == ["No token used any expert."]) == (experts.max() < 0)


def test_layers_of_different_size(tmp_path):
    texts = pd.DataFrame({"lang": ["en", "de"]})
    experts = [np.array([[0, 1], [1, 0]]), np.array([[4], [3]])]
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=[2, 6], seq=[0, 1], sequences=texts)
    frame = importance(trace, n_resamples=5)
    assert frame.groupby("layer").size().to_dict() == {0: 2, 1: 6}
    assert np.shape(figure(frame).data[0].z) == (2, 6)
    figure(importance(trace, by="lang", n_resamples=0))


def titles(drawn) -> list[str]:
    """What stands above the panels."""
    return [text["text"] for text in drawn.to_dict()["layout"]["annotations"]]


def test_figure_and_findings(routed, tmp_path):
    frame = importance(routed[0], n_resamples=20)
    drawn = figure(frame)
    assert titles(drawn) == [name.replace("_", " ") for name in NEEDS]
    z = np.array(drawn.data[-1].z)  # experts ordered by easy_ep
    assert all((np.diff(row[np.isfinite(row)]) <= 0).all() for row in z)
    share, scores = findings(frame)
    assert (
        share.startswith("By easy ep, the less important half") and "least alike" in scores and "most alike" in scores
    )
    by = figure(importance(routed[0], by="lang", n_resamples=0))
    assert titles(by) == ["en", "de"]
    one = importance(write(tmp_path / "t", routed[1], SEQ, SEQUENCES, E).trace, n_resamples=5)
    assert len(findings(one)) == 1 and "By frequency" in findings(one)[0]


def test_tokens_of_a_filter(routed):
    """`where` counts only its tokens, in every group; a group without any is gone."""
    frame = importance(routed[0], where="lang=en & position=1+", n_resamples=50)
    used = [t for t in range(len(SEQ)) if SEQUENCES["lang"][SEQ[t]] == "en" and t not in np.cumsum([0, *LENGTHS])]
    for _, row in frame.iterrows():
        expected = loop(routed, used, row["layer"], row["expert"])
        assert {name: row[name] for name in NEEDS} == pytest.approx(expected, rel=1e-5)
    assert (frame["n_tokens"] == len(used)).all() and (frame["n_texts"] == 2).all()
    by = importance(routed[0], by="lang", where="lang=en & position=1+", n_resamples=0)
    assert by["group"].unique().tolist() == ["en"]
    assert np.allclose(by[list(NEEDS)], frame[list(NEEDS)])
    with pytest.raises(InputError, match="no sequence has lang 'xx'"):
        importance(routed[0], where="lang=xx")


@pytest.mark.parametrize("score", list(NEEDS))
def test_difference_of_two_sets(routed, score):
    """Each set against the loop; means over tokens that chose the expert are unknown where none did."""
    frame = importance_difference(routed[0], group="lang=en", versus="lang=de", score=score, n_resamples=50)
    en, de = ([t for t in range(len(SEQ)) if SEQUENCES["lang"][SEQ[t]] == lang] for lang in ("en", "de"))
    assert len(frame) == LAYERS * E and frame["n_texts_versus"].eq(1).all() and frame["low"].isna().all()
    for _, row in frame.iterrows():
        sets = [loop(routed, used, row["layer"], row["expert"]) for used in (en, de)]
        if score in ("output_norm", "reap") and not all(one["frequency"] for one in sets):
            assert math.isnan(row["difference"]) and math.isnan(row["p"])
            continue
        assert row["value"] == pytest.approx(sets[0][score], rel=1e-5)
        assert row["value_versus"] == pytest.approx(sets[1][score], rel=1e-5)
        assert row["difference"] == pytest.approx(sets[0][score] - sets[1][score], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("score, planted", [("weighted_norm", 1000.0), ("output_norm", 1000.0), ("reap", 1e-7)])
def test_difference_is_found_in_any_unit(tmp_path, score, planted):
    """Expert 1's output is half as large again where the text is code; nothing else differs."""
    random = np.random.default_rng(5)
    seq = np.repeat(np.arange(40), 10)
    experts = np.argsort(random.random((len(seq), 1, E)), axis=2)[..., :2]
    norms = planted * random.uniform(0.9, 1.1, experts.shape)
    norms[(experts == 1) & (seq % 2 == 0)[:, None, None]] *= 1.5
    trace = full_trace(
        tmp_path / "t.duckdb", experts, n_experts=E, seq=seq, sequences=pd.DataFrame({"domain": ["code", "law"] * 20}),
        norms=norms, weights=np.full(experts.shape, 0.5),
    )  # fmt: skip
    frame = importance_difference(trace, group="domain=code", score=score, n_resamples=200)
    assert frame.index[frame["q"] < 0.01].tolist() == [1] and frame["difference"].idxmax() == 1
    assert frame["versus"].eq("everything else").all()
    ends = frame[["low", "difference", "high"]].to_numpy()[1]
    assert ends[0] > 0 and (np.diff(ends) > 0).all()


def test_difference_errors(routed):
    with pytest.raises(InputError, match="scores has 'size'"):
        importance_difference(routed[0], group="lang=en", score="size")
    with pytest.raises(InputError, match="tokens are both"):
        importance_difference(routed[0], group="lang=en", versus="lang=en,de", score="frequency")
