"""Probes find what was planted, find nothing in noise, and can't be helped by a leak."""

from __future__ import annotations

from importlib import import_module
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import KNOWS, N_EXPERTS, N_LAYERS, main, planted
from routed import full_trace
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_score

from workbench import capture, corpus
from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes import clusters, coefficients, learning_curve, probe, sequence_map
from workbench_probes.features import of_layer
from workbench_probes.probe import figure, findings
from workbench_probes.task import prepare


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return planted(tmp_path_factory.mktemp("probe") / "t.duckdb")


@pytest.fixture(scope="module")
def found(trace: Trace) -> pd.DataFrame:
    return probe(trace, "lang", controls=2)


def test_the_layer_that_knows_is_found_and_the_others_score_chance(found: pd.DataFrame):
    rows = main(found)
    assert list(rows.index) == [("choices", layer) for layer in (-1, 0, 1, 2)] + [("tokens", -1)]
    for layer in (KNOWS, -1):
        assert rows.loc[("choices", layer), "low"] > 0.9
        assert rows.loc[("choices", layer), "selectivity_low"] > 0.2
    for noise in (("choices", 0), ("choices", 2), ("tokens", -1)):
        row = rows.loc[noise]
        assert row["low"] <= 0.5 <= row["high"], row
        assert abs(row["selectivity"]) < 0.25


def test_the_table_says_what_was_done(found: pd.DataFrame):
    assert set(found["score"]) == {"accuracy", "balanced_accuracy", "macro_f1"}
    first = found.iloc[0]
    sizes = ("n_columns", "n_classes", "n_rows", "n_train", "n_test", "n_groups", "n_folds", "n_controls", "n_left_out")
    assert [first[name] for name in sizes] == [N_EXPERTS, 2, 60, 48, 12, 30, 5, 2, 0]
    assert (found["control_of"] == "text").all() and (found["unit"] == "sequence").all()
    np.testing.assert_allclose(found["selectivity"], found["value"] - found["control"])
    np.testing.assert_allclose(main(found)[["chance", "majority"]], 0.5)
    assert main(found).loc[("choices", -1), "n_columns"] == N_LAYERS * N_EXPERTS
    assert (found["low"] >= 0).all() and (found["high"] <= 1).all()


def test_the_same_seed_gives_the_same_table(trace: Trace):
    options = {"layers": [KNOWS], "features": ["choices"], "unit": "token", "max_rows": 300}
    first = probe(trace, "lang", **options)
    pd.testing.assert_frame_equal(first, probe(trace, "lang", **options))
    assert not first.equals(probe(trace, "lang", seed=1, **options))
    assert (first["n_rows"] == 300).all() and (first["control_of"] == "token type").all()


def test_permuted_labels_score_chance_and_give_p(trace: Trace):
    found = probe(trace, "lang", features=["choices"], layers=[0, KNOWS], controls=0, permutations=19)
    rows = main(found)
    assert rows.loc[("choices", KNOWS), "p"] == rows.loc[("choices", -1), "p"] == pytest.approx(1 / 20)
    assert rows.loc[("choices", 0), "p"] > 0.05
    assert (found["n_permutations"] == 19).all() and found["control"].isna().all()
    assert "(p = 0.05 of 19 permutations)" in findings(found)[0]
    plain = probe(trace, "lang", features=["choices"], layers=[0, KNOWS], controls=0)
    assert plain["p"].isna().all() and "permutations" not in findings(plain)[0]
    np.testing.assert_array_equal(plain["value"], found["value"])
    again = prepare(trace, "lang").permuted(3)
    np.testing.assert_array_equal(again, prepare(trace, "lang").permuted(3))
    assert (again != prepare(trace, "lang").permuted(4)).any()


