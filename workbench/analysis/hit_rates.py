"""From counts of hits to hit rates with intervals, and to the knee of a curve; running simulations side by side."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from workbench.analysis.events import Events
from workbench.analysis.eviction import Counts, uses
from workbench.analysis.resampling import bootstrap_sums, interval

N_THREADS = min(8, os.cpu_count() or 2)
"""Simulations that run at a time: each needs a core, and Belady's a list of next uses."""
FLAT = 1e-12
"""Hit rates this close are equal."""


def side_by_side(jobs: Sequence[Callable[[], Counts]]) -> list[Counts]:
    """Do the jobs, a few at a time, and give their results in order. (The simulator runs without Python's lock.)"""
    with ThreadPoolExecutor(N_THREADS) as pool:
        return list(pool.map(lambda job: job(), jobs))


def held_out(events: Events, seed: int) -> Counts:
    """A resident cache chosen on other texts than it serves: each half of the units, drawn at random, gets the most
    used experts of the other half. Undefined at every capacity where there is only one unit."""
    used = uses(events)
    n_units, n_experts = used.shape
    half = halves(n_units, seed)
    depth = np.empty_like(used)
    for side in (0, 1):
        order = np.argsort(-used[half != side].sum(axis=0), kind="stable")
        depth[half == side] = used[half == side][:, order]
    return Counts(depth, np.zeros_like(depth), 0 if n_units > 1 else n_experts)


def halves(n_units: int, seed: int) -> np.ndarray:
    """0 or 1 for each unit, at random, as evenly as possible: int64 (n_units,)."""
    return np.random.default_rng(seed).permutation(n_units) % 2


def resampled_rates(
    hits: np.ndarray, accesses: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and hit rates of resampled units: float64 (n_resamples, n_columns) each.

    hits (n_units, n_columns); accesses (n_units,) or (n_units, n_columns). A rate without accesses is NaN.
    """
    n_units, n_columns = hits.shape
    both = np.concatenate([hits, accesses.reshape(n_units, -1)], axis=1)
    whole = np.zeros(n_units, np.int64)
    sums = bootstrap_sums(both, np.arange(n_units), whole, 1, n_resamples, seed)[:, 0]
    return sums[:, :n_columns], divide(sums[:, :n_columns], sums[:, n_columns:])


def ends(resampled: np.ndarray, n_units: int) -> tuple[np.ndarray, np.ndarray]:
    """The 95% interval over axis 0; NaN where there is a single unit, or nothing was resampled."""
    if n_units < 2 or not len(resampled):
        nothing = np.full(resampled.shape[1:], np.nan)
        return nothing, nothing.copy()
    return interval(resampled)


def divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0 or unknown."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def knee(capacities: Iterable[float], rates: Iterable[float]) -> float:
    """The capacity at which a rising curve is farthest above the straight line between its ends; NaN if it is flat.

    Both axes run from 0 to 1 first (Satopää et al. 2011, *Finding a "Kneedle" in a Haystack*, without its smoothing);
    of several capacities equally far, the smallest.
    """
    x, y = np.asarray(list(capacities), float), np.asarray(list(rates), float)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or y[-1] - y[0] < FLAT:
        return np.nan
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    best = above.max()
    return float(x[np.flatnonzero(above >= best - FLAT)[0]]) if best > FLAT else np.nan
