"""Who chose whom: counts of expert choices by text and label, on which load, balance, specialization and information rest.

A *text* is what resampling draws: the sequences of one `segment_id` (its pieces and its translations, which depend on
each other), or one sequence where there is none. A *cell* is what a label belongs to: the tokens of one text with one
label (and one stratum). Counts are kept a cell and never a token.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.errors import InputError
from workbench.routing import NO_EXPERT
from workbench.trace import PHASES, Trace

POSITIONS = (1, 4, 16, 64, 256)
"""Where a new bucket of `by="position"` begins."""
EVERYTHING = "all"
"""Label of the one group when nothing is grouped."""


@dataclass(frozen=True)
class Cells:
    """The tokens of a trace sorted into cells. Rows are in order of (label, text, stratum).

    labels     the groups, sorted
    group      int32 (n_cells,)   label of each cell
    text       int32 (n_cells,)   text of each cell
    strata     int32 (n_cells,)   or None
    of_token   int32 (n_tokens,)  cell of each token, -1 where the token has no label
    n_tokens, n_sequences         int64 (n_groups,)
    n_unlabelled                  sequences left out because they have no label
    """

    labels: list[str]
    group: np.ndarray
    text: np.ndarray
    strata: np.ndarray | None
    of_token: np.ndarray
    n_tokens: np.ndarray
    n_sequences: np.ndarray
    n_unlabelled: int


def sort_into_cells(trace: Trace, by: str | None, within: str | None = None) -> Cells:
    """Sort the tokens by `by`: a column of the sequences, `phase`, `position` (buckets), or None for a single group.

    `within` is a column of the sequences: the strata of the permutation null.
    """
    sequences = trace.sequences()
    of_sequence = trace.sequence_index()
    text = text_codes(sequences)[of_sequence]
    label, labels = token_labels(trace, sequences, of_sequence, by)
    stratum = np.zeros(len(label), np.int64)
    if within is not None:
        stratum = pd.factorize(column(sequences, within), use_na_sentinel=False)[0][of_sequence]

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
        text=text[kept][first].astype(np.int32),
        strata=stratum[kept][first].astype(np.int32) if within is not None else None,
        of_token=of_token,
        n_tokens=np.bincount(label[kept], minlength=len(labels)),
        n_sequences=np.bincount(pairs // max(len(sequences), 1), minlength=len(labels)),
        n_unlabelled=len(sequences) - len(np.unique(of_sequence[kept])),
    )


def text_codes(sequences: pd.DataFrame) -> np.ndarray:
    """Number of the text each sequence belongs to: int64 (n_sequences,)."""
    segment = sequences["segment_id"].astype(object)
    alone = pd.Series([("sequence", row) for row in range(len(sequences))], index=sequences.index, dtype=object)
    return pd.factorize(segment.where(segment.notna(), alone))[0].astype(np.int64)


def token_labels(
    trace: Trace, sequences: pd.DataFrame, of_sequence: np.ndarray, by: str | None
) -> tuple[np.ndarray, list[str]]:
    """Label of each token, int64 with -1 for none, and the labels' names."""
    if by is None:
        return np.zeros(len(of_sequence), np.int64), [EVERYTHING]
    if by in sequences.columns:
        codes, labels = pd.factorize(sequences[by].map(lambda value: None if pd.isna(value) else str(value)), sort=True)
        return codes.astype(np.int64)[of_sequence], [str(label) for label in labels]
    if by == "phase":
        phase = trace.tokens()["phase"].to_numpy()
        codes = np.array([PHASES.index(name) for name in phase], np.int64)
        return present(codes, list(PHASES))
    if by == "position":
        codes = np.digitize(trace.tokens()["pos"].to_numpy(), POSITIONS)
        edges = [0, *POSITIONS]
        ends = [str(end - 1) for end in POSITIONS]
        names = [begin if begin == end else f"{begin}–{end}" for begin, end in zip(map(str, edges), ends, strict=False)]
        return present(codes, [*names, f"{edges[-1]}+"])
    column(sequences, by)
    raise AssertionError("unreachable")


def present(codes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Drop the names that no token has."""
    used, codes = np.unique(codes, return_inverse=True)
    return codes.astype(np.int64), [names[code] for code in used]


def column(sequences: pd.DataFrame, name: str) -> pd.Series:
    """A column of the sequences, or an error that lists those there are."""
    if name not in sequences.columns or sequences[name].isna().all():
        filled = [str(other) for other in sequences.columns if sequences[other].notna().any()]
        raise InputError(
            f"the sequences of this trace have no {name!r}; they have {', '.join(filled)}, and every token has "
            "'phase' and 'position'. Give the corpus a column of that name and trace it again."
        )
    return sequences[name]


def count(trace: Trace, layer: int, cells: Cells) -> np.ndarray:
    """How often the tokens of each cell chose each expert: float64 (n_cells, n_experts)."""
    n_experts = experts_of(trace, layer)
    experts = trace.experts(layer)
    n_cells = len(cells.group)
    total = np.zeros(n_cells * n_experts)
    kept = cells.of_token >= 0
    base = cells.of_token.astype(np.int64) * n_experts
    for rank in range(experts.shape[1]):
        chosen = experts[:, rank]
        used = kept & (chosen != NO_EXPERT)
        total += np.bincount(base[used] + chosen[used], minlength=len(total))
    return total.reshape(n_cells, n_experts)


def experts_of(trace: Trace, layer: int) -> int:
    """Number of experts of a layer."""
    return int(trace.layers["n_experts"].iloc[layer])


def sum_by(rows: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Sum the rows of each group: (n, n_columns) -> (n_groups, n_columns)."""
    total = np.zeros((n_groups, rows.shape[1]))
    np.add.at(total, group, rows)
    return total
