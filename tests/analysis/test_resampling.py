"""The bootstrap, the permutation null and the false-discovery rate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.analysis import resampling
from workbench.analysis.resampling import bootstrap_sums, draws, interval, permuted_sums, q_values, text_interval


def test_draws_are_resamples_and_reproducible(monkeypatch):
    whole = np.concatenate(list(draws(7, 50, seed=3)))
    assert whole.shape == (50, 7) and (whole.sum(axis=1) == 7).all()
    assert np.array_equal(whole, np.concatenate(list(draws(7, 50, seed=3))))
    assert not np.array_equal(whole, np.concatenate(list(draws(7, 50, seed=4))))
    monkeypatch.setattr(resampling, "CHUNK", 21)  # three resamples at a time
    pieces = list(draws(7, 50, seed=3))
    assert len(pieces) == 17 and np.array_equal(np.concatenate(pieces), whole)


def test_bootstrap_sums_against_loops():
    rows = np.arange(12.0).reshape(6, 2)
    text, group = np.array([0, 1, 2, 0, 2, 3]), np.array([0, 0, 0, 2, 2, 2])
    sums = bootstrap_sums(rows, text, group, 3, 20, seed=1)
    weights = np.concatenate(list(draws(4, 20, seed=1)))
    for resample in range(20):
        for label in range(3):
            expected = sum((weights[resample, text[i]] * rows[i] for i in range(6) if group[i] == label), np.zeros(2))
            assert np.allclose(sums[resample, label], expected)


def test_bootstrap_interval_covers_at_the_nominal_rate():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        size = random.integers(5, 40, 60)  # texts of different length, tokens of one text alike
        share = random.beta(6, 14, 60)
        ones = random.binomial(size, share)
        rows = np.column_stack([ones, size - ones])
        zero = np.zeros(60, int)
        sums = bootstrap_sums(rows, np.arange(60), zero, 1, 300, trial)
        low, high = interval(sums[:, 0, 0] / sums[:, 0].sum(axis=1))
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval():
    values = np.arange(1001.0)
    assert interval(values) == (pytest.approx(25), pytest.approx(975))
    low, high = interval(values, np.array(0.0))  # resampling gave 500 on average, the value is 0
    assert (low, high) == (pytest.approx(-475), pytest.approx(475))
    assert interval(np.array([np.nan, 1, 1, np.nan])) == (1, 1)
    assert np.isnan(interval(np.full((5, 2), np.nan))).all()
    assert np.isnan(interval(np.empty((0, 2)))).all()


def test_a_single_text_has_no_interval():
    values = np.random.default_rng(0).normal(size=(50, 3, 2))
    low, high = text_interval(values, np.array([5, 1, 2]))
    assert np.isnan(low[1]).all() and np.isnan(high[1]).all()
    assert np.array_equal(low[[0, 2]], interval(values)[0][[0, 2]])
    assert np.isnan(text_interval(values, 1)).all() and np.isfinite(text_interval(values[:, 0, 0], 2)).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 4))
def test_permuted_sums_keep_totals(seed, n, n_groups):
    random = np.random.default_rng(seed)
    rows = random.integers(0, 5, (n, 3)).astype(float)
    group = np.sort(random.integers(0, n_groups, n))
    result = np.concatenate(list(permuted_sums(rows, group, n_groups, 17, seed)))
    assert result.shape == (17, n_groups, 3)
    assert (result.sum(axis=1) == rows.sum(axis=0)).all()


def test_permutations_reach_every_arrangement():
    rows, group = np.eye(3), np.array([0, 1, 1])
    seen = {tuple(one[0]) for one in np.concatenate(list(permuted_sums(rows, group, 2, 200, 0)))}
    assert seen == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_strata_are_kept(monkeypatch):
    monkeypatch.setattr(resampling, "CHUNK", 40)
    rows = np.eye(6)
    group, strata = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 0, 1, 1])
    result = np.concatenate(list(permuted_sums(rows, group, 2, 100, 0, strata)))
    first = result[:, 0]  # rows that got label 0: always two of stratum 0 and one of stratum 1
    assert (first[:, strata == 0].sum(axis=1) == 2).all() and (first[:, strata == 1].sum(axis=1) == 1).all()
    assert len({tuple(one) for one in first}) == 9


def test_q_values():
    p = np.array([[0.01, 0.02], [np.nan, 0.9]])
    assert np.allclose(q_values(p), [[0.03, 0.03], [np.nan, 0.9]], equal_nan=True)
    assert np.isnan(q_values(np.array([np.nan]))).all()
