"""How many texts does a probe need? Scores on the same held-out texts after training on a part of the others.

In each fold the training texts are put in a random order, and the probe learns from the first 1/16, 1/8, … of them: the
parts are nested, and made of whole texts. A curve that still rises says that the score at the end is a lower bound on
what routing knows; one that is flat early, that little has to be learned.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes.estimators import bounded, chance, fold_interval, scores
from workbench_probes.features import Matrix, check, rows_of
from workbench_probes.probe import MAIN_SCORE, NOUNS, STYLES, names_of
from workbench_probes.task import Options, Task, matrices, prepare

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def learning_curve(
    trace: Trace,
    target: str,
    *,
    features: Sequence[str] = ("choices", "tokens"),
    layers: Sequence[int] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    model: Any = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Score probes that learn from a part of the training texts. All chosen layers are read side by side.

    features, layers, model   as in `probe`
    fractions                 parts of the training texts, above 0 and up to 1
    options                   those of `workbench_probes.task.Options`

    Returns one row a set of features × fraction × score: target, unit, features, layer (missing: all), score, fraction,
    n_train_groups and n_train (means over folds), n_test; value, low, high; chance, n_folds. InputError as `probe`.
    """
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise InputError(f"fractions are {tuple(fractions)}; expected numbers above 0 and up to 1.")
    task = prepare(trace, target, **options)
    chosen = check(trace, features, layers, task.found.unit)
    tables = [
        _rows(task, name, layer, matrix, sorted(set(fractions)))
        for name, layer, matrix in matrices(trace, task.found, features, chosen, model)
        if layer is None or len(chosen) == 1
    ]
    return pd.concat(tables, ignore_index=True)


def _rows(task: Task, name: str, layer: int | None, matrix: Matrix, fractions: Sequence[float]) -> pd.DataFrame:
    found, n_classes = task.found, task.n_classes
    tables = []
    for fraction in fractions:
        measured, n_rows, n_groups = [], [], []
        for fold, split in enumerate(task.splits):
            train, groups = part_of(split.train, task.group, fraction, (task.seed, fold))
            fit = task.fit(name, matrix, train, found.value)
            predicted = np.asarray(fit.model.predict(rows_of(matrix, split.test)))
            measured.append(scores(found.value[split.test], predicted, n_classes))
            n_rows.append(len(train))
            n_groups.append(groups)
        values = np.stack(measured)
        n_test = np.mean([len(split.test) for split in task.splits])
        n_most = np.mean([len(split.train) for split in task.splits])
        low, high = bounded(*fold_interval(values, float(n_test / n_most)), n_classes)
        facts = {
            "target": found.name, "unit": found.unit, "features": name,
            "layer": pd.array([layer] * values.shape[1], dtype="Int64"), "score": names_of(n_classes),
            "fraction": fraction, "n_train_groups": round(np.mean(n_groups)), "n_train": round(np.mean(n_rows)),
            "n_test": round(n_test), "value": values.mean(axis=0), "low": low, "high": high,
            "chance": chance(found.value, n_classes), "n_folds": len(task.splits),
        }  # fmt: skip
        tables.append(pd.DataFrame(facts))
    return pd.concat(tables, ignore_index=True)


def part_of(rows: np.ndarray, group: np.ndarray, fraction: float, seed: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The rows of a part of the texts, at least one text, and how many texts: nested for one seed.

    rows  int (n,), ascending; group int (n_all,): text of every row there is
    """
    texts = np.random.default_rng(seed).permutation(np.unique(group[rows]))
    kept = texts[: max(1, round(fraction * len(texts)))]
    return rows[np.isin(group[rows], kept)], len(kept)


def figure(frame: pd.DataFrame) -> Figure:
    """The main score by number of training texts, a line a set of features."""
    main = MAIN_SCORE[main_is_number(frame)]
    shown = frame[frame["score"] == main]
    result = figures.panels([""], height=300, legend=True)
    for name, part in shown.groupby("features", sort=False):
        figures.line(
            result, part["n_train_groups"], part["value"], part["low"], part["high"], name=str(name),
            style=figures.Style(STYLES[str(name)]), x_name="texts",
        )  # fmt: skip
    ends = [shown["n_train_groups"].min(), shown["n_train_groups"].max()]
    figures.line(result, ends, [shown["chance"].iloc[0]] * 2, name="chance", style=figures.NULL, x_name="texts")
    ticks = sorted(shown["n_train_groups"].unique().tolist())
    result.update_xaxes(
        type="log", title="texts to learn from", tickvals=ticks, ticktext=[f"{tick:,}" for tick in ticks]
    )
    result.update_yaxes(title=main.replace("_", " "))
    return result


def main_is_number(frame: pd.DataFrame) -> bool:
    """Whether numbers are predicted."""
    return "r2" in set(frame["score"])


def findings(frame: pd.DataFrame) -> list[str]:
    """What half of the texts and all of them give, in sentences."""
    main = MAIN_SCORE[main_is_number(frame)]
    sentences = []
    for name, part in frame[frame["score"] == main].groupby("features", sort=False):
        first, last = part.iloc[0], part.iloc[-1]
        sentences.append(
            f"{NOUNS[str(name)]}: {first['value']:.2f} after {first['n_train_groups']} texts, "
            f"{last['value']:.2f} [{last['low']:.2f}, {last['high']:.2f}] after {last['n_train_groups']} "
            f"({main.replace('_', ' ')}; chance {last['chance']:.2f})."
        )
    return sentences
