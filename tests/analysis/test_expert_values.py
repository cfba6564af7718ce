"""Values of experts against loops over assignments, and against the analyses that have some of them."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from routed import Routed, full_trace, random_trace, write

from workbench import analysis
from workbench.analysis.expert_values import MEASURES, figure, findings
from workbench.errors import InputError


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("values") / "t.duckdb", n_texts=10)


def counted(routed: Routed, layer: int) -> Counter:
    """Assignments of each (language or None, expert), by a loop."""
    total = Counter()
    for token, number in enumerate(routed.seq):
        lang = routed.sequences["lang"][number]
        total.update((lang, int(expert)) for expert in routed.experts[token, layer] if expert >= 0)
    return total


@pytest.mark.parametrize("layer", [0, 1])
def test_against_loop(routed, layer):
    frame = analysis.expert_values(routed.trace, by="lang", n_resamples=50)
    frame = frame[frame["layer"] == layer].set_index(["group", "expert"])
    total = counted(routed, layer)
    labels = ("de", "en")
    everything = total.total()
    labelled = sum(total[label, expert] for label in labels for expert in range(6))
    for expert in range(6):
        row = frame.loc["all", expert]
        count = sum(number for (_, one), number in total.items() if one == expert)
        assert row["count"] == count and row["share"] == pytest.approx(count / everything)
        assert row["load"] == pytest.approx(6 * count / everything)
        of_expert = sum(total[label, expert] for label in labels)
        information = 0.0
        for label in labels:
            of_label = sum(total[label, other] for other in range(6))
            joint = total[label, expert]
            if joint:
                information += joint / labelled * math.log(joint * labelled / (of_label * of_expert))
            group = frame.loc[label, expert]
            assert group["count"] == joint and group["share"] == pytest.approx(joint / of_label)
            assert group["lift"] == pytest.approx(joint / of_label / (of_expert / labelled))
        assert row["information"] == pytest.approx(information, abs=1e-12)
        assert row["divergence"] == pytest.approx(information * labelled / of_expert, abs=1e-12)
    assert frame.loc["all", "lift"].isna().all() and frame.loc["de", "information"].isna().all()


def test_other_analyses_agree(routed):
    frame = analysis.expert_values(routed.trace, by="lang", n_resamples=20)
    whole = frame[frame["group"] == "all"]
    load = analysis.load(routed.trace, n_resamples=20)
    assert np.allclose(whole["share"], load["share"]) and whole["count"].tolist() == load["count"].tolist()
    told = analysis.mutual_information(routed.trace, "lang", n_resamples=20, n_permutations=20)
    by_layer = whole.groupby("layer")["information"].sum()
    assert np.allclose(by_layer, told["mutual_information"])
    special = analysis.specialization(routed.trace, "lang", n_resamples=20, n_permutations=20)
    keys = ["group", "layer", "expert"]
    both = special.merge(frame, on=keys, suffixes=("_known", ""))
    assert len(both) == 24 and np.allclose(both["relative"], both["lift"], equal_nan=True)


def test_mean_weights(tmp_path):
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(6), 10)
    experts = np.stack([random.permutation(4)[:2] for _ in seq])[:, None]
    experts[random.random(experts.shape) < 0.1] = -1
    gates = np.where(experts < 0, 0, random.random(experts.shape)).astype(np.float32)
    sequences = pd.DataFrame({"lang": ["a", "b", "a", "b", "a", None]})
    trace = full_trace(tmp_path / "t.duckdb", experts, n_experts=4, seq=seq, sequences=sequences, weights=gates)
    frame = analysis.expert_values(trace, by="lang", weights=True, n_resamples=50).set_index(["group", "expert"])
    chosen, kept = trace.experts(0), trace.weights(0)
    for group in ("all", "a", "b"):
        here = np.ones(60, bool) if group == "all" else sequences["lang"].to_numpy()[seq] == group
        for expert in range(4):
            mine = kept[here][chosen[here] == expert]
            row = frame.loc[group, expert]
            assert row["mean_weight"] == pytest.approx(mine.mean(), rel=1e-5)
            assert row["mean_weight_low"] <= row["mean_weight"] <= row["mean_weight_high"]
    assert analysis.expert_values(trace, n_resamples=5)["mean_weight"].isna().all()


def test_sizes_and_intervals(routed):
    frame = analysis.expert_values(routed.trace, by="lang", n_resamples=200)
    sizes = frame.groupby("group", sort=False)[["n_tokens", "n_sequences", "n_texts"]].first()
    assert list(sizes.index) == ["all", "de", "en"]
    lang = routed.sequences["lang"].to_numpy()[routed.seq]
    assert sizes["n_tokens"].tolist() == [len(lang), (lang == "de").sum(), (lang == "en").sum()]
    assert sizes["n_sequences"].tolist() == [30, 10, 10] and (sizes["n_texts"] == 10).all()
    for name in ("share", "load", "lift"):
        known = frame[frame[name].notna()]
        assert (known[f"{name}_low"] <= known[name] + 1e-9).all() and (
            known[name] <= known[f"{name}_high"] + 1e-9
        ).all()
    load = analysis.load(routed.trace, n_resamples=2000)
    whole = frame[frame["group"] == "all"].reset_index(drop=True)
    wide = (whole["share_high"] - whole["share_low"]) / (load["high"] - load["low"])
    assert wide.between(0.6, 1.6).all()


def test_groups_alike_tell_nothing(tmp_path):
    experts = np.tile([0, 1, 2, 3], 20)[:, None, None]
    seq = np.repeat(np.arange(20), 4)
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": ["a", "b"] * 10}), 4).trace
    frame = analysis.expert_values(trace, by="lang", n_resamples=20)
    whole = frame[frame["group"] == "all"]
    assert np.allclose(whole["information"], 0) and np.allclose(whole["divergence"], 0)
    assert np.allclose(frame.loc[frame["group"] == "a", "lift"], 1)


def test_an_expert_of_one_group(tmp_path):
    """Divergence is at most -log p(g), reached where only g uses the expert."""
    lang = np.array(["a"] * 5 + ["b"] * 15)
    seq = np.repeat(np.arange(20), 4)
    experts = np.where(lang[seq] == "a", 0, 1)[:, None, None]
    trace = write(tmp_path / "t.duckdb", experts, seq, pd.DataFrame({"lang": lang}), 3).trace
    whole = analysis.expert_values(trace, by="lang", n_resamples=20).query("group == 'all'")
    assert np.allclose(whole["divergence"], [math.log(4), math.log(20 / 15), np.nan], equal_nan=True)
    assert whole["information"].sum() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert "Expert 0 of layer 0 tells most" in findings(analysis.expert_values(trace, by="lang", n_resamples=20))[1]


def test_layers_of_different_sizes_and_degenerate_traces(tmp_path):
    layers = [np.zeros((4, 1), int), np.array([[299, 1], [299, 2], [0, 299], [-1, -1]])]
    trace = full_trace(tmp_path / "t.duckdb", layers, n_experts=[2, 300], seq=[0, 0, 1, 1],
                       sequences=pd.DataFrame({"lang": ["a", "a"]}))  # fmt: skip
    frame = analysis.expert_values(trace, by="position", n_resamples=5)
    whole = frame[frame["group"] == "all"]
    assert len(whole) == 302 and whole["count"].sum() == 4 + 6
    assert whole.set_index(["layer", "expert"]).loc[(1, 299), "load"] == pytest.approx(300 * 3 / 6)
    assert len(figure(frame).data) == 1 and "busiest expert is number 299 of layer 1" in findings(frame)[0]
    assert "300 of 302 experts" not in findings(frame)[0]
    dropped = write(tmp_path / "d.duckdb", np.full((3, 1, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["a", "b"]}), 4)
    frame = analysis.expert_values(dropped.trace, by="lang", n_resamples=5)
    assert frame["share"].isna().all() and (frame["count"] == 0).all()
    assert findings(frame) == ["No token used any expert."]
    figure(frame)
    empty = dropped.trace.only([])
    assert (analysis.expert_values(empty, n_resamples=5)["n_tokens"] == 0).all()


def test_one_text_has_no_interval(tmp_path):
    trace = write(tmp_path / "t.duckdb", np.array([[[0]], [[1]]]), [0, 0], pd.DataFrame({"lang": ["a"]}), 2).trace
    frame = analysis.expert_values(trace, n_resamples=20)
    assert frame[[f"{name}_{end}" for name in MEASURES for end in ("low", "high")]].isna().all(axis=None)


def test_without_resamples_the_values_have_no_interval(routed):
    frame, full = (analysis.expert_values(routed.trace, by="lang", n_resamples=n) for n in (0, 5))
    for name in MEASURES:
        assert frame[name].equals(full[name]) and frame[[f"{name}_low", f"{name}_high"]].isna().all(axis=None)


def test_errors(routed):
    with pytest.raises(InputError, match="no 'height'"):
        analysis.expert_values(routed.trace, by="height")
    with pytest.raises(InputError, match="weights were not recorded"):
        analysis.expert_values(routed.trace, weights=True)
