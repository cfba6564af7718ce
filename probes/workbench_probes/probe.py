"""What does routing know? A linear probe predicts a label from routing, on texts that it wasn't trained on.

Every set of features (see `workbench_probes.features`) gets a probe a layer, and one of all layers together:

- **value**: mean over folds of the score on held-out texts; translations and pieces of one text, and equal texts, are
  never on both sides (`workbench_probes.groups`). **low**, **high**: 95% interval over folds, Student's t with the
  variance corrected for overlapping training sets (Nadeau & Bengio 2003).
- **chance**: what guessing all classes equally often scores; **majority**: what always saying the commonest does (of
  numbers: their mean).
- **control**: mean score of the same probe on control labels, a random one for each token type, or for each text where
  a row is a sequence (Hewitt & Liang 2019). **selectivity** = value − control, its interval as above.
- **p**: how often labels that change places between and within texts (`workbench_probes.controls.permuted`) score as
  well: (1 + as good or better) / (1 + permutations) (Ojala & Garriga 2010, test 1). One p a row, not corrected for the
  number of rows.

Compare `choices` with `tokens`: what the token's id alone tells is no knowledge of the router's. Compare it with
`hidden`: what the router could have read and didn't pass on. Scores and models are defined in
`workbench_probes.estimators`, targets in `workbench_probes.targets`.

Sources: Alain & Bengio 2017 (linear probes of layers); Hewitt & Liang 2019 (control tasks and selectivity).
"""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from workbench import figures
from workbench.analysis.parallel import average
from workbench.errors import not_negative
from workbench.tracefile import Trace
from workbench_probes.estimators import (
    OF_CLASSES,
    OF_NUMBERS,
    baseline,
    bounded,
    chance,
    fold_interval,
    scores,
)
from workbench_probes.features import Matrix, check, rows_of, shape_of
from workbench_probes.task import Options, Task, matrices, prepare

MAIN_SCORE = {True: "r2", False: "balanced_accuracy"}
"""What figures show: whether numbers are predicted -> the score."""
ROUNDING = 1e-12
"""Scores that are nearer to each other are the same."""


def probe(
    trace: Trace,
    target: str,
    *,
    features: Sequence[str] = ("choices", "tokens"),
    layers: Sequence[int] | None = None,
    controls: int = 1,
    permutations: int = 0,
    model: Any = None,
    **options: Unpack[Options],
) -> pd.DataFrame:
    """Score linear probes of routing.

    target        a column of the sequences, token_class, position, phase or loss: see `workbench_probes.targets`
    features      of `workbench_probes.features.FEATURES`
    layers        None: all
    controls      control labellings drawn, 0 or more
    permutations  of the labels, for p, 0 or more; each costs as much as the probe itself
    model         of `hidden`: what was traced (a Model or a name); None: the name in the trace
    options       unit, classes, group, folds, max_rows, drop_rare, strength, seed: see `workbench_probes.task.Options`

    Returns one row a set of features × layer × score: target, unit, features, layer (missing: all layers together, and
    for tokens), score; value, low, high; chance, majority; control, selectivity, selectivity_low, selectivity_high (NaN
    without controls, and where in some fold no control has a score); p (NaN without permutations); control_of; strength
    (median over folds); n_columns, n_classes (0 for numbers), n_rows, n_train and n_test (mean over folds), n_groups
    (texts), n_folds, n_controls, n_permutations, n_left_out (rows of rare classes), n_unconverged fits (of the labels
    and the controls).

    InputError for what the trace doesn't have, one class only, and fewer texts than folds (of a class, too).
    """
    not_negative(controls=controls, permutations=permutations)
    task = prepare(trace, target, **options)
    check(trace, features, layers, task.found.unit)
    tables = [
        _rows(task, name, layer, matrix, controls, permutations)
        for name, layer, matrix in matrices(trace, task.found, features, layers, model)
    ]
    return pd.concat(tables, ignore_index=True)


def _rows(task: Task, name: str, layer: int | None, matrix: Matrix, controls: int, permutations: int) -> pd.DataFrame:
    """The rows of one set of features."""
    labellings = [task.found.value, *map(task.control, range(controls)), *map(task.permuted, range(permutations))]
    measured = np.full((len(task.splits), len(labellings), len(names_of(task.n_classes))), np.nan)
    strengths, unconverged = [], 0
    for fold, split in enumerate(task.splits):
        test = rows_of(matrix, split.test)
        for place, labels in enumerate(labellings):
            fit = task.fit(name, matrix, split.train, labels)
            measured[fold, place] = scores(labels[split.test], np.asarray(fit.model.predict(test)), task.n_classes)
            unconverged += place <= controls and not fit.converged
            strengths += [fit.strength] if place == 0 else []
    permuted = measured[:, 1 + controls :].mean(axis=0)  # (n_permutations, n_scores)
    value = measured[:, 0].mean(axis=0)
    as_good = (~(permuted < value - ROUNDING)).sum(axis=0)  # one without a score (NaN) counts, too
    p = np.where(np.isnan(value) | (permutations == 0), np.nan, (1 + as_good) / (1 + permutations))
    table = _table(task, name, layer, shape_of(matrix)[1], measured[:, : 1 + controls])
    table.insert(list(table.columns).index("control_of"), "p", p)
    return table.assign(strength=float(np.median(strengths)), n_permutations=permutations, n_unconverged=unconverged)


