"""Windows of tokens: how often each expert is used in m tokens in a row, for every place of every text, as counts.

What windows are counted for (see consistency) needs only how many windows and experts have each number f of
activations, from 0 to m. That is kept for each group and each of at most 256 random blocks of texts, the units of
resampling.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.special import gammaln
from scipy.stats import binom

from workbench.analysis.counting import experts_of, sum_by, text_codes, token_labels
from workbench.errors import InputError
from workbench.tracefile import Trace

MOST_BLOCKS, FEWEST_BLOCKS = 256, 32
"""Groups of texts that are resampled: fewer where tables of all experts and windows would need much memory."""
N_PARTS = 16
"""Parts of the work that threads take up in turn."""
NEGLIGIBLE = 1e-14
"""Expected windows, of one expert and text, below which a probability's tail is left out."""
TABLE = 1 << 25
"""Entries of the largest table of windows, 256 MB."""


@dataclass(frozen=True)
class Texts:
    """The sequences with a label, sorted into cells: a cell is what one group has in one block of texts.

    labels        the groups
    start, length int64 (n,)        first token and number of tokens of each sequence, in the order of the cells
    cell          int64 (n,)        ascending
    text          int64 (n,)        number of the text each belongs to
    label         int64 (n,)        group of each
    group, block  int32 (n_cells,)  of each cell; group ascends
    n_unlabelled  sequences left out because they have no label
    """

    labels: list[str]
    start: np.ndarray
    length: np.ndarray
    cell: np.ndarray
    text: np.ndarray
    label: np.ndarray
    group: np.ndarray
    block: np.ndarray
    n_unlabelled: int


