"""Scores, chance, baselines and intervals against scikit-learn and plain sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold

from workbench_probes.estimators import (
    baseline,
    best_strength,
    bounded,
    chance,
    fold_interval,
    learn,
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


def test_equal_numbers_have_no_score():
    assert np.isnan(scores(np.full(3, 0.1), np.array([0.1, 0.2, 0.3]), 0)).all()  # their mean isn't 0.1


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
            model = learn("hidden", "token", x[train], y[train], train, [1.0]).model
            values.append(scores(y[test], model.predict(x[test]), 2)[0])
        low, high = fold_interval(np.array(values), 0.25)
        missed += not low <= 0.5 <= high
    assert missed <= 9


@pytest.mark.parametrize("features", ["choices", "weights", "tokens"])
def test_a_single_class_and_empty_columns(features: str):
    x = sparse.csr_array(np.zeros((4, 3), np.float32))
    text = np.arange(4)
    for strengths in ([1.0], [0.1, 1.0]):
        assert learn(features, "sequence", x, np.ones(4, int), text, strengths).model.predict(x[:2]).tolist() == [1, 1]
        assert len(learn(features, "sequence", x, np.array([0, 1, 0, 1]), text, strengths).model.predict(x)) == 4
        assert np.isfinite(learn(features, "token", x, np.arange(4.0), text, strengths).model.predict(x)).all()


def memory_and_signal(n_texts: int = 40, rows: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A column that hints at the label, and 60 that only tell texts apart: by them labels can be learned by heart."""
    random = np.random.default_rng(0)
    text = np.repeat(np.arange(n_texts), rows)
    y = random.permutation(n_texts)[text] % 2
    x = np.column_stack([2 * y + random.normal(0, 1, len(y)), random.normal(size=(n_texts, 60))[text]]).astype(
        np.float32
    )
    return x, y, text


def test_the_strength_is_chosen_by_texts_that_were_not_learned_from():
    """Seen texts reward a weak penalty: they can be known by heart. Unseen ones don't."""
    x, y, text = memory_and_signal()
    strengths = (1e-4, 1e-2, 1.0, 100.0)
    by_row = best_strength("choices", "token", x, y, np.arange(len(y)), strengths)
    by_text = best_strength("choices", "token", x, y, text, strengths)
    assert by_text < by_row

    def by_hand(strength: float) -> float:
        found = []
        for train, test in StratifiedGroupKFold(3, shuffle=True, random_state=0).split(x, y, text):
            model = LogisticRegression(C=strength, class_weight="balanced", max_iter=200, tol=1e-3)
            found.append(metrics.balanced_accuracy_score(y[test], model.fit(x[train], y[train]).predict(x[test])))
        return float(np.mean(found))

    assert by_text == max(strengths, key=by_hand)
    assert learn("choices", "token", x, y, text, strengths).strength == by_text
    assert best_strength("choices", "token", x, x[:, 0].astype(float), text, (1e-6, 1.0)) == 1.0
    assert best_strength("choices", "token", x, y, text // 100, strengths) == strengths[0]  # one text: nothing to part
