"""Specialisation and mutual information against loops over tokens; what is planted is found, noise is not."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import Routed, choose, random_trace, write

from workbench import analysis
from workbench.analysis.mutual_information import nats
from workbench.analysis.resampling import permuted_sums
from workbench.errors import InputError

QUICK = {"n_resamples": 50, "n_permutations": 99}


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    return random_trace(tmp_path_factory.mktemp("specialization") / "t.duckdb", n_texts=10)


def joint(routed: Routed, layer: int, by: str = "lang") -> Counter:
    """Choices of each (label, expert), by a loop; sequences without a label are left out."""
    total = Counter()
    for token, number in enumerate(routed.seq):
        label = routed.sequences[by][number]
        if pd.notna(label):
            total.update((label, int(expert)) for expert in routed.experts[token, layer] if expert >= 0)
    return total


def test_specialization_against_loop(routed):
    frame = analysis.specialization(routed.trace, "lang", **QUICK)
    assert len(frame) == 2 * 2 * 6
    for layer in range(2):
        total = joint(routed, layer)
        for _, row in frame[frame["layer"] == layer].iterrows():
            group = sum(count for (label, _), count in total.items() if label == row["group"])
            overall = sum(count for (_, expert), count in total.items() if expert == row["expert"])
            share = total[row["group"], row["expert"]] / group
            assert row["count"] == total[row["group"], row["expert"]]
            assert row["share"] == pytest.approx(share)
            assert row["lift"] == pytest.approx(6 * share)
            assert row["relative"] == pytest.approx(share / (overall / sum(total.values())))
    assert np.allclose(frame.groupby(["group", "layer"])["share"].sum(), 1)
    assert (frame["low"] <= frame["share"]).all() and (frame["share"] <= frame["high"]).all()
    assert frame["p"].between(2 / 100, 1).all() and (frame["q"] >= frame["p"]).all()
    assert (frame["n_unlabelled"] == 10).all()


def information(total: Counter) -> float:
    n = sum(total.values())
    groups, experts = Counter(), Counter()
    for (label, expert), count in total.items():
        groups[label] += count
        experts[expert] += count
    return sum(
        count / n * math.log(count * n / (groups[label] * experts[expert]))
        for (label, expert), count in total.items() if count
    )  # fmt: skip


@pytest.mark.parametrize("by", ["lang", "domain"])
def test_mutual_information_against_loop(routed, by):
    frame = analysis.mutual_information(routed.trace, by, **QUICK)
    for layer in range(2):
        total = joint(routed, layer, by)
        row = frame.loc[layer]
        assert row["mutual_information"] == pytest.approx(information(total))
        groups = Counter()
        for (label, _), count in total.items():
            groups[label] += count
        entropy = -sum(c / sum(groups.values()) * math.log(c / sum(groups.values())) for c in groups.values())
        assert row["label_entropy"] == pytest.approx(entropy)
        assert row["normalised"] == pytest.approx(row["mutual_information"] / entropy)
        assert row["low"] <= row["mutual_information"] <= row["high"]
    assert frame["n_groups"].eq(2 if by == "lang" else 3).all()


def test_labels_can_stay_within_a_text(routed):
    """Shuffling languages among the translations of each text holds the content fixed."""
    frame = analysis.mutual_information(routed.trace, "lang", within="segment_id", **QUICK)
    assert (frame["within"] == "segment_id").all() and (frame["null_mean"] < frame["mutual_information"]).all()


tables = st.integers(2, 5).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 20), min_size=width, max_size=width), min_size=2, max_size=5)
)


@settings(max_examples=150, deadline=None)
@given(tables.filter(lambda rows: any(map(any, rows))), st.randoms())
def test_information_laws(rows, random):
    counts = np.array(rows, float)
    value = float(nats(counts))
    cells = Counter({(group, expert): count for group, row in enumerate(rows) for expert, count in enumerate(row)})
    assert value == pytest.approx(information(cells), abs=1e-9)
    p = counts.sum(axis=1) / counts.sum()
    assert -1e-12 <= value <= min(math.log(counts.shape[1]), -sum(x * math.log(x) for x in p if x)) + 1e-9
    assert float(nats(counts.T)) == pytest.approx(value, abs=1e-9)
    shuffled = counts[random.sample(range(len(rows)), len(rows))][:, ::-1]
    assert float(nats(shuffled)) == pytest.approx(value, abs=1e-9)
    assert float(nats(np.outer(counts.sum(axis=1), counts.sum(axis=0)))) == pytest.approx(0, abs=1e-9)


def test_planted_structure_is_found(tmp_path):
    """Expert 3 of layer 1 serves German only; layer 0 knows nothing of language."""
    random = np.random.default_rng(1)
    sequences = pd.DataFrame({"lang": ["de", "en"] * 30})
    seq = np.repeat(np.arange(60), 20)
    plain = np.zeros((len(seq), 8))
    german = plain.copy()
    german[:, 3] = np.where(seq % 2 == 0, 3, -3)
    experts = np.stack([choose(random, plain, 2), choose(random, german, 2)], axis=1)
    trace = write(tmp_path / "t.duckdb", experts, seq, sequences, 8).trace
    frame = analysis.specialization(trace, "lang", n_resamples=100, n_permutations=999)
    assert (frame.loc[frame["layer"] == 0, "q"] > 0.05).all()
    found = frame[(frame["layer"] == 1) & (frame["q"] < 0.05) & (frame["relative"] > 1)]
    assert ("de", 3) in set(zip(found["group"], found["expert"], strict=True))
    top = found.loc[found["relative"].idxmax()]
    assert (top["group"], top["expert"]) == ("de", 3) and top["relative"] > 1.5
    info = analysis.mutual_information(trace, "lang", n_resamples=100, n_permutations=199)
    assert info["p"].tolist()[1] <= 0.005 and info["p"].tolist()[0] > 0.05
    assert info["mutual_information"][1] > 10 * info["null_mean"][1]
    assert "layer 1" in analysis.file("mutual_information").findings(info)[0]


@pytest.mark.parametrize("stratified", [False, True])
def test_noise_is_significant_at_the_nominal_rate(stratified):
    """Texts differ from each other (so tokens aren't independent), but not by label within a stratum."""
    random = np.random.default_rng(5)
    group = np.repeat([0, 1, 2], 12)
    strata = np.where(group == 0, 0, np.arange(36) % 2) if stratified else np.zeros(36, int)
    hits = 0
    for trial in range(200):
        taste = random.dirichlet(np.full(6, 2.0), 36) + 3 * np.eye(6)[strata]  # the strata differ, if there are two
        rows = np.stack([random.multinomial(40, p / p.sum()) for p in taste]).astype(float)
        value = nats(np.stack([rows[group == label].sum(axis=0) for label in range(3)]))
        sums = permuted_sums(rows, group, 3, 99, trial, strata if stratified else None)
        null = np.concatenate([nats(chunk) for chunk in sums])
        hits += (1 + (null >= value).sum()) / 100 <= 0.05
    assert 0.01 <= hits / 200 <= 0.09


def test_strata_take_away_what_composition_explains(tmp_path):
    """Source a is German and uses expert 0, source b is half and half and doesn't: language adds nothing."""
    random = np.random.default_rng(2)
    lang = ["de"] * 30 + ["de", "en"] * 15
    sequences = pd.DataFrame({"lang": lang, "source": ["a"] * 30 + ["b"] * 30})
    seq = np.repeat(np.arange(60), 15)
    logits = np.zeros((len(seq), 6))
    logits[seq < 30, 0] = 3
    trace = write(tmp_path / "t.duckdb", choose(random, logits, 1)[:, None], seq, sequences, 6).trace
    free = analysis.mutual_information(trace, "lang", n_resamples=0, n_permutations=199).loc[0]
    inside = analysis.mutual_information(trace, "lang", within="source", n_resamples=0, n_permutations=199).loc[0]
    assert free["p"] <= 0.01 < inside["p"] and inside["excess"] < 0.3 * free["excess"]
    with pytest.raises(InputError, match="never varies within a 'lang'"):
        analysis.mutual_information(trace, "lang", within="lang")


def test_pieces_of_a_text_count_once(tmp_path):
    """Ten copies of a text are one text: the interval must not shrink."""
    random = np.random.default_rng(3)
    experts = choose(random, np.zeros((40, 5)), 1)
    seq = np.repeat(np.arange(8), 5)
    labels = {"lang": ["en", "de"] * 4}
    alone = pd.DataFrame({**labels, "segment_id": list("abcdefgh")})
    single = write(tmp_path / "a.duckdb", experts[:, None], seq, alone, 5)
    many = write(
        tmp_path / "b.duckdb", np.tile(experts, (10, 1))[:, None], np.repeat(np.arange(80), 5),
        pd.DataFrame({"lang": labels["lang"] * 10, "segment_id": list("abcdefgh") * 10}), 5,
    )  # fmt: skip
    one, ten = (analysis.specialization(r.trace, "lang", **QUICK) for r in (single, many))
    for name in ("share", "low", "high", "p", "n_texts"):
        assert np.allclose(one[name], ten[name], equal_nan=True), name


def test_degenerate(tmp_path):
    zeros, seq, both = np.zeros((4, 1, 1), int), [0, 0, 1, 1], pd.DataFrame({"lang": ["en", "de"]})
    one_language = write(tmp_path / "a.duckdb", zeros, seq, pd.DataFrame({"lang": ["en"] * 2}), 2)
    with pytest.raises(InputError, match="at least two values.*'en'"):
        analysis.specialization(one_language.trace, "lang")
    with pytest.raises(InputError, match="no 'domain'"):
        analysis.mutual_information(one_language.trace, "domain")
    one_expert = write(tmp_path / "b.duckdb", zeros, seq, both, 1)
    frame = analysis.specialization(one_expert.trace, "lang", **QUICK)
    assert (frame["share"] == 1).all() and frame["p"].isna().all() and frame["q"].isna().all()
    info = analysis.mutual_information(one_expert.trace, "lang", **QUICK).loc[0]
    assert info["mutual_information"] == 0 and info["p"] == 1
    # German uses no expert at all
    empty = write(tmp_path / "c.duckdb", np.array([0, 1, -1, -1])[:, None, None], seq, both, 2)
    frame = analysis.specialization(empty.trace, "lang", **QUICK)
    assert frame.loc[frame["group"] == "de", "share"].isna().all()
    for name in ("specialization", "mutual_information"):
        ask, draw = analysis.find(name)
        table = ask(empty.trace, "lang", **QUICK)
        draw(table)
        assert analysis.file(name).findings(table)


def test_too_many_groups(tmp_path):
    sequences = pd.DataFrame({"lang": [f"l{number}" for number in range(300)]})
    routed = write(tmp_path / "t.duckdb", np.zeros((300, 1, 1), int), np.arange(300), sequences, 2)
    with pytest.raises(InputError, match="300 different values"):
        analysis.specialization(routed.trace, "lang")


def test_metadata_of_any_kind(tmp_path):
    sequences = pd.DataFrame({"lang": ["en"] * 4, "tags": [["a", "b"], ["a", "b"], ["c"], None], "score": [1, 2, 1, 2]})
    routed = write(tmp_path / "t.duckdb", np.arange(4)[:, None, None], np.arange(4), sequences, 4)
    assert set(analysis.load(routed.trace, "tags", n_resamples=0)["group"]) == {"['a', 'b']", "['c']"}
    assert set(analysis.specialization(routed.trace, "score", **QUICK)["group"]) == {"1", "2"}


def test_figure_orders_specialists(routed):
    frame = analysis.specialization(routed.trace, "lang", **QUICK)
    figure = analysis.find("specialization")[1](frame)
    favourites = [np.argmax(column) for column in np.array(figure.data[0].z).T]
    assert all(a <= b for a, b in pairwise(favourites))
    assert list(figure.data[0].y) == ["en", "de"]
