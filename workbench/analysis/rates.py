"""How much oftener one set of tokens uses each expert than another: difference of rates, nPMI, intervals, p.

Two sets of tokens as cells of two labels, the first 0 and the second 1. Everything is over texts: counts of expert
choices and of tokens a text, so that each resample is a matrix product.
"""

import numpy as np

from workbench.analysis.counting import Cells, sum_by
from workbench.analysis.resampling import CHUNK, bootstrap_sums, text_interval

TIE = 1e-9
"""Statistics this close, relative to the observed one, are equal: they differ by rounding only."""


def tokens_of_cells(cells: Cells) -> np.ndarray:
    """Number of tokens of each cell: float64 (n_cells,)."""
    return np.bincount(cells.of_token[cells.of_token >= 0], minlength=len(cells.group)).astype(float)


def compare(
    activations: np.ndarray,
    n_tokens: np.ndarray,
    group: np.ndarray,
    text: np.ndarray,
    n_resamples: int,
    n_permutations: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """The experts of one layer, each array (n_experts,): rate, rate_versus, difference with low and high, npmi with
    npmi_low and npmi_high, p, count, count_versus.

    activations (n_cells, n_experts), n_tokens, group (0 or 1, ascending) and text (numbered without gaps) of each cell.
    Intervals are NaN where a label has a single text, p is NaN where chance can't move the difference.
    """
    rows = np.column_stack([activations, n_tokens])
    sums = sum_by(rows, group, 2)
    rate = rates(sums)
    resampled = bootstrap_sums(rows, text, group, 2, n_resamples, seed)
    drawn = rates(resampled)
    n_texts = min(len(np.unique(text[group == label])) for label in (0, 1))
    low, high = text_interval(drawn[..., 0, :] - drawn[..., 1, :], n_texts)
    npmi_low, npmi_high = text_interval(npmi(resampled), n_texts)
    return {
        "rate": rate[0],
        "rate_versus": rate[1],
        "difference": rate[0] - rate[1],
        "low": low,
        "high": high,
        "npmi": npmi(sums),
        "npmi_low": npmi_low,
        "npmi_high": npmi_high,
        "p": chance(activations, n_tokens, group, text, n_permutations, seed),
        "count": sums[0, :-1].astype(np.int64),
        "count_versus": sums[1, :-1].astype(np.int64),
    }


def rates(sums: np.ndarray) -> np.ndarray:
    """Activations a token, from sums (…, n_experts + 1) whose last column counts tokens; NaN where there are none."""
    n_tokens = sums[..., -1:]
    return np.divide(sums[..., :-1], n_tokens, out=np.full(sums[..., :-1].shape, np.nan), where=n_tokens > 0)


def npmi(sums: np.ndarray) -> np.ndarray:
    """Normalised pointwise mutual information of "the token is of label 0" and "the token uses e", (…, n_experts).

    sums (…, 2, n_experts + 1) as in `rates`. NaN for an expert that nobody uses; -1 where only the others do.
    """
    k, m = sums[..., 0, :-1], sums[..., 0, -1:]
    everything = sums.sum(axis=-2)
    total, n = everything[..., :-1], everything[..., -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        surprise = np.log(n) - np.log(k)  # -log p(x, e)
        value = (np.log(k) - np.log(m) + np.log(n) - np.log(total)) / surprise
    value = np.where((k == 0) & (total > 0) & (m > 0), -1.0, value)
    return np.where((total > 0) & (m > 0) & (m < n), value, np.nan)


def chance(
    activations: np.ndarray, n_tokens: np.ndarray, group: np.ndarray, text: np.ndarray, n_permutations: int, seed: int
) -> np.ndarray:
    """Two-sided p of each expert (n_experts,): how often chance gives as large a difference of rates.

    n_tokens is what activations are divided by, (n_cells,) or, where each expert has its own, (n_cells, n_experts).
    NaN without permutations, where all texts have the same rate, so that chance can't move it, and for an expert with
    nothing to divide by in one of the sets.
    """
    if not n_permutations:
        return np.full(activations.shape[1], np.nan)
    n_tokens = n_tokens.reshape(len(n_tokens), -1)
    if len(np.intersect1d(text[group == 0], text[group == 1])):  # the sets share texts, so they depend on each other
        reached = signs(activations, n_tokens, group, text, n_permutations, seed)
    else:
        reached = shuffles(activations, n_tokens, group, n_permutations, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = activations - n_tokens * (activations.sum(axis=0) / n_tokens.sum(axis=0))
    still = np.abs(spread).max(axis=0, initial=0) < TIE * n_tokens.max(initial=1)
    empty = (sum_by(n_tokens, group, 2) == 0).any(axis=0)
    return np.where(still | empty, np.nan, (1 + reached) / (n_permutations + 1))


def shuffles(
    activations: np.ndarray, n_tokens: np.ndarray, group: np.ndarray, n_permutations: int, seed: int
) -> np.ndarray:
    """How often shuffling the labels over texts, none of which has both, reaches the observed difference: (n_experts,).

    What is compared is the difference over its standard error from texts (Janssen 1997), not the difference itself:
    shuffled groups have texts of other lengths than the observed ones, and so another spread.
    """
    n, n_experts = activations.shape
    rows = np.column_stack([activations, activations**2, activations * n_tokens, n_tokens, n_tokens**2, np.ones(n)])
    total = rows.sum(axis=0)
    member = (group == 0).astype(float)
    observed = studentised(member @ rows, total, n_experts)
    reached = np.zeros(n_experts)
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n, rows.shape[1], 1))
    for start in range(0, n_permutations, step):
        shuffled = random.permuted(np.tile(member, (min(step, n_permutations - start), 1)), axis=1)
        # A shuffled set with nothing to divide by (NaN) counts as one that reached it.
        reached += (~(studentised(shuffled @ rows, total, n_experts) < observed * (1 - TIE))).sum(axis=0)
    return reached


def studentised(group: np.ndarray, total: np.ndarray, n_experts: int) -> np.ndarray:
    """|difference of rates| over its standard error: (…, n_experts), from sums of rows of one group and of all.

    0 where there is no difference, inf where there is one without any spread.
    """
    difference, variance = np.zeros(()), np.zeros(())
    bounds = np.cumsum([n_experts] * 3 + [(len(total) - 3 * n_experts) // 2] * 2)
    for sign, part in ((1, group), (-1, total - group)):
        a, aa, an, n, nn, texts = np.split(part, bounds, axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = a / n
            # Residuals of a ratio: activations - rate · tokens of each text.
            squares = aa - 2 * rate * an + rate**2 * nn
            squares = np.where(squares < TIE * aa, 0, squares)
            variance = variance + squares / n**2 * (texts / (texts - 1))
            difference = difference + sign * rate
    size = np.abs(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(size < TIE, 0.0, size / np.sqrt(variance))
    # A group of one text has no spread of its own (0/0): then the difference itself is compared.
    return np.where(np.isnan(statistic), size, statistic)


def signs(
    activations: np.ndarray, n_tokens: np.ndarray, group: np.ndarray, text: np.ndarray, n_permutations: int, seed: int
) -> np.ndarray:
    """How often random signs of the texts' parts in the difference reach the observed one: (n_experts,).

    For sets of tokens that share texts. With the rate of both sets together, the parts of the texts add up to the
    difference; without a difference they are as often above 0 as below.
    """
    n_texts = int(text.max(initial=-1)) + 1
    size = sum_by(n_tokens, group, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        residual = activations - n_tokens * (activations.sum(axis=0) / n_tokens.sum(axis=0))
        weight = np.where(group[:, None] == 0, 1 / size[0], -1 / size[1])
        parts = sum_by(residual * weight, text, n_texts)
    observed = np.abs(parts.sum(axis=0))
    reached = np.zeros(activations.shape[1])
    random = np.random.default_rng(seed)
    step = max(1, CHUNK // max(n_texts, 1))
    for start in range(0, n_permutations, step):
        turns = random.choice(np.array([-1.0, 1.0]), size=(min(step, n_permutations - start), n_texts))
        reached += (np.abs(turns @ parts) >= observed * (1 - TIE) - TIE / n_tokens.sum(axis=0)).sum(axis=0)
    return reached