def names_of(n_classes: int) -> tuple[str, ...]:
    """The scores of classes, or of numbers (n_classes 0)."""
    return OF_CLASSES if n_classes else OF_NUMBERS


def _table(task: Task, name: str, layer: int | None, n_columns: int, measured: np.ndarray) -> pd.DataFrame:
    """measured (n_folds, 1 + n_controls, n_scores): the real labels first."""
    found, n_classes = task.found, task.n_classes
    value = found.value
    n_train = float(np.mean([len(split.train) for split in task.splits]))
    n_test = float(np.mean([len(split.test) for split in task.splits]))
    low, high = bounded(*fold_interval(measured[:, 0], n_test / n_train), n_classes)
    control = average(np.swapaxes(measured[:, 1:], 0, 1))  # of those that have a score: one may be constant in a test
    apart = measured[:, 0] - control
    apart_low, apart_high = fold_interval(apart, n_test / n_train)
    majority = np.mean([baseline(value[one.train], value[one.test], n_classes) for one in task.splits], axis=0)
    return pd.DataFrame(
        {
            "target": found.name,
            "unit": found.unit,
            "features": name,
            "layer": pd.array([layer] * measured.shape[2], dtype="Int64"),
            "score": names_of(n_classes),
            "value": measured[:, 0].mean(axis=0),
            "low": low,
            "high": high,
            "chance": chance(value, n_classes),
            "majority": majority,
            "control": control.mean(axis=0),
            "selectivity": apart.mean(axis=0),
            "selectivity_low": apart_low,
            "selectivity_high": apart_high,
            "control_of": task.control_of,
            "n_columns": n_columns,
            "n_classes": n_classes,
            "n_rows": len(value),
            "n_train": round(n_train),
            "n_test": round(n_test),
            "n_groups": len(np.unique(task.group)),
            "n_folds": len(task.splits),
            "n_controls": measured.shape[1] - 1,
            "n_left_out": task.n_left_out,
        }
    )


NOUNS = {
    "choices": "Choices", "weights": "Weights", "probabilities": "Probabilities", "tokens": "Token ids",
    "hidden": "Hidden states",
}  # fmt: skip
"""What a sentence calls a set of features."""
STYLES: dict[str, str] = dict(
    zip(("choices", "weights", "probabilities", "hidden", "tokens"), figures.COLOURS, strict=False)
)
"""Colour of each set of features."""


def figure(frame: pd.DataFrame) -> Figure:
    """The main score by layer, a line a set of features; what is of no layer (all of them, tokens) as a level line."""
    main = MAIN_SCORE[bool((frame["n_classes"] == 0).all())]
    shown = frame[frame["score"] == main]
    layers = sorted(shown["layer"].dropna().astype(int)) or [0, 1]
    ends = [layers[0], layers[-1]]
    result = figures.panels([""], height=340, legend=True)
    for name, part in shown.groupby("features", sort=False):
        colour = STYLES[str(name)]
        single, whole = part[part["layer"].notna()], part[part["layer"].isna()]
        for rows, said, dash in ((single, str(name), "solid"), (whole, whole_name(str(name)), "dash")):
            if rows.empty:
                continue
            level = rows if dash == "solid" else pd.concat([rows, rows])
            x = rows["layer"].astype(int) if dash == "solid" else ends
            figures.line(
                result, x, level["value"], level["low"], level["high"], name=said, style=figures.Style(colour, dash),
                band=dash == "solid",
            )  # fmt: skip
        if single["control"].notna().any():
            said, style = f"{name}, control labels", figures.Style(colour, "dot", 1.5)
            figures.line(result, single["layer"].astype(int), single["control"], name=said, style=style)
    level = [shown["chance"].iloc[0]] * 2
    figures.line(result, ends, level, name="chance", style=figures.NULL, fill=True)
    figures.layer_axes(result, layers)
    noun = figures.plain(figures.noun(frame["target"].iloc[0]))
    result.update_yaxes(title=f"{main.replace('_', ' ')} of {noun}")
    return result


def whole_name(name: str) -> str:
    """What features of no layer are called in a figure."""
    return name if name == "tokens" else f"{name}, all layers"


def findings(frame: pd.DataFrame) -> list[str]:
    """The best layer, all layers together and the tokens' identity, in sentences."""
    main = MAIN_SCORE[bool((frame["n_classes"] == 0).all())]
    shown = frame[frame["score"] == main]
    noun = figures.noun(frame["target"].iloc[0])
    measure = main.replace("_", " ")
    sentences = []
    for name, part in shown.groupby("features", sort=False):
        top = part.iloc[int(part["value"].argmax())]
        where = "" if name == "tokens" else " of all layers" if pd.isna(top["layer"]) else f" of layer {top['layer']}"
        sentence = (
            f"{NOUNS[str(name)]}{where} tell the {noun} of a {top['unit']} with a {measure} of "
            f"{top['value']:.2f} [{top['low']:.2f}, {top['high']:.2f}]; chance is {top['chance']:.2f}"
        )
        control = "" if pd.isna(top["control"]) else f", random labels of each {top['control_of']} {top['control']:.2f}"
        p = "" if pd.isna(top["p"]) else f" (p = {top['p']:.2g} of {top['n_permutations']} permutations)"
        sentences.append(f"{sentence}{control}{p}.")
    return sentences
