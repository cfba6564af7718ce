"""Means of what tokens have (an overlap, an entropy, a norm) by group, with intervals from resampling texts.

A mean is a ratio of two sums over tokens, so that texts count by their tokens and a token without a value counts
nowhere. Where there are very many texts they are drawn in random blocks: the interval is the same, the table is small.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from workbench.analysis.counting import Cells
from workbench.analysis.resampling import draws, interval

MOST_BLOCKS = 2000
"""More texts than this are drawn in as many random blocks."""


def in_blocks(cells: Cells, seed: int) -> Cells:
    """The same cells with at most MOST_BLOCKS texts to draw: texts join random blocks where there are more.

    The sizes of the groups (n_texts and the others) stay those of the texts themselves.
    """
    n_texts = int(cells.text.max(initial=-1)) + 1
    if n_texts <= MOST_BLOCKS:
        return cells
    block = np.random.default_rng(seed).permutation(n_texts) % MOST_BLOCKS
    key = cells.group.astype(np.int64) * MOST_BLOCKS + block[cells.text]
    kept, merged = np.unique(key, return_inverse=True)
    of_token = np.where(cells.of_token >= 0, merged.astype(np.int32)[cells.of_token], np.int32(-1))
    group, text = (kept // MOST_BLOCKS).astype(np.int32), (kept % MOST_BLOCKS).astype(np.int32)
    return replace(cells, group=group, text=text, strata=None, of_token=of_token)


def only(cells: Cells, kept: np.ndarray, of_sequence: np.ndarray) -> Cells:
    """The cells of some tokens: kept bool (n_tokens,), of_sequence int (n_tokens,). Groups without a token are gone."""
    used = kept & (cells.of_token >= 0)
    rows, cell = np.unique(cells.of_token[used], return_inverse=True)
    present, group = np.unique(cells.group[rows], return_inverse=True)
    text = np.unique(cells.text[rows], return_inverse=True)[1]
    of_token = np.full(len(kept), -1, np.int32)
    of_token[used] = cell
    n_groups, n_sequences = len(present), int(of_sequence.max(initial=0)) + 1
    pairs = np.unique(group[cell] * n_sequences + of_sequence[used])
    return replace(
        cells,
        labels=[cells.labels[label] for label in present],
        group=group.astype(np.int32),
        text=text.astype(np.int32),
        strata=None,
        of_token=of_token,
        n_tokens=np.bincount(group[cell], minlength=n_groups),
        n_sequences=np.bincount(pairs // n_sequences, minlength=n_groups),
        n_texts=np.bincount(np.unique(np.stack([group, text]), axis=1)[0], minlength=n_groups),
    )


def drawn_texts(cells: Cells, n_resamples: int, seed: int) -> np.ndarray:
    """How often each resample drew each text: float32 (n_resamples, n_texts); the same for every layer."""
    n_texts = int(cells.text.max(initial=-1)) + 1
    chunks = list(draws(n_texts, n_resamples, seed)) if n_texts else []
    return np.concatenate(chunks) if chunks else np.empty((0, n_texts), np.float32)


def sums(values: Sequence[np.ndarray], cells: Cells) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cell's tokens, NaN left out.

    values: one array (n_tokens,) a column. Returns two float64 (n_cells, n_columns).
    """
    n_cells = len(cells.group)
    total, number = np.zeros((n_cells, len(values))), np.zeros((n_cells, len(values)))
    for column, value in enumerate(values):
        known = (cells.of_token >= 0) & ~np.isnan(value)
        cell = cells.of_token[known]
        total[:, column] = np.bincount(cell, value[known], minlength=n_cells)
        number[:, column] = np.bincount(cell, minlength=n_cells)
    return total, number


def by_group(rows: np.ndarray, cells: Cells) -> np.ndarray:
    """Sums over the cells of each group: (n_cells, n_columns) -> float64 (n_groups, n_columns)."""
    total = np.zeros((len(cells.labels), rows.shape[1]))
    np.add.at(total, cells.group, rows)
    return total


def resampled(rows: np.ndarray, cells: Cells, drawn: np.ndarray) -> Iterator[np.ndarray]:
    """`by_group` of every resample, group by group: each float64 (n_resamples, n_columns)."""
    bounds = np.searchsorted(cells.group, np.arange(len(cells.labels) + 1))
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        yield drawn[:, cells.text[begin:end]].astype(np.float64) @ rows[begin:end]


def means(
    total: np.ndarray, number: np.ndarray, cells: Cells, drawn: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of each group and column with its 95% interval, from the `sums` of cells.

    Returns value, low, high: float64 (n_groups, n_columns). The value is NaN where there is nothing to average, the
    interval also where the group is a single text.
    """
    value = ratio(by_group(total, cells), by_group(number, cells))
    low, high = np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    width = total.shape[1]
    for group, both in enumerate(resampled(np.hstack([total, number]), cells, drawn)):
        if cells.n_texts[group] > 1:
            low[group], high[group] = interval(ratio(both[:, :width], both[:, width:]))
    unknown = np.isnan(value)
    low[unknown], high[unknown] = np.nan, np.nan
    return value, low, high


def ratio(total: np.ndarray, number: np.ndarray) -> np.ndarray:
    """total / number, NaN where the number is 0."""
    return np.divide(total, number, out=np.full(np.broadcast(total, number).shape, np.nan), where=number > 0)