def test_p_of_noise_is_spread_evenly(tmp_path: Path):
    """Tokens of a text share a label that nothing depends on; texts, not tokens, change places, so p is no smaller
    than it should be. (Shuffled tokens would give small ones: a text's own experts tell its label.)"""
    values = []
    for seed in range(6):
        random = np.random.default_rng(seed)
        seq = np.repeat(np.arange(16), 10)
        experts = np.where(random.random(160) < 0.7, random.integers(0, 6, 16)[seq], random.integers(0, 6, 160))
        rows = pd.DataFrame({"topic": random.permutation(["x", "y"] * 8)})
        noise = full_trace(tmp_path / f"{seed}.duckdb", experts[:, None, None], n_experts=6, seq=seq, sequences=rows)
        options = {"features": ["choices"], "unit": "token", "controls": 0, "permutations": 9, "folds": 4}
        values.append(main(probe(noise, "topic", **options))["p"].iloc[0])
    assert 0.2 < np.mean(values) < 0.9 and sum(value <= 0.1 for value in values) <= 2


def test_a_strength_is_chosen_inside_the_training_texts(trace: Trace, monkeypatch: pytest.MonkeyPatch):
    """Whatever chooses sees the training rows alone, and a label of a test row changes nothing."""
    from workbench_probes import estimators, task

    seen = []

    def spy(features, unit, x, y, text, strengths):
        seen.append(set(text.tolist()))
        return learned(features, unit, x, y, text, strengths)

    learned = estimators.learn
    monkeypatch.setattr(task, "learn", spy)
    options = {"features": ["choices"], "layers": [KNOWS], "controls": 0, "strength": (10, 0.01, 0.1)}
    rows = main(probe(trace, "lang", **options))
    made = prepare(trace, "lang", strength=(10, 0.01, 0.1))
    assert made.strengths == (0.01, 0.1, 10) and rows["strength"].isin(made.strengths).all()
    assert seen == [set(made.group[split.train].tolist()) for split in made.splits]
    for texts, split in zip(seen, made.splits, strict=True):
        assert not texts & set(made.group[split.test].tolist())
    assert rows.loc[("choices", KNOWS), "low"] > 0.9


def test_tokens_of_a_text_know_its_language_too(trace: Trace):
    rows = main(probe(trace, "lang", unit="token", features=["choices", "weights"]))
    for name in ("choices", "weights"):
        assert rows.loc[(name, KNOWS), "low"] > 0.9 and rows.loc[(name, KNOWS), "selectivity_low"] > 0.2
        assert rows.loc[(name, 0), "low"] <= 0.5 <= rows.loc[(name, 0), "high"]


