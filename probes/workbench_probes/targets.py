"""What a probe predicts: a class or a number for each token, or for each sequence.

- a **column of the sequences** (`lang`, `domain`, `source`, any metadata); its value belongs to every token of the text
- `token_class`: the kinds of `workbench.token_classes`, from the token's own text, and `keyword`: a reserved word of
  the language of a text whose domain is `code-<language>`. A trace doesn't mark special tokens, so `<s>` counts as what
  its text looks like, mostly a word part
- `position`: the buckets of `workbench.analysis.counting.POSITIONS`; `phase`
- `loss`: nats that the model loses on the **next** token, which the router couldn't see; of a sequence their mean

Classes are predicted by name. Losses, and columns of more than `MOST_VALUES` different numbers, are predicted as
numbers, unless they are cut into quantile classes.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.analysis.counting import as_label, column, no_column, present, token_labels
from workbench.errors import InputError
from workbench.spelling import BYTE_NAME
from workbench.token_classes import CLASSES, token_class
from workbench.tracefile import Trace
from workbench_probes.keywords import is_keyword

UNITS = ("token", "sequence")
OF_TOKENS = ("token_class", "position", "phase")
"""Targets that only a token has."""
LOSS = "loss"
MOST_VALUES = 20
"""A numeric column with more different values than this is predicted as a number."""
KEYWORD = "keyword"


@dataclass(frozen=True)
class Target:
    """What is predicted, for n tokens or n sequences (rows).

    name     as asked for
    unit     "token" or "sequence"
    row      int64 (n,)   places among the trace's tokens (or sequences), ascending: those whose value is known
    value    int64 (n,)   places in `labels`, or float64 (n,) where numbers are predicted
    labels   the classes, every one of which occurs; empty where numbers are predicted
    """

    name: str
    unit: str
    row: np.ndarray
    value: np.ndarray
    labels: list[str]

    @property
    def numeric(self) -> bool:
        return not self.labels

    def only(self, kept: np.ndarray) -> "Target":
        """The same target for some rows: bool (n,) or places. Classes that no row has any more are left out."""
        value = self.value[kept]
        if self.numeric:
            return Target(self.name, self.unit, self.row[kept], value, [])
        value, labels = present(value, self.labels)
        return Target(self.name, self.unit, self.row[kept], value, labels)


def target(trace: Trace, name: str, *, unit: str | None = None, classes: int | None = None) -> Target:
    """Find what is to be predicted.

    unit     "token" or "sequence"; None: tokens for what only tokens have and for the loss, else sequences
    classes  cut numbers into so many classes of about equal size, at their quantiles

    InputError for a name that the trace doesn't have, a unit that the target hasn't, and where nothing is known.
    """
    sequences = trace.sequences()
    name = "token_class" if name == "token class" and name not in sequences.columns else name
    of_tokens = name in OF_TOKENS and name not in sequences.columns
    if unit is None:
        unit = "token" if of_tokens or (name == LOSS and name not in sequences.columns) else "sequence"
    if unit not in UNITS:
        raise InputError(f"unit is {unit!r}; expected one of {', '.join(UNITS)}.")
    if of_tokens and unit == "sequence":
        raise InputError(f"{name!r} is a property of tokens; probe it with unit token.")
    if classes is not None and classes < 2:
        raise InputError(f"classes is {classes}; expected at least 2 to tell apart.")
    value, labels = _values(trace, sequences, name, unit)
    known = value >= 0 if labels else np.isfinite(value)
    if not known.any():
        raise InputError(f"no {unit} of this trace has a known {name!r}; choose another target.")
    found = Target(name, unit, np.flatnonzero(known), value[known], labels)
    if classes is None:
        return found.only(np.ones(len(found.row), bool))
    if labels:
        raise InputError(f"{name!r} has classes already; leave out classes={classes}, which cuts numbers.")
    return quantile_classes(found, classes)


def _values(trace: Trace, sequences: pd.DataFrame, name: str, unit: str) -> tuple[np.ndarray, list[str]]:
    """Value of each token or sequence: codes with -1 for unknown and the labels, or numbers with NaN and no labels."""
    if name in sequences.columns:
        owner = trace.sequence_index() if unit == "token" else np.arange(len(sequences))
        known = column(sequences, name)
        number = pd.api.types.is_numeric_dtype(known) and not pd.api.types.is_bool_dtype(known)
        if number and known.nunique() > MOST_VALUES:
            return known.to_numpy(float, na_value=np.nan)[owner], []
        return token_labels(trace, sequences, owner, name)
    if name == LOSS:
        return next_loss(trace) if unit == "token" else _mean_loss(trace), []
    if name == "token_class":
        return _token_classes(trace, sequences)
    if name in OF_TOKENS:
        return token_labels(trace, sequences, trace.sequence_index(), name)
    raise InputError(f"{no_column(sequences, name)} Beside them, token_class and loss can be predicted.")


def next_loss(trace: Trace) -> np.ndarray:
    """float64 (n_tokens,): nats lost on the token after each; NaN for the last of a sequence, and where unknown."""
    nll = trace.tokens()["nll"].to_numpy(float, na_value=np.nan)
    owner = trace.sequence_index()
    following = np.append(nll[1:], np.nan)
    following[:-1][owner[1:] != owner[:-1]] = np.nan
    return following


def _mean_loss(trace: Trace) -> np.ndarray:
    loss, owner = next_loss(trace), trace.sequence_index()
    known = np.isfinite(loss)
    total = np.bincount(owner[known], loss[known], trace.n_sequences)
    number = np.bincount(owner[known], minlength=trace.n_sequences)
    return np.divide(total, number, out=np.full(trace.n_sequences, np.nan), where=number > 0)


def _token_classes(trace: Trace, sequences: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    vocabulary = trace.vocabulary()
    ids = vocabulary["token_id"].to_numpy()
    texts = [text if isinstance(text, str) else "" for text in vocabulary["text"]]
    if not len(ids):
        raise InputError("this trace has no vocabulary, so the classes of its tokens are not known.")
    names = [*CLASSES, KEYWORD]
    of_id = np.array([CLASSES.index("byte" if BYTE_NAME.fullmatch(text) else token_class(text)) for text in texts])
    token_id = trace.tokens()["token_id"].to_numpy()
    place = np.searchsorted(ids, token_id).clip(max=len(ids) - 1)
    code = np.where(ids[place] == token_id, of_id[place], -1)
    owner = trace.sequence_index()
    for domain in sequences["domain"].map(as_label).dropna().unique():
        reserved = np.array([is_keyword(text, domain) for text in texts])
        if reserved.any():
            here = (sequences["domain"] == domain).to_numpy(bool)[owner]
            code[here & (code >= 0) & reserved[place]] = names.index(KEYWORD)
    return code, names


def quantile_classes(found: Target, classes: int) -> Target:
    """Numbers as classes of about equal size. Ties stay together.

    A class's name is its range, in 4 digits, or in as many as it takes to tell the ranges apart.

    InputError where so many values are equal that fewer classes than asked for are left.
    """
    edges = np.quantile(found.value, np.linspace(0, 1, classes + 1)[1:-1])
    code = np.searchsorted(edges, found.value, side="left")
    if len(np.unique(code)) < classes:
        raise InputError(f"{found.name!r} has too many equal values for {classes} classes; ask for fewer.")
    written = ([f"{edge:.{digits}g}" for edge in edges] for digits in range(4, 18))
    ends = next(ends for ends in written if len(set(ends)) == len(ends))
    labels = [f"≤ {ends[0]}", *(f"{low}–{high}" for low, high in zip(ends, ends[1:], strict=False)), f"> {ends[-1]}"]
    return Target(found.name, found.unit, found.row, code.astype(np.int64), labels)
