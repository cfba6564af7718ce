"""Uncertainty, once for all analyses: bootstrap, permutation null, false-discovery rate.

The unit is a text, not a token: tokens of one text depend on each other. Everything here works on matrices with one
row a text (or a text and a label) and one column an expert, so that a resample is a matrix product.

- bootstrap: texts are drawn with replacement, as many as there are; a resample is a vector of how often each was drawn.
- permutation null: the labels are shuffled over the rows, in each stratum apart where strata are given.
- false-discovery rate: Benjamini & Hochberg (1995), by scipy.

Every function takes a seed and gives the same answer for the same seed.
"""

from collections.abc import Iterator

import numpy as np
from scipy import sparse
from scipy.stats import false_discovery_control

LEVEL = 0.95
"""Coverage of every interval."""
CHUNK = 1 << 24
"""Entries of the largest temporary matrix: what bounds memory."""


def bootstrap_weights(n_texts: int, n_resamples: int, seed: int) -> np.ndarray:
    """How often each text was drawn: float32 (n_resamples, n_texts), every row sums to n_texts."""
    random = np.random.default_rng(seed)
    weights = np.empty((n_resamples, n_texts), np.float32)
    for row in weights:
        row[:] = np.bincount(random.integers(n_texts, size=n_texts), minlength=n_texts)
    return weights


def bootstrap_sums(rows: np.ndarray, n_resamples: int, seed: int) -> np.ndarray:
    """Column sums of resampled rows: (n_texts, n_columns) -> float64 (n_resamples, n_columns).

    The same seed and number of rows draw the same texts, so that calls for several layers can be compared.
    """
    n_texts = len(rows)
    sums = np.empty((n_resamples, rows.shape[1]))
    step = max(1, CHUNK // max(n_texts, 1))
    random = np.random.default_rng(seed)
    rows = np.ascontiguousarray(rows, np.float64)
    for start in range(0, n_resamples, step):
        count = min(step, n_resamples - start)
        sums[start : start + count] = bootstrap_weights(n_texts, count, random.integers(2**63)) @ rows
    return sums


def interval(resampled: np.ndarray, value: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95% interval over axis 0; resamples that are NaN are left out.

    Percentiles of the resampled values. A measure that resampling inflates (anything convex in the counts: Gini,
    mutual information, …) passes its `value`: the percentiles are then shifted so that the resampled mean meets it.
    """
    tail = 100 * (1 - LEVEL) / 2
    shape = resampled.shape[1:]
    if not len(resampled):
        return np.full(shape, np.nan), np.full(shape, np.nan)
    finite = np.isfinite(resampled)
    if finite.all():
        low, high = np.percentile(resampled, [tail, 100 - tail], axis=0)
        mean = resampled.mean(axis=0)
    else:
        low, high, mean = (np.full(shape, np.nan) for _ in range(3))
        usable = finite.any(axis=0)
        columns = np.where(finite, resampled, np.nan)[:, usable]
        low[usable], high[usable] = np.nanpercentile(columns, [tail, 100 - tail], axis=0)
        mean[usable] = np.nanmean(columns, axis=0)
    if value is None:
        return low, high
    return low + (value - mean), high + (value - mean)


def permuted_sums(
    rows: np.ndarray, group: np.ndarray, n_groups: int, n_permutations: int, seed: int, strata: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Sums of rows a group, after shuffling the labels over the rows, in chunks of permutations.

    rows (n, n_columns), group int (n,) in 0..n_groups-1, strata int (n,) or None: a label never leaves its stratum.
    Yields float64 (chunk, n_groups, n_columns); the chunks add up to n_permutations.
    """
    n = len(rows)
    order = np.argsort(group, kind="stable")
    rows = np.ascontiguousarray(rows[order], np.float64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=n_groups))])
    blocks = [np.arange(n)] if strata is None else stratum_rows(strata[order])
    step = max(1, min(n_permutations, CHUNK // max(n, n_groups * rows.shape[1], 1)))
    random = np.random.default_rng(seed)
    for start in range(0, n_permutations, step):
        count = min(step, n_permutations - start)
        # Slot j keeps its label; `row` says which row lands there. One sparse matrix sums a whole chunk.
        row = np.tile(np.arange(n, dtype=np.int32), (count, 1))
        for block in blocks:
            row[:, block] = random.permuted(row[:, block], axis=1)
        pointers = (np.arange(count)[:, None] * n + starts[:-1]).ravel()
        pointers = np.append(pointers, count * n)
        chooser = sparse.csr_array((np.ones(count * n), row.ravel(), pointers), shape=(count * n_groups, n))
        yield (chooser @ rows).reshape(count, n_groups, rows.shape[1])


def stratum_rows(strata: np.ndarray) -> list[np.ndarray]:
    """The rows of each stratum that has more than one: nothing can be shuffled in the others."""
    order = np.argsort(strata, kind="stable")
    blocks = np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)
    return [block for block in blocks if len(block) > 1]


def q_values(p: np.ndarray) -> np.ndarray:
    """False-discovery rates of p values (any shape), Benjamini & Hochberg; NaN stays NaN and doesn't count as a test."""
    q = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested], method="bh")
    return q
