"""Two choices of experts for the same token, compared: measures of each token, and what chance alone would give."""

from collections.abc import Iterator
from typing import NamedTuple

import numba
import numpy as np

from workbench.analysis.counting import Cells, experts_of
from workbench.analysis.matching import Matched
from workbench.analysis.token_means import ratio
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace


class Choices(NamedTuple):
    """What two runs chose for each matched token in one layer.

    here, there  uint16 (n, k)  experts, NO_EXPERT where there is none
    columns      measures of each token, float64 (n,), NaN where neither run chose an expert: overlap, exact_match,
                 top1_match, and with weights in both runs weight_difference and weight_shift
    sizes        (n, 2)  number of experts in each run
    first        (n, 2)  the first expert in each run
    hashes       uint64 (n, 2)  the same for the same set
    """

    here: np.ndarray
    there: np.ndarray
    columns: dict[str, np.ndarray]
    sizes: np.ndarray
    first: np.ndarray
    hashes: np.ndarray


def choices(trace: Trace, other: Trace, layer: int, matched: Matched) -> Choices:
    """The choices of both runs for the matched tokens in one layer, compared token by token."""
    a, b = taken(trace.experts(layer), matched.first), taken(other.experts(layer), matched.second)
    weighted = "weights" in trace.recorded and "weights" in other.recorded
    wa = wb = np.zeros((1, 1), np.float32)
    if weighted:
        wa, wb = taken(trace.weights(layer), matched.first), taken(other.weights(layer), matched.second)
    n = len(a)
    marks = np.random.default_rng(0).integers(1, 1 << 62, experts_of(trace, layer)).astype(np.uint64)
    overlap, exact, top1, difference, shift = (np.full(n, np.nan) for _ in range(5))
    sizes, first = np.zeros((n, 2), np.uint8 if a.shape[1] < 256 else np.uint16), np.full((n, 2), NO_EXPERT)
    hashes = np.zeros((n, 2), np.uint64)
    compare(a, b, wa, wb, weighted, marks, overlap, exact, top1, difference, shift, sizes, first, hashes)
    columns = {"overlap": overlap, "exact_match": exact, "top1_match": top1}
    if weighted:
        columns |= {"weight_difference": difference, "weight_shift": shift}
    return Choices(a, b, columns, sizes, first, hashes)


