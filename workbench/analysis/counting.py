"""Who chose which expert: counts of expert choices by text and label, on which most analyses rest.

A *text* is what resampling draws: the sequences of one `segment_id` (its pieces and its translations, which depend on
each other), or one sequence where there is none. A *cell* is what a label belongs to: the tokens of one text with one
label (and one stratum). Counts are kept a cell and never a token.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numba import njit
from scipy import sparse
from scipy.special import xlogy

from workbench import counts
from workbench.errors import InputError
from workbench.schema import PHASES
from workbench.tracefile import Trace

POSITIONS = (1, 4, 16, 64, 256)
"""Where a new bucket of `by="position"` begins."""
MOST_GROUPS = 256
"""More groups than this are a mistake (such as grouping by `sha256`) and would fill the memory with resamples."""
EVERYTHING = "all"
"""Label of the one group when nothing is grouped."""


@dataclass(frozen=True)
class Cells:
    """The tokens of a trace sorted into cells. Rows are in order of (label, text, stratum).

    labels     the groups, sorted
    group      int32 (n_cells,)   label of each cell
    text       int32 (n_cells,)   text of each cell, numbered without gaps
    strata     int32 (n_cells,)   or None
    of_token   int32 (n_tokens,)  cell of each token, -1 where the token has no label; in a run that counts, of each
                                  row of `workbench.counts.rows`
    n_tokens, n_sequences         int64 (n_groups,)
    n_texts                       int64 (n_groups,)
    n_unlabelled                  sequences left out because they have no label
    """

    labels: list[str]
    group: np.ndarray
    text: np.ndarray
    strata: np.ndarray | None
    of_token: np.ndarray
    n_tokens: np.ndarray
    n_sequences: np.ndarray
    n_texts: np.ndarray
    n_unlabelled: int


def sort_into_cells(trace: Trace, by: str | None, within: str | None = None) -> Cells:
    """Sort the tokens by `by`: a column of the sequences, `phase`, `position` (buckets), or None for a single group.

    `within` is a column of the sequences: the strata of the permutation null.
    """
    sequences = trace.sequences()
    if trace.counted:
        return _cells_of_counts(trace, sequences, by, within)
    of_sequence = trace.sequence_index()
    label, labels = token_labels(trace, sequences, of_sequence, by)
    return cells_of_labels(sequences, of_sequence, label, labels, within)


def _cells_of_counts(trace: Trace, sequences: pd.DataFrame, by: str | None, within: str | None) -> Cells:
    """The rows of a run that counts sorted into cells.

    Where groups of texts were counted, what is resampled is a block of texts: `n_texts` counts those.
    """
    rows, groups = counts.rows(trace), counts.grouped_by(trace)
    of_sequence = np.searchsorted(trace.sequence_ids, rows["seq"])
    for name in (by, within) if groups else ():
        if name is not None and name not in groups:
            raise InputError(
                f"run {trace.run!r} counted texts by {', '.join(groups)}, so nothing is known by {name!r}: trace again "
                f"with --counts-by {','.join([*groups, name])}, or --counts-by seq."
            )
    label, labels = token_labels(trace, sequences, of_sequence, by)
    n_tokens = rows["n_tokens"].to_numpy()
    if not groups:
        return cells_of_labels(sequences, of_sequence, label, labels, within, n_tokens)
    blocks = sequences.assign(segment_id=None)
    blocks.loc[of_sequence, "segment_id"] = rows["block"].to_numpy()
    cells = cells_of_labels(blocks, of_sequence, label, labels, within, n_tokens)
    every = np.arange(len(sequences))
    whole = cells_of_labels(sequences, every, token_labels(trace, sequences, every, by)[0], labels, within)
    return replace(cells, n_sequences=whole.n_sequences, n_unlabelled=whole.n_unlabelled)


def cells_of_labels(
    sequences: pd.DataFrame,
    of_sequence: np.ndarray,
    label: np.ndarray,
    labels: list[str],
    within: str | None = None,
    n_tokens: np.ndarray | None = None,
) -> Cells:
    """Cells of tokens whose labels are known: `label` int (n_tokens,), a place in `labels`, -1 for none.

    n_tokens  int (n,) where there is a row for several tokens at once: how many
    """
    label = label.astype(np.int64, copy=False)
    text = text_codes(sequences)[of_sequence]
    stratum = np.zeros(len(label), np.int64)
    if within is not None:
        stratum = pd.factorize(column(sequences, within).map(as_label), use_na_sentinel=False)[0][of_sequence]

    kept = label >= 0
    key = (label * (text.max(initial=0) + 1) + text) * (stratum.max(initial=0) + 1) + stratum
    _, first, cell = np.unique(key[kept], return_index=True, return_inverse=True)
    of_token = np.full(len(label), -1, np.int32)
    of_token[kept] = cell
    group = label[kept][first].astype(np.int32)
    pairs = np.unique(label[kept] * len(sequences) + of_sequence[kept])  # a sequence can have tokens of several labels
    return Cells(
        labels=labels,
        group=group,
        text=np.unique(text[kept][first], return_inverse=True)[1].astype(np.int32),
        strata=stratum[kept][first].astype(np.int32) if within is not None else None,
        of_token=of_token,
        n_tokens=np.bincount(label[kept], None if n_tokens is None else n_tokens[kept], len(labels)).astype(np.int64),
        n_sequences=np.bincount(pairs // max(len(sequences), 1), minlength=len(labels)),
        n_texts=np.bincount(np.unique(np.stack([group, text[kept][first]]), axis=1)[0], minlength=len(labels)),
        n_unlabelled=len(sequences) - len(np.unique(of_sequence[kept])),
    )


def text_codes(sequences: pd.DataFrame) -> np.ndarray:
    """Number of the text each sequence belongs to: int64 (n_sequences,)."""
    codes, segments = pd.factorize(sequences["segment_id"])
    alone = codes < 0
    codes[alone] = len(segments) + np.arange(alone.sum())
    return codes.astype(np.int64)


def token_labels(
    trace: Trace, sequences: pd.DataFrame, of_sequence: np.ndarray, by: str | None
) -> tuple[np.ndarray, list[str]]:
    """Label of each token, int64 with -1 for none, and the labels' names."""
    if by is None:
        return np.zeros(len(of_sequence), np.int64), [EVERYTHING]
    if by in sequences.columns:
        codes, labels = pd.factorize(column(sequences, by).map(as_label), sort=True)
        if len(labels) > MOST_GROUPS:
            raise InputError(
                f"{by!r} has {len(labels):,} different values; at most {MOST_GROUPS} groups can be compared."
            )
        return codes.astype(np.int64)[of_sequence], [str(label) for label in labels]
    if by == "phase":
        phase = (counts.rows(trace) if trace.counted else trace.tokens())["phase"]
        codes = pd.Categorical(phase, categories=PHASES).codes
        return present(codes, list(PHASES))
    if by == "position":
        codes = np.digitize(trace.tokens()["pos"].to_numpy(), POSITIONS)
        edges = [0, *POSITIONS]
        ends = [str(end - 1) for end in POSITIONS]
        names = [begin if begin == end else f"{begin}–{end}" for begin, end in zip(map(str, edges), ends, strict=False)]
        return present(codes, [*names, f"{edges[-1]}+"])
    raise InputError(no_column(sequences, by))


