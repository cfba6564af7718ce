"""A question made ready: what is predicted for which rows, which texts may not be split, and which rows test."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.errors import InputError, not_negative
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace
from workbench_probes import features as sources
from workbench_probes.controls import control_values
from workbench_probes.features import OF_LAYERS, Matrix
from workbench_probes.groups import Split, splits, text_groups, without_rare
from workbench_probes.targets import Target, target


@dataclass(frozen=True)
class Task:
    """n rows to predict.

    found       target of the rows
    group       int64 (n,)  text of each row, which no split parts
    splits      one a fold
    kind        int64 (n,)  what gets one control label: token id, or text
    control_of  "token type" or "text"
    n_left_out  rows of classes that are too rare, dropped
    seed        of everything that is drawn
    """

    found: Target
    group: np.ndarray
    splits: list[Split]
    kind: np.ndarray
    control_of: str
    n_left_out: int
    seed: int

    @property
    def n_classes(self) -> int:
        """0 where numbers are predicted."""
        return len(self.found.labels)

    def control(self, number: int) -> np.ndarray:
        """The labels of one of the controls, (n,)."""
        return control_values(self.found.value, self.kind, (self.seed, number))


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
    seed: int = 0,
) -> Task:
    """Find the target, draw at most `max_rows` of its rows at random, and split them; arguments as in `probe`."""
    not_negative(seed=seed)
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
    texts = text[owner[found.row]] if by_token else text[found.row]
    n_rows = len(found.row)
    if drop_rare:
        kept = without_rare(found, texts, folds)
        if not kept.any():
            raise InputError(f"every class of {name!r} is in fewer than {folds} texts; ask for fewer folds.")
        found, texts = found.only(kept), texts[kept]
    kind, control_of = texts, "text"
    if by_token:
        token_id = trace.tokens()["token_id"].to_numpy()[found.row]
        if (token_id != UNKNOWN_TOKEN).all():
            kind, control_of = token_id.astype(np.int64), "token type"
    return Task(found, texts, splits(found, texts, folds, seed), kind, control_of, n_rows - len(found.row), seed)


def matrices(
    trace: Trace, found: Target, names: Sequence[str], layers: Sequence[int] | None = None, model: Any = None
) -> Iterator[tuple[str, int | None, Matrix]]:
    """Name, layer and matrix (n, …) of each set of features: a layer at a time, then (None) all of them side by side.

    found  whose rows and unit; model  of hidden states: a Model, a name, or None for the name in the trace

    `tokens` are of no layer. Hidden states come by layer only: side by side they would fill the memory.
    """
    chosen = sources.check(trace, names, layers, found.unit)
    for name in dict.fromkeys(names):
        if name not in OF_LAYERS:
            yield name, None, sources.of_tokens(trace, found.row, found.unit)
        elif name == "hidden":
            from workbench_probes.hidden import hidden_states  # torch, which nothing else here takes

            read = hidden_states(trace, found.row, found.unit, chosen, model=model)
            for layer in chosen:
                yield name, layer, read.pop(layer)
        else:
            parts = []
            for layer in chosen:
                parts.append(sources.of_layer(trace, name, layer, found.row, found.unit))
                yield name, layer, parts[-1]
            if len(chosen) > 1:
                yield name, None, sources.beside(parts)