def test_a_segment_that_identifies_the_label_is_no_help(tmp_path: Path):
    """Every segment has an expert of its own, and a topic. Seen in one language it is known in all others, so splits
    that part translations score 1; splits that don't can only guess."""
    random = np.random.default_rng(0)
    n_texts, langs = 40, ("de", "en", "fr", "ar")
    topic = random.permutation(n_texts) % 2
    rows = pd.DataFrame(
        [
            {"segment_id": f"s{text}", "lang": lang, "topic": "xy"[topic[text]]}
            for text in range(n_texts)
            for lang in langs
        ]
    )
    seq = np.repeat(np.arange(len(rows)), 3)
    experts = (seq // len(langs))[:, None, None]
    trace = full_trace(tmp_path / "trap.duckdb", experts, n_experts=n_texts, seq=seq, sequences=rows)
    x = of_layer(trace, "choices", 0, np.arange(len(rows)), "sequence")
    naive = cross_val_score(LogisticRegression(C=100), x, rows["topic"], cv=KFold(5, shuffle=True, random_state=0))
    assert naive.mean() > 0.95
    row = main(probe(trace, "topic", features=["choices"])).loc[("choices", 0)]
    assert row["value"] <= 0.6 and row["n_groups"] == n_texts
    task = prepare(trace, "topic")
    for split in task.splits:
        assert not set(rows["segment_id"].iloc[split.train]) & set(rows["segment_id"].iloc[split.test])


def test_what_the_vocabulary_knows_isnt_selective(tmp_path: Path):
    """The class of a token is its id's: token identity knows it, and any control labels as well."""
    words = {token: (" a", "12", "==")[token % 3] for token in range(15)}
    trace = planted(
        tmp_path / "t.duckdb", token_ids=np.random.default_rng(1).integers(0, 15, 720), vocabulary=words, seed=2
    )
    rows = main(probe(trace, "token_class", features=["tokens", "choices"], layers=[0], controls=3))
    tokens, choices = rows.loc[("tokens", -1)], rows.loc[("choices", 0)]
    assert tokens["value"] == pytest.approx(1) and tokens["control"] == pytest.approx(1)
    assert tokens["selectivity"] == pytest.approx(0)
    assert choices["low"] <= 1 / 3 <= choices["high"] and choices["chance"] == pytest.approx(1 / 3)


def test_a_loss_that_an_expert_brings_is_predicted(tmp_path: Path):
    plain = planted(tmp_path / "a.duckdb")
    random = np.random.default_rng(0)
    busy = (plain.experts(0) == 3).any(axis=1)
    nll = np.append(0, np.where(busy, 5, 1)[:-1]) + random.normal(0, 0.2, len(busy))
    trace = planted(tmp_path / "b.duckdb", nll=nll)
    assert (trace.experts(0) == plain.experts(0)).all()
    rows = main(probe(trace, "loss", features=["choices"]), "r2")
    assert rows.loc[("choices", 0), "low"] > 0.9
    assert rows.loc[("choices", 2), "high"] < 0.1 and rows.loc[("choices", 2), "chance"] == 0
    halves = main(probe(trace, "loss", classes=2, features=["choices"], layers=[0]))
    assert halves.loc[("choices", 0), "value"] > 0.6


def test_dropped_tokens_differing_k_and_many_experts(tmp_path: Path):
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"lang": ["de", "en"] * 20})
    seq = np.repeat(np.arange(40), 6)
    wide = np.where(seq % 2, 299, 280)[:, None] + random.integers(0, 2, (240, 1)) * 300
    narrow = random.integers(0, 4, (240, 1)) * np.ones((1, 3), int) + np.arange(3)
    wide[random.random(240) < 0.2] = -1
    trace = full_trace(tmp_path / "t.duckdb", [wide, narrow], n_experts=[700, 6], seq=seq, sequences=rows)
    found = main(probe(trace, "lang", unit="token", features=["choices"]))
    assert 0.85 < found.loc[("choices", 0), "value"] < 0.97  # dropped tokens can only be guessed
    assert found.loc[("choices", 1), "low"] <= 0.5 <= found.loc[("choices", 1), "high"]
    assert main(probe(trace, "lang", features=["choices"])).loc[("choices", 0), "value"] == 1


def test_rare_classes(tmp_path: Path):
    rows = pd.DataFrame({"topic": ["x", "y"] * 9 + ["z", "z"]})
    seq = np.arange(20)
    trace = full_trace(tmp_path / "t.duckdb", (seq % 2)[:, None, None], n_experts=2, seq=seq, sequences=rows)
    with pytest.raises(InputError, match=r"'z' \(2\)"):
        probe(trace, "topic", features=["choices"])
    rows = main(probe(trace, "topic", features=["choices"], drop_rare=True))
    assert rows["n_left_out"].tolist() == [2] and rows["value"].tolist() == [1] and rows["n_classes"].tolist() == [2]
    with pytest.raises(InputError, match="every class of 'topic'"):
        probe(trace, "topic", features=["choices"], drop_rare=True, folds=10)


def test_one_class_is_left_of_rare_ones(tmp_path: Path):
    rows = pd.DataFrame({"topic": ["x"] * 9 + ["y"]})
    trace = full_trace(tmp_path / "t.duckdb", np.zeros((10, 1, 1), int), n_experts=1, seq=range(10), sequences=rows)
    with pytest.raises(InputError, match="'topic' is 'x' everywhere once rare classes are left out"):
        probe(trace, "topic", drop_rare=True)


def numbers_of_texts(path: Path) -> Trace:
    """22 texts of one token, each with a number of its own, and routing that knows none of it."""
    random = np.random.default_rng(0)
    rows = pd.DataFrame({"score": random.normal(size=22)})
    experts = random.integers(0, 3, (22, 1, 1))
    return full_trace(path, experts, n_experts=3, seq=range(22), sequences=rows)


