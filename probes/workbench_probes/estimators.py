"""The probes themselves: linear models of scikit-learn, their scores on held-out texts, and intervals over folds.

Classes: multinomial logistic regression with an L2 penalty (strength C) and balanced class weights, so that a rare
class counts as much as a common one. Numbers: ridge regression. Features that are 0 or 1 stay as they are; all others
are divided by their standard deviation in the training rows (never centred, which would make sparse matrices dense;
hidden states, which are dense, are centred).

Of several strengths, that with the best balanced accuracy (of numbers R²) in a cross-validation **inside the training
rows** is taken, and the probe then learns from all of them (nested cross-validation, Varma & Simon 2006). Texts are
kept whole there, too.

Of classes: **accuracy**; **balanced_accuracy**, the mean recall of the classes; **macro_f1**, the mean F1 of the
classes, both over the classes that occur in the test rows. Of numbers: **r2** = 1 − Σ(y − ŷ)² / Σ(y − ȳ)²;
**correlation**, Pearson's, 0 for a constant prediction.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, StandardScaler

from workbench.analysis.resampling import LEVEL
from workbench_probes.features import Matrix

OF_CLASSES = ("accuracy", "balanced_accuracy", "macro_f1")
OF_NUMBERS = ("r2", "correlation")
ITERATIONS = 200
TOLERANCE = 1e-3
INNER_FOLDS = 3
"""Of the cross-validation that chooses a strength."""


class Fit(NamedTuple):
    """A probe that has learned; `strength` is the one it was given, or that was chosen."""

    model: Any
    strength: float
    converged: bool


def pipeline(features: str, unit: str, numeric: bool, strength: float) -> Pipeline:
    """Scaling and a linear model. strength: C of the logistic regression, 1/alpha of the ridge regression."""
    if features == "hidden":
        scaling: Any = StandardScaler()
    elif unit == "token" and features in ("choices", "tokens"):
        scaling = FunctionTransformer()  # 0 or 1 already
    elif features == "tokens":
        scaling = MaxAbsScaler()  # a standard deviation would blow the rarest ids up
    else:
        scaling = StandardScaler(with_mean=False)
    if numeric:
        return make_pipeline(scaling, Ridge(alpha=1 / strength))
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=ITERATIONS, tol=TOLERANCE)
    return make_pipeline(scaling, model)


def learn(features: str, unit: str, x: Matrix, y: np.ndarray, text: np.ndarray, strengths: Sequence[float]) -> Fit:
    """A probe that has learned from all rows given: x (n, n_columns), y (n,), int64 classes or float64 numbers.

    text       int (n,): text of each row, which the choice between several strengths doesn't part
    strengths  ascending; the first where the rows are too few to choose by

    Of a single class: that class, always.
    """
    numeric = y.dtype.kind == "f"
    if not numeric and (y == y[0]).all():
        return Fit(DummyClassifier(strategy="most_frequent").fit(np.zeros((len(y), 1)), y), strengths[0], True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strength = best_strength(features, unit, x, y, text, strengths)
        model = pipeline(features, unit, numeric, strength).fit(x, y)
    return Fit(model, strength, not any(issubclass(one.category, ConvergenceWarning) for one in caught))


def best_strength(
    features: str, unit: str, x: Matrix, y: np.ndarray, text: np.ndarray, strengths: Sequence[float]
) -> float:
    """The strength that predicts texts best that it didn't learn from, among these rows; arguments as in `learn`.

    Of equals the smallest. The first of all where not even two texts (of two classes) can be parted.
    """
    numeric = y.dtype.kind == "f"
    of_class = [len(np.unique(text))] * 2 if numeric else [len(np.unique(text[y == one])) for one in np.unique(y)]
    folds = min(INNER_FOLDS, sorted(of_class)[-2])
    if len(strengths) == 1 or folds < 2:
        return strengths[0]
    if numeric:
        grid, method, score = {"ridge__alpha": [1 / one for one in strengths]}, GroupKFold(folds), "r2"
    else:
        grid, score = {"logisticregression__C": list(strengths)}, "balanced_accuracy"
        method = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    search = GridSearchCV(pipeline(features, unit, numeric, strengths[0]), grid, scoring=score, cv=method, refit=False)
    return strengths[int(search.fit(x, y, groups=text).best_index_)]


def scores(true: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """float64 (3,): OF_CLASSES of codes in 0..n_classes-1; or, with n_classes 0, (2,): OF_NUMBERS,
    NaN where all true numbers are equal."""
    if n_classes == 0:
        spread = np.sum((true - true.mean()) ** 2) if np.ptp(true) > 0 else 0.0  # not what rounding makes of it
        r2 = 1 - np.sum((true - predicted) ** 2) / spread if spread > 0 else np.nan
        constant = np.ptp(predicted) == 0
        correlation = np.nan if spread == 0 else 0.0 if constant else np.corrcoef(true, predicted)[0, 1]
        return np.array([r2, correlation])
    table = np.bincount(true * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    right, of_true, of_predicted = np.diag(table), table.sum(axis=1), table.sum(axis=0)
    there = of_true > 0
    f1 = 2 * right[there] / (of_true + of_predicted)[there]
    return np.array([right.sum() / len(true), (right[there] / of_true[there]).mean(), f1.mean()])


def chance(value: np.ndarray, n_classes: int) -> np.ndarray:
    """What guessing every class equally often scores, in expectation and for many rows, in the order of `scores`.

    1/C for accuracy and balanced accuracy; for macro F1 the mean over classes of 2·p/(C·p + 1), p the class's share.
    0 where numbers are predicted.
    """
    if n_classes == 0:
        return np.zeros(len(OF_NUMBERS))
    share = np.bincount(value, minlength=n_classes) / len(value)
    return np.array([1 / n_classes, 1 / n_classes, (2 * share / (n_classes * share + 1)).mean()])


def baseline(train: np.ndarray, test: np.ndarray, n_classes: int) -> np.ndarray:
    """What always saying the training rows' commonest class (or their mean) scores on the test rows."""
    constant = train.mean() if n_classes == 0 else np.bincount(train).argmax()
    return scores(test, np.full(len(test), constant), n_classes)


def fold_interval(values: np.ndarray, test_per_train: float) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of the mean over folds: values (n_folds, …) -> low, high.

    Student's t with n_folds − 1 degrees of freedom and the variance s²·(1/n_folds + n_test/n_train): training sets of
    different folds share most of their rows, which the naive s²/n_folds ignores (Nadeau & Bengio 2003, section 3).
    """
    n = len(values)
    spread = np.sqrt(values.var(axis=0, ddof=1) * (1 / n + test_per_train))
    reach = stats.t.ppf((1 + LEVEL) / 2, n - 1) * spread
    return values.mean(axis=0) - reach, values.mean(axis=0) + reach


def bounded(low: np.ndarray, high: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """An interval of scores without what no score can be: over 1; under 0 of classes, under −1 of correlations."""
    least = np.array([0.0, 0.0, 0.0] if n_classes else [-np.inf, -1.0])
    return np.maximum(low, least), np.minimum(high, 1.0)