def sort_into_blocks(trace: Trace, by: str | None, level: str, windows: tuple[int, ...], seed: int) -> Texts:
    """Put the texts into random blocks and the sequences into the order of cells, so that a cell's table stays near."""
    sequences = trace.sequences()
    if by in ("phase", "position") and by not in sequences:
        raise InputError(f"a window has tokens of several {by}s: compare consistency by a column of the sequences.")
    label, labels = token_labels(trace, sequences, np.arange(len(sequences)), by)
    length = sequences["n_tokens"].to_numpy(np.int64)
    start = np.cumsum(length) - length
    text = text_codes(sequences)
    n_texts = int(text.max(initial=-1)) + 1
    experts = int(trace.layers["n_experts"].max()) if level == "expert" else 1
    usable = [window for window in windows if window <= length.max(initial=0)]
    entries = len(labels) * experts * (max(usable, default=0) + 1)
    n_blocks = min(n_texts, MOST_BLOCKS, max(FEWEST_BLOCKS, TABLE // max(entries, 1)))
    block = np.random.default_rng(seed).permutation(n_texts) % max(n_blocks, 1)

    kept = np.flatnonzero(label >= 0)
    key = label[kept] * max(n_blocks, 1) + block[text[kept]]
    found, cell = np.unique(key, return_inverse=True)
    order = np.argsort(cell, kind="stable")
    kept = kept[order]
    return Texts(
        labels=labels,
        start=start[kept],
        length=length[kept],
        cell=cell[order].astype(np.int64),
        text=text[kept],
        label=label[kept],
        group=(found // max(n_blocks, 1)).astype(np.int32),
        block=np.unique(found % max(n_blocks, 1), return_inverse=True)[1].astype(np.int32),
        n_unlabelled=len(sequences) - len(kept),
    )


@dataclass(frozen=True)
class Counted:
    """Windows of m tokens, in a layer or summed over layers.

    found     int64 (n_cells, n_rows, m + 1)   how many windows and experts have each f; a row is an expert, or all
    expected  float64 (n_groups, n_rows, m + 1)  the same, expected of tokens that choose each by itself
    shuffled  float64 (n_groups, n_rows, m + 1)  the same, expected if the tokens of each sequence were shuffled
    """

    window: int
    found: np.ndarray
    expected: np.ndarray
    shuffled: np.ndarray
    n_experts: int


def add(one: Counted, other: Counted) -> Counted:
    """The windows of two layers together."""
    return Counted(
        one.window,
        one.found + other.found,
        one.expected + other.expected,
        one.shuffled + other.shuffled,
        one.n_experts + other.n_experts,
    )


def count_windows(trace: Trace, layer: int, texts: Texts, windows: tuple[int, ...], single: bool) -> list[Counted]:
    """The windows of a layer, an expert a row (`single`) or all experts together."""
    experts = trace.experts(layer)
    n_experts = experts_of(trace, layer)
    row = np.arange(n_experts) if single else np.zeros(n_experts, np.int64)
    n_rows, n_groups = n_experts if single else 1, len(texts.labels)
    parts = shares_of_work(texts)
    longest = int(texts.length.max(initial=0))
    logs = gammaln(np.arange(longest + 2) + 1)
    result = []
    for window in windows:
        reached = window if window <= longest else 0  # nothing to count: no table
        found = np.zeros((len(texts.group), n_rows, reached + 1), np.int64)
        loads = np.zeros((len(texts.group), n_experts), np.int64)

        def work(
            part: slice, reached: int = reached, found: np.ndarray = found, loads: np.ndarray = loads
        ) -> np.ndarray:
            where, label = (texts.start[part], texts.length[part]), texts.label[part]
            slide(experts, *where, texts.cell[part], reached, row, found, loads)
            shuffled = np.zeros((label[-1] - label[0] + 1, n_rows, reached + 1))
            shuffle(experts, *where, label - label[0], reached, row, logs, shuffled)
            return shuffled

        shuffled = np.zeros((n_groups, n_rows, reached + 1))
        if reached:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                for part, own in zip(parts, pool.map(work, parts), strict=True):
                    shuffled[texts.label[part][0] :][: len(own)] += own
        by_group = sum_by(loads, texts.group, n_groups)
        expected = by_chance(by_group, windows_of(texts, window), reached, single)
        result.append(Counted(window, found, expected, shuffled, n_experts))
    return result


def shares_of_work(texts: Texts) -> list[slice]:
    """Cut the sequences into parts for threads, never inside a cell: no two of them write to the same table.

    Their number doesn't depend on the machine, nor do sums over them.
    """
    done = np.cumsum(texts.length)
    if not len(done):
        return []
    goals = done[-1] * np.arange(1, N_PARTS) / N_PARTS
    cuts = np.searchsorted(texts.cell, texts.cell[np.searchsorted(done, goals)])
    edges = np.unique([0, *cuts, len(done)])
    return [slice(begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]


@njit(cache=True, nogil=True)
def slide(
    experts: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    cell: np.ndarray,
    window: int,
    row: np.ndarray,
    found: np.ndarray,
    loads: np.ndarray,
) -> None:
    """Count windows by f into found[cell, row of the expert, f], and activations in windows into loads[cell, expert].

    A step of the window changes the counts of at most 2k experts. Only they are looked at: what an expert's count was
    since its last change is added at once, so a step costs 2k and not E.
    """
    n_experts, k = len(row), experts.shape[1]
    count = np.zeros(n_experts, np.int64)
    since = np.zeros(n_experts, np.int64)  # the window at which the count became what it is
    for text in range(len(start)):
        n_windows = length[text] - window + 1
        if n_windows < 1:
            continue
        table, load, first = found[cell[text]], loads[cell[text]], start[text]
        count[:] = 0
        since[:] = 0
        for token in range(window):
            for rank in range(k):
                expert = experts[first + token, rank]
                if expert < n_experts:
                    count[expert] += 1
        for at in range(1, n_windows):
            n_holding = min(at, window)  # how many windows had the token that leaves
            for rank in range(k):
                expert = experts[first + at - 1, rank]
                if expert < n_experts:
                    table[row[expert], min(count[expert], window)] += at - since[expert]
                    since[expert] = at
                    count[expert] -= 1
                    load[expert] += n_holding
            for rank in range(k):
                expert = experts[first + at + window - 1, rank]
                if expert < n_experts:
                    table[row[expert], min(count[expert], window)] += at - since[expert]
                    since[expert] = at
                    count[expert] += 1
        for expert in range(n_experts):
            table[row[expert], min(count[expert], window)] += n_windows - since[expert]
        for token in range(n_windows - 1, length[text]):
            n_holding = n_windows - max(0, token - window + 1)
            for rank in range(k):
                expert = experts[first + token, rank]
                if expert < n_experts:
                    load[expert] += n_holding


@njit(cache=True, nogil=True)
def shuffle(
    experts: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    label: np.ndarray,
    window: int,
    row: np.ndarray,
    logs: np.ndarray,
    shuffled: np.ndarray,
) -> None:
    """Add the windows by f that are expected if the tokens of each sequence were shuffled, to shuffled[label, row, f].

    f is then hypergeometric, for every window alike: of the text's tokens, so many use the expert. logs: log n! for all
    n up to the longest sequence.
    """
    n_experts, k = len(row), experts.shape[1]
    uses = np.zeros(n_experts, np.int64)
    for text in range(len(start)):
        size, first = length[text], start[text]
        n_windows = size - window + 1
        if n_windows < 1:
            continue
        table = shuffled[label[text]]
        uses[:] = 0
        for token in range(first, first + size):
            for rank in range(k):
                expert = experts[token, rank]
                if expert < n_experts:
                    uses[expert] += 1
        constant = logs[window] + logs[size - window] - logs[size]
        for expert in range(n_experts):
            used = min(uses[expert], size)
            others = size - used
            lowest, highest = max(0, window - others), min(window, used)
            # From the most probable f outwards: each probability follows from its neighbour's.
            top = min(max((window + 1) * (used + 1) // (size + 2), lowest), highest)
            most = n_windows * np.exp(
                constant + logs[used] - logs[top] - logs[used - top] + logs[others] - logs[window - top]
                - logs[others - window + top]
            )  # fmt: skip
            table[row[expert], top] += most
            value = most
            for f in range(top, highest):
                value *= (used - f) * (window - f) / ((f + 1) * (others - window + f + 1))
                table[row[expert], f + 1] += value
                if value < NEGLIGIBLE:
                    break
            value = most
            for f in range(top, lowest, -1):
                value *= f * (others - window + f) / ((used - f + 1) * (window - f + 1))
                table[row[expert], f - 1] += value
                if value < NEGLIGIBLE:
                    break


def windows_of(texts: Texts, window: int) -> np.ndarray:
    """Number of windows in each group: int64 (n_groups,)."""
    return np.bincount(texts.label, np.maximum(texts.length - window + 1, 0), minlength=len(texts.labels)).astype(
        np.int64
    )


def by_chance(loads: np.ndarray, n_windows: np.ndarray, window: int, single: bool) -> np.ndarray:
    """Windows by f, if each token chose by itself: float64 (n_groups, n_rows, window + 1).

    loads (n_groups, n_experts): activations in the windows of each group. f is then binomial, whatever the experts of
    one token have to do with each other: only the sum over experts enters.
    """
    slots = window * n_windows[:, None]
    rate = np.divide(loads, slots, out=np.zeros(loads.shape), where=slots > 0)
    expected = np.empty((len(loads), loads.shape[1] if single else 1, window + 1))
    for group in range(len(loads)):
        chance = n_windows[group] * binom.pmf(np.arange(window + 1), window, np.minimum(rate[group], 1)[:, None])
        expected[group] = chance if single else chance.sum(axis=0)
    return expected
