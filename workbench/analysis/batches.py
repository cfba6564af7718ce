"""Batches of tokens as a server would form them from the texts of a trace.

The texts are put in random order, one after the other, as a single stream. With `prefill` a batch is `batch_tokens`
consecutive tokens of the stream, so mostly of one text or a few. With `decode` the stream is cut into `batch_tokens`
equal stretches and a batch is one token of each: as many texts in lockstep, the next text taking the place of one
that ends. What doesn't fill a batch is left out.

To resample texts, the stream is first cut between texts into at most 64 blocks of about equal size, and no batch
reaches over a block's end. A block has at least four batches, and in decode as many texts as a batch has tokens, or
two tokens of one text would often meet in a batch; where there are too few texts for that, there is one block and
they do meet. Fewer than eight blocks give no interval.
"""

from dataclasses import dataclass

import numpy as np

from workbench.analysis.counting import text_codes
from workbench.analysis.pairs import MOST_BLOCKS, ratio
from workbench.analysis.resampling import draws, interval
from workbench.errors import InputError
from workbench.tracefile import Trace

BATCHINGS = ("prefill", "decode")
MOST_TOKENS = 1 << 22
"""Tokens in the batches of one size, at most: large batches are fewer."""
FEWEST_BATCHES = 4
"""Of a block."""
FEWEST_BLOCKS = 8
"""With fewer, an interval would say more about the cuts than about the texts."""


@dataclass(frozen=True)
class Stream:
    """All tokens of a trace, its texts in random order: order int64 (n_tokens,); ends int64 (n_texts,) of the texts."""

    order: np.ndarray
    ends: np.ndarray

    @property
    def n_texts(self) -> int:
        return len(self.ends)


@dataclass(frozen=True)
class Batches:
    """tokens int64 (n_batches, batch_tokens): places in the trace; block int64 (n_batches,); n_blocks."""

    tokens: np.ndarray
    block: np.ndarray
    n_blocks: int


def check(batch_tokens: tuple[int, ...], batching: str, n_batches: int) -> None:
    """Refuse batches that can't be formed."""
    if batching not in BATCHINGS:
        raise InputError(f"batching is {batching!r}; expected one of {', '.join(BATCHINGS)}.")
    if not batch_tokens or min(batch_tokens) < 1:
        raise InputError(f"batch_tokens is {batch_tokens}; expected one or more numbers of at least 1.")
    if n_batches < 1:
        raise InputError(f"n_batches is {n_batches}; expected at least 1.")


def stream(trace: Trace, seed: int) -> Stream:
    """Put the texts in random order."""
    texts, text = np.unique(text_codes(trace.sequences())[trace.sequence_index()], return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(texts))[text]
    return Stream(np.argsort(place, kind="stable"), np.cumsum(np.bincount(place, minlength=len(texts))))


def batches(tokens: Stream, batch_tokens: int, batching: str, n_batches: int) -> Batches:
    """Form at most n_batches batches, spread evenly over the stream; none if there are fewer tokens than in a batch."""
    n_tokens = len(tokens.order)
    most_blocks = tokens.n_texts // batch_tokens if batching == "decode" else tokens.n_texts
    wanted = max(1, min(MOST_BLOCKS, n_tokens // (FEWEST_BATCHES * batch_tokens), most_blocks))
    # A block ends with the text that reaches its part of the stream.
    parts = np.arange(1, wanted + 1) * n_tokens / wanted
    cuts = np.unique(tokens.ends[np.searchsorted(tokens.ends, parts)]) if n_tokens else np.empty(0, np.int64)
    starts = np.concatenate([[0], cuts])[: len(cuts)]
    full = (cuts - starts) // batch_tokens  # batches of each block
    block = np.repeat(np.arange(len(cuts)), full)
    step = np.arange(len(block)) - np.repeat(np.cumsum(full) - full, full)
    most = max(1, min(n_batches, MOST_TOKENS // batch_tokens))
    if len(block) > most:
        kept = np.linspace(0, len(block) - 1, most).round().astype(int)
        block, step = block[kept], step[kept]
    inside = np.arange(batch_tokens)
    if batching == "prefill":
        places = starts[block, None] + step[:, None] * batch_tokens + inside
    else:
        places = starts[block, None] + step[:, None] + full[block, None] * inside
    return Batches(tokens.order[places], block, len(cuts))


def block_weights(formed: Batches, n_resamples: int, seed: int) -> np.ndarray | None:
    """How often each batch counts in each resample of blocks: float64 (n_resamples, n_batches); None without any."""
    if formed.n_blocks < FEWEST_BLOCKS or n_resamples < 1 or not len(formed.block):
        return None
    drawn = np.concatenate(list(draws(formed.n_blocks, n_resamples, seed)))
    return drawn[:, formed.block].astype(np.float64)


def mean_of(values: np.ndarray, weights: np.ndarray | None, of: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean over batches (of the sums `of`, if given: Σ values / Σ of), with its interval; NaN batches are left out."""
    known = np.isfinite(values)
    share = known.astype(np.float64) if of is None else np.where(known, of, 0).astype(np.float64)
    filled = np.where(known, values, 0)
    value = float(ratio(filled.sum(), share.sum()))
    if weights is None:
        return value, np.nan, np.nan
    low, high = interval(ratio(weights @ filled, weights @ share))
    return value, float(low), float(high)


def percentile_of(values: np.ndarray, percent: float, weights: np.ndarray | None) -> tuple[float, float, float]:
    """A percentile over batches (the smallest value that so many don't exceed), with its interval."""
    known = np.isfinite(values)
    order = np.argsort(values[known], kind="stable")
    ascending = values[known][order]
    if not len(ascending):
        return np.nan, np.nan, np.nan
    value = float(ascending[max(int(np.ceil(percent / 100 * len(ascending))) - 1, 0)])
    if weights is None:
        return value, np.nan, np.nan
    reached = np.cumsum(weights[:, known][:, order], axis=1)
    place = (reached < percent / 100 * reached[:, -1:] - 1e-9).sum(axis=1)
    usable = reached[:, -1] > 0
    low, high = interval(np.where(usable, ascending[np.minimum(place, len(ascending) - 1)], np.nan))
    return value, float(low), float(high)
