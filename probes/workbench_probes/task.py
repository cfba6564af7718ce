"""A question made ready: what is predicted for which rows, which texts may not be split, and which rows test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from workbench.errors import InputError, not_negative
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace
from workbench_probes import features as sources
from workbench_probes.controls import control_values, permuted
from workbench_probes.estimators import Fit, learn
from workbench_probes.features import OF_LAYERS, Matrix, rows_of
from workbench_probes.groups import Split, splits, text_groups, without_rare
from workbench_probes.targets import Target, target

SEEDS = 2**32
"""What scikit-learn takes: seeds below this."""
LEAST_STRENGTH = 1e-30
"""The inverse of anything much smaller overflows in ridge regression, where features are float32."""


class Options(TypedDict, total=False):
    """What all probes may be given by keyword; the defaults are those of `prepare`.

    unit       whether a row is a "token" or a "sequence"; None: what the target is a property of
    classes    predict numbers as so many quantile classes, 2 or more
    group      a further column of the sequences whose equal values are never parted, such as `source`
    folds      at least 2; every class has to be in as many texts
    max_rows   so many rows, drawn at random; None: all
    drop_rare  leave out classes that are in fewer texts than there are folds, instead of refusing them
    strength   C: the larger, the weaker the penalty; of several the best, chosen inside the training rows
    seed       of splits, control labels, permutations and draws
    """

    unit: str | None
    classes: int | None
    group: str | None
    folds: int
    max_rows: int | None
    drop_rare: bool
    strength: float | Sequence[float]
    seed: int


@dataclass(frozen=True)
class Task:
    """n rows to predict.

    found       target of the rows
    sequence    int64 (n,)  sequence of each row
    group       int64 (n,)  text of each row, which no split parts
    splits      one a fold
    kind        int64 (n,)  what gets one control label: token id, or text
    control_of  "token type" or "text"
    n_left_out  rows of classes that are too rare, dropped
    strengths   C of the probes, ascending; of several the best
    seed        of everything that is drawn
    """

    found: Target
    sequence: np.ndarray
    group: np.ndarray
    splits: list[Split]
    kind: np.ndarray
    control_of: str
    n_left_out: int
    strengths: tuple[float, ...]
    seed: int

    @property
    def n_classes(self) -> int:
        """0 where numbers are predicted."""
        return len(self.found.labels)

    def control(self, number: int) -> np.ndarray:
        """The labels of one of the controls, (n,)."""
        return control_values(self.found.value, self.kind, (self.seed, number))

    def permuted(self, number: int) -> np.ndarray:
        """The labels of one of the permutations, (n,)."""
        return permuted(self.found.value, self.sequence, self.group, (self.seed, number))

    def fit(self, features: str, matrix: Matrix, rows: np.ndarray, labels: np.ndarray) -> Fit:
        """A probe that learned the labels (n,) of some of the rows (places) from their features (n, n_columns)."""
        x = rows_of(matrix, rows)
        return learn(features, self.found.unit, x, labels[rows], self.group[rows], self.strengths)


def check_seed(seed: int) -> None:
    """InputError for a seed below 0, or too large."""
    not_negative(seed=seed)
    if seed >= SEEDS:
        raise InputError(f"seed is {seed:,}; expected less than {SEEDS:,}.")


def prepare(
    trace: Trace,
    name: str,
    *,
    unit: str | None = None,
    classes: int | None = None,
    group: str | None = None,
    folds: int = 5,
    max_rows: int | None = 20_000,
    drop_rare: bool = False,
    strength: float | Sequence[float] = 1.0,
    seed: int = 0,
) -> Task:
    """Find the target, draw at most `max_rows` of its rows at random, and split them; see `Options`.

    InputError for what the trace doesn't have, one class only, and fewer texts than folds (of a class, too).
    """
    check_seed(seed)
    strengths = tuple(sorted({*(strength if isinstance(strength, Sequence) else [strength])}))
    if not strengths or not all(np.isfinite(one) and one >= LEAST_STRENGTH for one in strengths):
        raise InputError(f"strength is {strength}; expected a number above 0 (from 1e-30 on), such as 1, or several.")
    if max_rows is not None and max_rows < 2:
        raise InputError(f"max_rows is {max_rows}; expected at least 2, or None for all.")
    if trace.counted:
        raise trace.only_counts("rows of single tokens to probe")
    found = target(trace, name, unit=unit, classes=classes)
    if max_rows is not None and len(found.row) > max_rows:
        drawn = np.random.default_rng(seed).choice(len(found.row), max_rows, replace=False)
        found = found.only(np.sort(drawn))
    owner = trace.sequence_index()
    text = text_groups(trace, group)
    by_token = found.unit == "token"
    sequence = owner[found.row] if by_token else found.row
    n_rows = len(found.row)
    texts = text[sequence]
    if drop_rare:
        kept = without_rare(found, texts, folds)
        if not kept.any():
            raise InputError(f"every class of {name!r} is in fewer than {folds} texts; ask for fewer folds.")
        found, sequence, texts = found.only(kept), sequence[kept], texts[kept]
        if len(found.labels) == 1 and not kept.all():
            raise InputError(
                f"{name!r} is {found.labels[0]!r} everywhere once rare classes are left out; a probe needs two classes "
                "to tell apart. Ask for fewer folds."
            )
    kind, control_of = texts, "text"
    if by_token:
        token_id = trace.tokens()["token_id"].to_numpy()[found.row]
        if (token_id != UNKNOWN_TOKEN).all():
            kind, control_of = token_id.astype(np.int64), "token type"
    parts = splits(found, texts, folds, seed)
    return Task(found, sequence, texts, parts, kind, control_of, n_rows - len(found.row), strengths, seed)


def matrices(
    trace: Trace, found: Target, names: Sequence[str], layers: Sequence[int] | None = None, model: Any = None
) -> Iterator[tuple[str, int | None, Matrix]]:
    """Name, layer and matrix (n, …) of each set of features: a layer at a time, then (None) all of them side by side.

    found  whose rows and unit; model  of hidden states: a Model, a name, or None for the name in the trace

    `tokens` are of no layer. Hidden states of all layers are in memory together: n rows × layers × hidden size float32,
    and as much again side by side.
    """
    chosen = sources.check(trace, names, layers, found.unit)
    for name in dict.fromkeys(names):
        if name not in OF_LAYERS:
            yield name, None, sources.of_tokens(trace, found.row, found.unit)
            continue
        read = {}
        if name == "hidden":
            from workbench_probes.hidden import hidden_states  # torch, which nothing else here takes

            read = hidden_states(trace, found.row, found.unit, chosen, model=model)
        parts = []
        for layer in chosen:
            given = read.get(layer)
            parts.append(sources.of_layer(trace, name, layer, found.row, found.unit) if given is None else given)
            yield name, layer, parts[-1]
        if len(chosen) > 1:
            yield name, None, sources.beside(parts)
