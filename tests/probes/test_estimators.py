"""Scores, chance, baselines and intervals against scikit-learn and plain sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn import metrics

from workbench_probes.estimators import (
    baseline,
    bounded,
    chance,
    fit_and_predict,
    fold_interval,
    pipeline,
    scores,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(pairs)
def test_scores_of_classes_are_those_of_scikit_learn(rows: list[tuple[int, int]]):
    true, predicted = (np.array(column) for column in zip(*rows, strict=True))
    there = np.unique(true)
    expected = [
        metrics.accuracy_score(true, predicted),
        np.mean(metrics.recall_score(true, predicted, labels=there, average=None, zero_division=0)),
        metrics.f1_score(true, predicted, labels=there, average="macro", zero_division=0),
    ]
    np.testing.assert_allclose(scores(true, predicted, 4), expected)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=3, max_size=30))
def test_scores_of_numbers_are_those_of_scikit_learn(rows: list[tuple[int, int]]):
    true, predicted = (np.array(column, float) for column in zip(*rows, strict=True))
    r2, correlation = scores(true, predicted, 0)
    if np.ptp(true) == 0:
        assert np.isnan(r2) and np.isnan(correlation)
        return
    assert r2 == pytest.approx(metrics.r2_score(true, predicted))
    assert correlation == pytest.approx(0 if np.ptp(predicted) == 0 else stats.pearsonr(true, predicted)[0])


def test_chance_is_what_guessing_scores():
    random = np.random.default_rng(0)
    true = random.choice(3, 200_000, p=[0.6, 0.3, 0.1])
    guessed = scores(true, random.integers(0, 3, len(true)), 3)
    np.testing.assert_allclose(chance(true, 3), guessed, atol=0.01)
    assert chance(np.ones(3), 0).tolist() == [0, 0]


def test_baseline_says_the_commonest_class_or_the_mean():
    np.testing.assert_allclose(baseline(np.array([0, 1, 1]), np.array([1, 1, 1, 0]), 2), [0.75, 0.5, 0.75 / 1.75])
    r2, correlation = baseline(np.array([0.0, 2.0]), np.array([0.0, 2.0]), 0)
    assert (r2, correlation) == (0, 0)


def test_fold_interval():
    values = np.array([0.5, 0.6, 0.7, 0.6])
    reach = stats.t.ppf(0.975, 3) * np.sqrt(values.var(ddof=1) * (1 / 4 + 1 / 3))
    low, high = fold_interval(values, 1 / 3)
    assert (low, high) == pytest.approx((0.6 - reach, 0.6 + reach))
    assert fold_interval(np.full(3, 0.4), 0.5) == pytest.approx((0.4, 0.4))
    low, high = bounded(np.array([-0.2] * 3), np.array([1.2] * 3), 2)
    assert low.tolist() == [0, 0, 0] and high.tolist() == [1, 1, 1]


def test_the_interval_covers_the_score_of_noise():
    """Over many random problems with nothing to learn, 95% intervals of accuracy miss chance in few."""
    missed = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        x, y = random.normal(size=(100, 4)), random.integers(0, 2, 100)
        folds = np.array_split(random.permutation(100), 5)
        values = []
        for test in folds:
            train = np.setdiff1d(np.arange(100), test)
            predicted, _ = fit_and_predict(pipeline("hidden", "token", False, 1.0), x[train], y[train], x[test], False)
            values.append(scores(y[test], predicted, 2)[0])
        low, high = fold_interval(np.array(values), 0.25)
        missed += not low <= 0.5 <= high
    assert missed <= 9


@pytest.mark.parametrize("features", ["choices", "weights", "tokens"])
def test_a_single_class_and_empty_columns(features: str):
    x = sparse.csr_array(np.zeros((4, 3), np.float32))
    probe = pipeline(features, "sequence", False, 1.0)
    assert fit_and_predict(probe, x, np.ones(4, int), x[:2], False)[0].tolist() == [1, 1]
    assert len(fit_and_predict(probe, x, np.array([0, 1, 0, 1]), x, False)[0]) == 4
    assert np.isfinite(fit_and_predict(pipeline(features, "token", True, 1.0), x, np.arange(4.0), x, True)[0]).all()
