"""Which pairs of experts a token would choose by chance, given how busy each expert is and that its choices differ.

A token that chooses k different experts can't choose one twice, so that even without any structure two experts meet
less often than n_i · n_j / N: for even loads by the factor (k − 1) E / (k (E − 1)), about a half at k = 2. The null
here is the distribution over sets of k different experts that has the loads of the trace and is otherwise as random
as possible (largest entropy): P(S) ∝ Π w_e over the experts e of S, called conditional Poisson sampling. The weights
that give the loads are found by the iteration of Chen, Dempster & Liu 1994 (Biometrika 81:457). Tokens that chose
fewer experts have the same weights and their own k.
"""

import numpy as np
from numba import njit

STEPS = 500
CLOSE = 1e-9
"""Part of the tokens: loads this near to those of the trace are reached."""


def chance_pairs(load: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Expected number of tokens that choose both experts: float64 (E, E), symmetric, the diagonal is the load.

    load   int64 (E,)      tokens that chose each expert
    sizes  int64 (k + 1,)  tokens that chose 0, 1, …, k experts; Σ load = Σ k · sizes
    """
    sizes = sizes.astype(np.float64).copy()
    sizes[0] = 0
    n_tokens = sizes.sum()
    expected = np.diag(load).astype(np.float64)
    used = np.flatnonzero(load)
    if n_tokens == 0 or len(used) == 0:
        return expected
    chance = load[used] / n_tokens
    for _ in range(STEPS):
        reached = _reached(chance, sizes)
        if np.abs(reached - load[used]).max() <= CLOSE * n_tokens:
            break
        free = chance < 1
        odds = chance[free] / (1 - chance[free]) * load[used][free] / reached[free]
        chance[free] = odds / (1 + odds)
    expected[np.ix_(used, used)] = _pairs(chance, sizes)
    np.fill_diagonal(expected, load)
    return expected


@njit(cache=True, nogil=True)
def _numbers(chance, first, second, most):
    """P(n of the experts but two are chosen), n = 0 … most, if each were chosen on its own."""
    result = np.zeros(most + 1)
    result[0] = 1.0
    for expert in range(len(chance)):
        if expert in (first, second):
            continue
        p = chance[expert]
        for n in range(most, 0, -1):
            result[n] = result[n] * (1 - p) + result[n - 1] * p
        result[0] *= 1 - p
    return result


@njit(cache=True, nogil=True)
def _reached(chance, sizes):
    """Loads that the chances lead to: (E,)."""
    most = len(sizes) - 1
    every = _numbers(chance, -1, -1, most)
    result = np.zeros(len(chance))
    for i in range(len(chance)):
        rest = _numbers(chance, i, -1, most)
        for k in range(1, most + 1):
            if sizes[k] > 0 and every[k] > 0:
                result[i] += sizes[k] * chance[i] * rest[k - 1] / every[k]
    return result


@njit(cache=True, nogil=True)
def _pairs(chance, sizes):
    """Pairs that the chances lead to: (E, E), 0 on the diagonal."""
    most = len(sizes) - 1
    every = _numbers(chance, -1, -1, most)
    result = np.zeros((len(chance), len(chance)))
    if most < 2:
        return result
    for i in range(len(chance)):
        for j in range(i):
            rest = _numbers(chance, i, j, most - 2)
            for k in range(2, most + 1):
                if sizes[k] > 0 and every[k] > 0:
                    result[i, j] += sizes[k] * chance[i] * chance[j] * rest[k - 2] / every[k]
            result[j, i] = result[i, j]
    return result
