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


def draws(n_texts: int, n_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample drew each text, in chunks: float32 (chunk, n_texts), every row sums to n_texts.

    The same arguments give the same draws: the layers of a trace are resampled together.
    """
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n_texts, 1))
    for start in range(0, n_resamples, step):
        chunk = min(step, n_resamples - start)
        drawn = random.integers(n_texts, size=(chunk, n_texts)) + n_texts * np.arange(chunk)[:, None]
        yield np.bincount(drawn.ravel(), minlength=chunk * n_texts).reshape(chunk, n_texts).astype(np.float32)


def bootstrap_sums(
    rows: np.ndarray, text: np.ndarray, group: np.ndarray, n_groups: int, n_resamples: int, seed: int
) -> np.ndarray:
    """Sums of rows a group in each resample: float64 (n_resamples, n_groups, n_columns).

    rows (n, n_columns), text int (n,) in 0..n_texts-1: what is drawn, with all its rows in all groups;
    group int (n,) ascending, in 0..n_groups-1.
    """
    n_texts = int(text.max(initial=-1)) + 1
    bounds = np.searchsorted(group, np.arange(n_groups + 1))
    rows = np.ascontiguousarray(rows, np.float32)
    sums = np.zeros((n_resamples, n_groups, rows.shape[1]))
    start = 0
    for drawn in draws(n_texts, n_resamples, seed) if n_texts else ():
        for label, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            sums[start : start + len(drawn), label] = drawn[:, text[begin:end]] @ rows[begin:end]
        start += len(drawn)
    return sums


def interval(resampled: np.ndarray, value: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95% interval over axis 0; resamples that are NaN are left out.

    Percentiles of the resampled values. A measure that resampling inflates (anything convex in the counts: Gini,
    mutual information, …) passes its `value`: the percentiles are then shifted so that the resampled mean meets it.
    """
    tail = 100 * (1 - LEVEL) / 2
    low, high, mean = (np.full(resampled.shape[1:], np.nan) for _ in range(3))
    usable = np.isfinite(resampled).any(axis=0)
    if usable.any():
        known = np.where(np.isfinite(resampled), resampled, np.nan)[:, usable]
        # The plain percentile is several times faster, and nearly always possible.
        percentile, average = (np.percentile, np.mean) if np.isfinite(known).all() else (np.nanpercentile, np.nanmean)
        low[usable], high[usable] = percentile(known, [tail, 100 - tail], axis=0)
        mean[usable] = average(known, axis=0)
    if value is None:
        return low, high
    return low + (value - mean), high + (value - mean)


def text_interval(
    resampled: np.ndarray, n_texts: np.ndarray | int, value: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`interval`, NaN where there is a single text, so nothing to resample: n_texts has the first axes of a value."""
    low, high = interval(resampled, value)
    single = np.asarray(n_texts) < 2
    single = single.reshape(single.shape + (1,) * (np.ndim(low) - single.ndim))
    return np.where(single, np.nan, low), np.where(single, np.nan, high)


def permuted_sums(
    rows: np.ndarray, group: np.ndarray, n_groups: int, n_permutations: int, seed: int, strata: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Sums of rows a group after shuffling the labels over the rows, in chunks of permutations.

    rows (n, n_columns), group int (n,) ascending, in 0..n_groups-1; strata int (n,) or None: a label never leaves its
    stratum. Yields float64 (chunk, n_groups, n_columns); the chunks add up to n_permutations.
    """
    n = len(rows)
    rows = np.ascontiguousarray(rows, np.float64)
    starts = np.searchsorted(group, np.arange(n_groups))
    blocks = [np.arange(n)] if strata is None else rows_of_strata(strata)
    step = max(1, CHUNK // max(n, n_groups * rows.shape[1], 1))
    random = np.random.default_rng(seed)
    for start in range(0, n_permutations, step):
        chunk = min(step, n_permutations - start)
        # A place keeps its label; `row` says which row lands there. One sparse matrix then sums the whole chunk.
        row = np.tile(np.arange(n, dtype=np.int32), (chunk, 1))
        for block in blocks:
            row[:, block] = random.permuted(row[:, block], axis=1)
        pointers = np.append((np.arange(chunk)[:, None] * n + starts).ravel(), chunk * n)
        chooser = sparse.csr_array((np.ones(chunk * n), row.ravel(), pointers), shape=(chunk * n_groups, n))
        yield (chooser @ rows).reshape(chunk, n_groups, rows.shape[1])


def rows_of_strata(strata: np.ndarray) -> list[np.ndarray]:
    """The rows of each stratum that has more than one: nothing can be shuffled in the others."""
    order = np.argsort(strata, kind="stable")
    blocks = np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)
    return [block for block in blocks if len(block) > 1]


def q_values(p: np.ndarray) -> np.ndarray:
    """False-discovery rates of p values (any shape), Benjamini & Hochberg; a NaN stays and isn't counted as a test."""
    q = np.full(p.shape, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        q[tested] = false_discovery_control(p[tested], method="bh")
    return q