def taken(values: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The rows of these tokens; no copy where they are all the rows in their order, as for two runs of one corpus."""
    whole = len(tokens) == len(values) and bool((tokens == np.arange(len(tokens))).all())
    return values if whole else values[tokens]


@numba.njit(cache=True, nogil=True)
def compare(a, b, wa, wb, weighted, marks, overlap, exact, top1, difference, shift, sizes, first, hashes):
    """Fill in the measures of each token; the other arrays' rows are tokens, as in `choices`.

    A hash is the sum of the marks of a set's experts: the same for the same set, in whatever order.
    """
    none = 65535
    for token in range(len(a)):
        best_a, best_b = -1.0, -1.0
        sum_a, sum_b, l1 = 0.0, 0.0, 0.0
        n_a, n_b, both = 0, 0, 0
        for i in range(a.shape[1]):
            expert = a[token, i]
            if expert == none:
                continue
            n_a += 1
            hashes[token, 0] += marks[expert]
            weight = wa[token, i] if weighted else np.float32(-i)
            if n_a == 1 or weight > best_a:
                best_a = weight
                first[token, 0] = expert
            there = np.float32(0)
            for j in range(b.shape[1]):
                if b[token, j] == expert:
                    both += 1
                    if weighted:
                        there = wb[token, j]
            if weighted:
                sum_a += weight
                l1 += abs(weight - there)
        for j in range(b.shape[1]):
            expert = b[token, j]
            if expert == none:
                continue
            n_b += 1
            hashes[token, 1] += marks[expert]
            weight = wb[token, j] if weighted else np.float32(-j)
            if n_b == 1 or weight > best_b:
                best_b = weight
                first[token, 1] = expert
            if weighted:
                sum_b += weight
                shared = False
                for i in range(a.shape[1]):
                    shared = shared or a[token, i] == expert
                if not shared:
                    l1 += weight
        sizes[token, 0], sizes[token, 1] = n_a, n_b
        if n_a or n_b:
            overlap[token] = both / max(n_a, n_b)
            exact[token] = 1.0 if both == n_a and both == n_b else 0.0
            top1[token] = 1.0 if n_a and n_b and first[token, 0] == first[token, 1] else 0.0
            if weighted:
                difference[token] = l1
                if sum_a + sum_b > 0:
                    shift[token] = l1 / (sum_a + sum_b)


def chances(found: Choices, cells: Cells, n_experts: int) -> dict[str, np.ndarray]:
    """Mean of each measure of sets over all pairs of one token here and a different token there of the same group.

    The measures: overlap, exact_match, top1_match. Pairs in which neither has an expert are left out. float64
    (n_groups,) a measure, NaN where there is no pair.
    """
    a, b, columns, sizes, first, hashes = found
    n_groups = len(cells.labels)
    used = (cells.of_token >= 0) & (sizes.max(axis=1) > 0)
    group = np.full(len(a), -1)
    group[used] = cells.group[cells.of_token[used]]
    number = np.bincount(group[used], minlength=n_groups).astype(np.float64)
    empty = [np.bincount(group[used & (sizes[:, side] == 0)], minlength=n_groups) for side in (0, 1)]
    n_pairs = number * (number - 1) - empty[0] * empty[1]

    def without_itself(total: np.ndarray, name: str) -> np.ndarray:
        agreeing = np.bincount(group[used], columns[name][used], minlength=n_groups)
        return ratio(np.maximum(total - agreeing, 0), n_pairs)

    overlap = np.zeros(n_groups)
    chosen = [
        {
            size: tally(x, group, used & (sizes[:, side] == size), n_groups, n_experts)
            for size in sizes_of(sizes[:, side])
        }
        for side, x in enumerate((a, b))
    ]
    for size, here in chosen[0].items():
        for size_there, there in chosen[1].items():
            overlap += (here * there).sum(axis=1) / max(size, size_there)
    top1 = tally(first[:, :1], group, used, n_groups, n_experts) * tally(first[:, 1:], group, used, n_groups, n_experts)
    exact = np.zeros(n_groups)
    for label in range(n_groups):
        here, there = (np.unique(part, return_counts=True) for part in set_hashes(hashes, sizes, group == label))
        _, at, at_there = np.intersect1d(here[0], there[0], assume_unique=True, return_indices=True)
        exact[label] = (here[1][at].astype(np.float64) * there[1][at_there]).sum()
    return {
        "overlap": without_itself(overlap, "overlap"),
        "exact_match": without_itself(exact, "exact_match"),
        "top1_match": without_itself(top1.sum(axis=1), "top1_match"),
    }


def set_hashes(hashes: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Hashes of the sets that aren't empty, of this run and of the other."""
    for side in (0, 1):
        yield hashes[chosen & (sizes[:, side] > 0), side]


def sizes_of(sizes: np.ndarray) -> list[int]:
    """The sizes that sets have, without 0."""
    return [size for size, count in enumerate(np.bincount(sizes)) if size and count]


def tally(experts: np.ndarray, group: np.ndarray, used: np.ndarray, n_groups: int, n_experts: int) -> np.ndarray:
    """How often each group's tokens chose each expert: float64 (n_groups, n_experts)."""
    total = np.zeros(n_groups * n_experts)
    for rank in range(experts.shape[1]):
        chosen = used & (experts[:, rank] != NO_EXPERT)
        total += np.bincount(group[chosen] * n_experts + experts[chosen, rank], minlength=len(total))
    return total.reshape(n_groups, n_experts)
