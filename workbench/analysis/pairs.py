"""Pairs of experts that one token chooses, in one layer or in two: counts a block of texts, and what follows from them.

Texts are the unit of resampling, but a table of pairs a text would fill the memory: texts are first put at random into
at most 64 blocks, and the blocks are resampled. With fewer texts than blocks every text is a block of its own.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numba import njit
from scipy import stats

from workbench import counts
from workbench.analysis.counting import experts_of, text_codes
from workbench.analysis.resampling import CHUNK, draws, interval
from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace

MOST_BLOCKS = 64
MOST_CELLS = 1 << 25
"""Numbers in the tables of all blocks together: very many experts leave fewer blocks."""
FEWEST_BLOCKS = 8
EMPTY = int(NO_EXPERT)
SIGNIFICANT = 0.05
"""False-discovery rate below which findings call two experts linked."""


@dataclass(frozen=True)
class Blocks:
    """The texts of a trace in random blocks.

    text      int32 (n_tokens,)  text of each token, numbered without gaps
    of_text   int32 (n_texts,)   block of each text; only texts that have tokens
    n_blocks  0 only for a trace without tokens
    """

    text: np.ndarray
    of_text: np.ndarray
    n_blocks: int

    @property
    def n_texts(self) -> int:
        return len(self.of_text)

    @cached_property
    def of_token(self) -> np.ndarray:
        """int32 (n_tokens,): block of each token."""
        return self.of_text[self.text]


def text_blocks(trace: Trace, n_cells: int = 1, seed: int = 0) -> Blocks:
    """Put the texts into blocks at random; n_cells is the size of the table that will be kept a block.

    In a run that counts they were put there when it began, whatever the seed: `text` and `of_token` are empty there.
    """
    if not trace.counted:
        return drawn_blocks(text_codes(trace.sequences())[trace.sequence_index()], n_cells, seed)
    n_texts = len(np.unique(text_codes(trace.sequences())))
    return Blocks(np.empty(0, np.int32), np.zeros(n_texts, np.int32), len(used_blocks(trace)))


def drawn_blocks(text: np.ndarray, n_cells: int, seed: int = 0) -> Blocks:
    """`text_blocks` of texts whose tokens (or other rows) are known: text int (n,), the number of each row's text."""
    texts, of_token = np.unique(text, return_inverse=True)
    most = min(MOST_BLOCKS, max(FEWEST_BLOCKS, MOST_CELLS // max(n_cells, 1)))
    n_blocks = min(len(texts), most)
    block = np.random.default_rng(seed).permutation(len(texts)) % max(n_blocks, 1)
    return Blocks(of_token.astype(np.int32), block.astype(np.int32), n_blocks)


def most_experts(trace: Trace) -> int:
    """Number of experts of the layer that has most."""
    return int(trace.layers["n_experts"].max())


def chosen_layers(trace: Trace, layers: tuple[int, ...] | None) -> list[int]:
    """The layers asked for, all of them if None; InputError for one that doesn't exist."""
    if layers is None:
        return list(range(trace.n_layers))
    for layer in layers:
        if not 0 <= layer < trace.n_layers:
            raise InputError(f"layer {layer}: run {trace.run!r} has layers 0 to {trace.n_layers - 1}.")
    return sorted(set(layers))


@dataclass(frozen=True)
class Pairs:
    """How often tokens chose expert i (of a left layer) and expert j (of a right layer, maybe the same), a block each.

    both    int64 (n_blocks, E, E')  tokens that chose i and j
    left    int64 (n_blocks, E)      tokens that chose i
    right   int64 (n_blocks, E')     tokens that chose j
    tokens  int64 (n_blocks,)        tokens that chose any expert in both layers: no other token is counted anywhere
    """

    both: np.ndarray
    left: np.ndarray
    right: np.ndarray
    tokens: np.ndarray


def used_blocks(trace: Trace) -> np.ndarray:
    """The blocks that have texts, of a run that counts: all of them once it is finished."""
    return np.unique(counts.rows(trace)["block"].to_numpy())


def counted_pairs(trace: Trace, layer: int, other: int) -> Pairs:
    """What a run that counts says of two layers, or of one."""
    table = counts.pairs(trace, layer, other)[used_blocks(trace)]
    return Pairs(table[:, :-1, :-1], table[:, :-1, -1], table[:, -1, :-1], table[:, -1, -1])


def pairs_within(trace: Trace, layer: int, blocks: Blocks) -> tuple[Pairs, np.ndarray]:
    """Pairs of one layer, and how many tokens chose 0, 1, … k experts: int64 (k + 1,)."""
    if trace.counted:
        return counted_pairs(trace, layer, layer), counts.load_sizes(trace, layer).sum(axis=0)
    experts, n_experts = trace.experts(layer), experts_of(trace, layer)
    sizes = np.bincount((experts != NO_EXPERT).sum(axis=1), minlength=experts.shape[1] + 1)
    return count_pairs(experts, experts, n_experts, n_experts, blocks), sizes


def count_pairs(left: np.ndarray, right: np.ndarray, n_left: int, n_right: int, blocks: Blocks) -> Pairs:
    """Count the k × k pairs of every token; left and right are uint16 (n_tokens, k), NO_EXPERT where there is none."""
    both = np.zeros((blocks.n_blocks, n_left, n_right), np.int64)
    return Pairs(both, *_counted(left, right, n_left, n_right, blocks.of_token, blocks.n_blocks, both))


def count_choices(
    left: np.ndarray, right: np.ndarray, n_left: int, n_right: int, group: np.ndarray, n_groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that chose each expert, a group each: int64 (n_groups, E), (n_groups, E'), and all of them, (n_groups,).

    group  int (n_tokens,). Tokens without an expert in one of the two layers aren't counted.
    """
    return _counted(left, right, n_left, n_right, group, n_groups, np.zeros((0, 0, 0), np.int64))


def _counted(
    left: np.ndarray, right: np.ndarray, n_left: int, n_right: int, group: np.ndarray, n_groups: int, both: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lefts, rights = np.zeros((n_groups, n_left), np.int64), np.zeros((n_groups, n_right), np.int64)
    tokens = np.zeros(n_groups, np.int64)
    _count(left, right, group, both, lefts, rights, tokens)
    return lefts, rights, tokens


@njit(cache=True, nogil=True)
def _count(left, right, group, both, lefts, rights, tokens):
    """All counts in one pass over the tokens; an empty `both` leaves the pairs out."""
    for token in range(left.shape[0]):
        if not (_any(left[token]) and _any(right[token])):
            continue
        at = group[token]
        tokens[at] += 1
        for other in range(right.shape[1]):
            if right[token, other] != EMPTY:
                rights[at, right[token, other]] += 1
        for rank in range(left.shape[1]):
            i = left[token, rank]
            if i == EMPTY:
                continue
            lefts[at, i] += 1
            if len(both):
                for other in range(right.shape[1]):
                    j = right[token, other]
                    if j != EMPTY:
                        both[at, i, j] += 1


@njit(cache=True, nogil=True)
def _any(experts):
    n = 0
    for expert in experts:
        n += expert != EMPTY
    return n > 0


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def independent(pairs: Pairs) -> np.ndarray:
    """Expected pairs if the two choices had nothing to do with each other, n_i · n_j / N: float64 (E, E')."""
    total = np.outer(pairs.left.sum(axis=0), pairs.right.sum(axis=0)).astype(np.float64)
    return ratio(total, pairs.tokens.sum())


def measures(pairs: Pairs, expected: np.ndarray, n_resamples: int, seed: int) -> dict[str, np.ndarray]:
    """What a table of pairs says, each as (E, E').

    expected  float64 (E, E'): pairs that the null leads to

    count; probability P(j | i) = n_ij / n_i with low, high; expected; lift = count / expected with lift_low, lift_high;
    p, two-sided: n_ij − expected over its standard error against Student's t with n_blocks − 1 degrees of freedom. The
    error is the larger of the one seen between blocks and the one independent tokens would have: few counts can't
    pass for certainty. Intervals and p are NaN where there is only one block.
    """
    count = pairs.both.sum(axis=0)
    result = {"count": count, "probability": ratio(count, pairs.left.sum(axis=0)[:, None])}
    correction = ratio(expected, independent(pairs))
    ends = resampled(pairs, correction, n_resamples, seed)
    result |= {"low": ends[0], "high": ends[1], "expected": expected, "lift": ratio(count, expected)}
    return result | {"lift_low": ends[2], "lift_high": ends[3], "p": deviation(pairs, expected, correction)}


def resampled(
    pairs: Pairs, correction: np.ndarray, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ends of the intervals of P(j | i) and of the lift: each (E, E').

    In a resample the expected pairs are n_i · n_j / N of the resample times the correction of the whole trace.
    """
    n_blocks, n_left, n_right = pairs.both.shape
    low, high, lift_low, lift_high = (np.full((n_left, n_right), np.nan) for _ in range(4))
    if n_blocks < 2 or n_resamples < 1:
        return low, high, lift_low, lift_high
    drawn = np.concatenate(list(draws(n_blocks, n_resamples, seed))).astype(np.float64)
    tokens, right = drawn @ pairs.tokens, drawn @ pairs.right
    step = max(1, CHUNK // (n_resamples * n_right))
    for start in range(0, n_left, step):
        rows = slice(start, start + step)
        both = (drawn @ pairs.both[:, rows].reshape(n_blocks, -1)).reshape(n_resamples, -1, n_right)
        probability = ratio(both, (drawn @ pairs.left[:, rows])[..., None])
        low[rows], high[rows] = interval(probability)
        lift = ratio(probability, ratio(right, tokens[:, None])[:, None, :] * correction[rows])
        lift_low[rows], lift_high[rows] = interval(lift)
    return low, high, lift_low, lift_high


def deviation(pairs: Pairs, expected: np.ndarray, correction: np.ndarray) -> np.ndarray:
    """p of every pair: float64 (E, E'), NaN where nothing is expected or chance can't move the count."""
    n_blocks = len(pairs.tokens)
    if n_blocks < 2:
        return np.full(expected.shape, np.nan)
    n = max(pairs.tokens.sum(), 1)
    left, right = pairs.left.sum(axis=0) / n, pairs.right.sum(axis=0) / n
    mean = np.zeros(expected.shape)
    square = np.zeros(expected.shape)
    for both, of_left, of_right, tokens in zip(pairs.both, pairs.left, pairs.right, pairs.tokens, strict=True):
        # What the block adds to n_ij − c · n_i n_j / N, to first order: these parts sum to the whole.
        product = np.outer(of_left, right) + np.outer(left, of_right) - tokens * np.outer(left, right)
        part = both - correction * product
        mean += part
        square += part**2
    seen = (square - mean**2 / n_blocks) * n_blocks / (n_blocks - 1)
    error = np.sqrt(np.maximum(seen, expected * np.outer(1 - left, 1 - right)))
    p = 2 * stats.t.sf(np.abs(ratio(mean, error)), n_blocks - 1)
    return np.where(expected > 0, p, np.nan)


def linked(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows whose experts meet more often than expected, the one with most tokens above expectation first.

    Rare pairs have the largest lifts and matter least: that one says more.
    """
    found = frame[(frame["q"] < SIGNIFICANT) & (frame["lift"] > 1)]
    return found.loc[(found["expected"] - found["count"]).sort_values(kind="stable").index]
