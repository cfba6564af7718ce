"""Which rows may not be on both sides of a split, and the splits that keep them together.

Rows of one **text** stay together: the sequences that share a `segment_id` (translations and pieces of one text), a
`sha256` (the same text twice, and pieces of one row), or the value of a further column, and whatever these links
connect. Where a sequence has no `sha256`, as in a trace from arrays, equal token ids link as well. A translation that
is word for word the same as that of another segment joins the two.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from workbench.analysis.counting import as_label, column
from workbench.errors import InputError
from workbench.schema import UNKNOWN_TOKEN
from workbench.tracefile import Trace
from workbench_probes.targets import Target


@dataclass(frozen=True)
class Split:
    """Rows of a fold: int64 places, ascending. No text is in both."""

    train: np.ndarray
    test: np.ndarray


def text_groups(trace: Trace, group: str | None = None) -> np.ndarray:
    """Number of the text that each sequence belongs to: int64 (n_sequences,), without gaps.

    group  a column of the sequences whose equal values stay together too, such as `source`
    """
    sequences = trace.sequences()
    keys = ["segment_id", "sha256"]
    if group is not None:
        column(sequences, group)  # or an error that lists those there are
        keys.append(group)
    links = [sequences[key].map(as_label) for key in keys if key in sequences]
    return linked([*links, _token_keys(trace)] if sequences["sha256"].isna().any() else links)


def _token_keys(trace: Trace) -> pd.Series:
    """A key that sequences of equal token ids share; None for a sequence without tokens, or with an unknown one."""
    lengths = np.bincount(trace.sequence_index(), minlength=trace.n_sequences)
    parts = np.split(trace.tokens()["token_id"].to_numpy(), np.cumsum(lengths)[:-1])
    keys = [part.tobytes() if len(part) and (part != UNKNOWN_TOKEN).all() else None for part in parts]
    return pd.Series(keys, dtype=object)


def linked(keys: list[pd.Series]) -> np.ndarray:
    """Number of the component of each row, where rows with an equal key (of the same series) are linked.

    A missing key links nothing. int64 (n,), numbered from 0 in order of first appearance.
    """
    n = len(keys[0]) if keys else 0
    if n == 0:
        return np.empty(0, np.int64)
    rows, nodes, first = [], [], n
    for key in keys:
        codes, values = pd.factorize(key)
        known = np.flatnonzero(codes >= 0)
        rows.append(known)
        nodes.append(first + codes[known])
        first += len(values)
    row, node = np.concatenate(rows), np.concatenate(nodes)
    edges = sparse.coo_array((np.ones(len(row), np.int8), (row, node)), shape=(first, first))
    component = connected_components(edges, directed=False)[1][:n]
    return pd.factorize(component)[0].astype(np.int64)


def splits(found: Target, group: np.ndarray, folds: int, seed: int = 0) -> list[Split]:
    """Folds whose training and test rows share no text; classes as even over the folds as the texts allow.

    group  int (n,): the text of each row of the target

    StratifiedGroupKFold of scikit-learn for classes (texts in a random order), GroupKFold for numbers. InputError if
    there is one class only, fewer texts than folds, a class that is in fewer texts than there are folds (it would be
    missing from a test), or a number that is the same in all rows of a test (it has no R²).
    """
    if folds < 2:
        raise InputError(f"folds is {folds}; expected at least 2: one to learn from and one to test on.")
    n_groups = len(np.unique(group))
    if n_groups < folds:
        raise InputError(
            f"{found.name!r} is known for {n_groups} {'text' if n_groups == 1 else 'texts'} (translations and pieces "
            f"count as one), too few for {folds} folds; trace more texts, or ask for fewer folds."
        )
    nothing = np.zeros((len(group), 1))
    if found.numeric:
        if np.ptp(found.value) == 0:
            raise InputError(f"{found.name!r} is {found.value[0]:g} everywhere; there is nothing to predict.")
        pairs = GroupKFold(folds).split(nothing, groups=group)
    else:
        _need_classes(found, group, folds)
        method = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        pairs = method.split(nothing, found.value, group)
    result = [Split(np.sort(train), np.sort(test)) for train, test in pairs]
    for split in result:
        if found.numeric:
            if np.ptp(found.value[split.test]) == 0:
                raise InputError(
                    f"{found.name!r} doesn't vary in a test of {len(split.test)} "
                    f"{'row' if len(split.test) == 1 else 'rows'}, so nothing can be scored there; ask for fewer folds."
                )
            continue
        missing = set(range(len(found.labels))) - set(found.value[split.train].tolist())
        if missing or not len(split.test):
            name = found.labels[missing.pop()] if missing else "everything"
            raise InputError(
                f"{name!r} is in a test but not in its training texts: its texts are too large. Ask for other folds."
            )
    return result


def texts_of_classes(found: Target, group: np.ndarray) -> np.ndarray:
    """In how many texts each class occurs: int64 (n_classes,)."""
    pairs = np.unique(np.stack([found.value, group]), axis=1)
    return np.bincount(pairs[0], minlength=len(found.labels))


def _need_classes(found: Target, group: np.ndarray, folds: int) -> None:
    if len(found.labels) < 2:
        raise InputError(f"{found.name!r} is {found.labels[0]!r} everywhere; a probe needs two classes to tell apart.")
    n_texts = texts_of_classes(found, group)
    rare = np.flatnonzero(n_texts < folds)
    if len(rare):
        listed = ", ".join(f"{found.labels[at]!r} ({n_texts[at]})" for at in rare[:8])
        more = f" and {len(rare) - 8} more" if len(rare) > 8 else ""
        raise InputError(
            f"classes of {found.name!r} that are in fewer than {folds} texts: {listed}{more}. Ask for fewer folds, or "
            "leave such classes out (drop_rare, --drop-rare)."
        )


def without_rare(found: Target, group: np.ndarray, folds: int) -> np.ndarray:
    """bool (n,): rows whose class is in at least `folds` texts."""
    if found.numeric:
        return np.ones(len(found.row), bool)
    return (texts_of_classes(found, group) >= folds)[found.value]