def as_label(value: Any) -> str | None:
    """A metadata value (a text, a number, a list, …) as a label; None where it is missing."""
    return None if pd.api.types.is_scalar(value) and pd.isna(value) else str(value)


def present(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Drop the names that no token has."""
    used, codes = np.unique(codes, return_inverse=True)
    return codes.astype(np.int64), [names[code] for code in used]


def column(sequences: pd.DataFrame, name: str) -> pd.Series:
    """A column of the sequences, or an error that lists those there are."""
    if name not in sequences.columns or sequences[name].isna().all():
        raise InputError(no_column(sequences, name))
    return sequences[name]


def no_column(sequences: pd.DataFrame, name: str) -> str:
    """What to say when nothing is known by this name."""
    filled = [str(other) for other in sequences.columns if sequences[other].notna().any()]
    return (
        f"the sequences of this trace have no {name!r}; they have {', '.join(filled)}, and every token has 'phase' and "
        "'position'. Give the corpus a column of that name and trace it again."
    )


def count(trace: Trace, layer: int, cells: Cells) -> np.ndarray:
    """How often the tokens of each cell chose each expert: float64 (n_cells, n_experts)."""
    if trace.counted:
        kept = cells.of_token >= 0
        return sum_by(counts.loads(trace, layer)[kept], cells.of_token[kept], len(cells.group))
    total = np.zeros((len(cells.group), experts_of(trace, layer)))
    add_choices(trace.experts(layer), cells.of_token, total)
    return total


@njit(cache=True, nogil=True)
def add_choices(experts: np.ndarray, row: np.ndarray, total: np.ndarray) -> None:
    """Count the experts of each token into its row of total (n_rows, n_experts); row -1: the token doesn't count."""
    n_experts = total.shape[1]
    for token in range(len(experts)):
        if row[token] >= 0:
            counted = total[row[token]]
            for rank in range(experts.shape[1]):
                expert = experts[token, rank]
                if expert < n_experts:  # NO_EXPERT is larger
                    counted[expert] += 1


def sizes(cells: Cells, repeat: int = 1) -> dict[str, Any]:
    """Columns of a result that say how much each group rests on, each group `repeat` times: n_tokens, n_sequences,
    n_texts, and the sequences left out for want of a label."""
    return {
        "n_tokens": np.repeat(cells.n_tokens, repeat),
        "n_sequences": np.repeat(cells.n_sequences, repeat),
        "n_texts": np.repeat(cells.n_texts, repeat),
        "n_unlabelled": cells.n_unlabelled,
    }


def experts_of(trace: Trace, layer: int) -> int:
    """Number of experts of a layer."""
    return int(trace.layers["n_experts"].iloc[layer])


def sum_by(rows: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum the rows of each group: (n, n_columns) -> float64 (n_groups, n_columns)."""
    places = (np.ones(len(group)), (group, np.arange(len(group))))
    return sparse.csr_array(places, shape=(n_groups, len(group))) @ np.asarray(rows, np.float64)


def shares(counts: np.ndarray) -> np.ndarray:
    """Counts over experts (last axis) to shares of assignments; NaN where there is no assignment."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis of counts (normalised here); NaN where the counts are all 0."""
    total = counts.sum(axis=-1)
    safe = np.where(total > 0, total, 1)
    # H = log N - sum(c log c)/N: one pass, and xlogy makes 0 log 0 = 0.
    result = np.log(safe) - xlogy(counts, counts).sum(axis=-1) / safe
    return np.where(total > 0, np.maximum(result, 0), np.nan)


def cells_to_compare(trace: Trace, by: str, within: str | None = None) -> Cells:
    """`sort_into_cells` for a comparison of the groups; InputError where there is nothing to compare."""
    cells = sort_into_cells(trace, by, within)
    need_two_groups(cells, by, within)
    return cells


def need_two_groups(cells: Cells, by: str, within: str | None) -> None:
    """Refuse a comparison that has nothing to compare."""
    if len(cells.labels) < 2:
        found = f"only {cells.labels[0]!r}" if cells.labels else "none"
        raise InputError(f"comparing by {by!r} takes at least two values; this trace has {found}.")
    if cells.strata is not None:
        pairs = np.unique(np.stack([cells.strata, cells.group]), axis=1)
        if len(np.unique(pairs[0])) == pairs.shape[1]:
            raise InputError(
                f"{by!r} never varies within a {within!r}, so there is nothing to permute; leave `within` out, or "
                "choose a column inside which several values occur."
            )