def test_folds_of_one_number_are_refused(tmp_path: Path):
    trace = numbers_of_texts(tmp_path / "t.duckdb")
    with pytest.raises(InputError, match="'score' doesn't vary in a test of 1 row"):
        probe(trace, "score", features=["choices"], folds=12)
    found = probe(trace, "score", features=["choices"], folds=11, controls=0, permutations=3)
    assert found["value"].notna().all() and found["p"].notna().all() and findings(found)


@pytest.mark.parametrize(("score", "p"), [(np.nan, 1), (1 - 1e-15, 1), (0.9, 0.25)])
def test_ties_and_permutations_without_a_score_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score: float, p: float
):
    scored = cycle([1, score, score, score])  # of each fold: the labels, then 3 permutations
    monkeypatch.setattr("workbench_probes.estimators.scores", lambda *_: np.zeros(2))  # of the baseline
    monkeypatch.setattr(import_module("workbench_probes.probe"), "scores", lambda *_: np.full(2, next(scored)))
    trace = numbers_of_texts(tmp_path / "t.duckdb")
    found = probe(trace, "score", features=["choices"], controls=0, permutations=3)
    assert found["p"].tolist() == [p, p]


def test_controls_that_are_constant_in_a_test_are_left_out(tmp_path: Path):
    trace = numbers_of_texts(tmp_path / "t.duckdb")
    found = probe(trace, "score", features=["choices"], folds=11, controls=30)
    assert found["control"].notna().all() and found["selectivity_low"].notna().all()


def test_a_group_of_sources_leaves_too_few_folds(trace: Trace):
    with pytest.raises(InputError, match="3 texts .* too few for 5 folds"):
        probe(trace, "lang", group="source")
    rows = main(probe(trace, "lang", group="source", folds=3, features=["choices"], layers=[KNOWS], controls=0))
    assert rows["n_groups"].tolist() == [3] and rows["control"].isna().all() and rows["value"].iloc[0] > 0.9


def test_wrong_options(trace: Trace):
    for options, said in [
        ({"strength": 0}, "strength is 0"),
        ({"strength": [1, float("nan")]}, "strength is"),
        ({"permutations": -1}, "permutations is -1"),
        ({"controls": -1}, "controls is -1"),
        ({"strength": 1e-320}, "strength is 1e-320; expected a number above 0"),
        ({"strength": 1e-37}, r"expected a number above 0 \(from 1e-30 on\)"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4,294,967,296; expected less than 4,294,967,296"),
        ({"max_rows": 1}, "max_rows is 1"),
        ({"features": ["hiden"]}, "no features 'hiden'"),
        ({"layers": [7]}, "layer 7"),
        ({"folds": 31}, "30 texts .* too few for 31 folds"),
    ]:
        with pytest.raises(InputError, match=said):
            probe(trace, "lang", **options)


def test_a_run_that_counts_is_refused(tmp_path: Path):
    rows = [{"text": "Alle Menschen", "lang": "de"}, {"text": "All human beings", "lang": "en"}]
    given = corpus.from_rows(rows, "texts")
    counted = capture.trace("demo", given, tmp_path / "t.duckdb", counts_by="seq", progress=False)
    for ask in (probe, coefficients, learning_curve, clusters, sequence_map):
        with pytest.raises(InputError, match="counts"):
            ask(counted, "lang")


def test_figure_and_findings(found: pd.DataFrame, trace: Trace):
    names = [line.name for line in figure(found).data if line.showlegend is not False]
    assert names == ["choices", "choices, all layers", "choices, control labels", "tokens", "chance"]
    said = findings(found)
    assert len(said) == 2 and said[0].startswith(("Choices of layer 1 tell the language", "Choices of all layers tell"))
    only = probe(trace, "lang", features=["tokens"], controls=0)
    assert [line.name for line in figure(only).data if line.showlegend is not False] == ["tokens", "chance"]
    assert "random labels" not in findings(only)[0]
