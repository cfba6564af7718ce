"""Splits: no text is ever on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from routed import full_trace

from workbench.arrays import from_arrays
from workbench.errors import InputError
from workbench_probes.groups import linked, splits, text_groups, without_rare
from workbench_probes.targets import Target


def of(value: np.ndarray, labels: list[str]) -> Target:
    return Target("lang", "sequence", np.arange(len(value)), value, labels)


keys = st.lists(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=7, max_size=7), min_size=1, max_size=3)


@given(keys)
@settings(deadline=None)
def test_linked_is_the_transitive_closure(found: list[list[str | None]]):
    n = len(found[0])
    near = np.eye(n, dtype=bool)
    for key in found:
        for i in range(n):
            for j in range(n):
                near[i, j] |= key[i] is not None and key[i] == key[j]
    for _ in range(n):
        near = near @ near
    group = linked([pd.Series(key, dtype=object) for key in found])
    assert ((group[:, None] == group[None, :]) == near).all()
    assert set(group) == set(range(group.max() + 1))


def test_linked_degenerate():
    assert len(linked([])) == 0
    assert len(linked([pd.Series([], dtype=object)])) == 0
    assert linked([pd.Series([None, None])]).tolist() == [0, 1]


def test_translations_copies_and_a_column_stay_together(tmp_path: Path):
    rows = pd.DataFrame(
        {
            "segment_id": ["a", "a", "b", None, None, "c"],
            "lang": ["de", "en", "de", "de", "de", "en"],
            "source": ["x", "x", "y", "z", "z", "y"],
        }
    )
    trace = full_trace(tmp_path / "t.duckdb", np.zeros((6, 1, 1), int), n_experts=2, seq=range(6), sequences=rows)
    assert text_groups(trace).tolist() == [0, 0, 1, 2, 3, 4]
    assert text_groups(trace, "source").tolist() == [0, 0, 1, 2, 2, 1]
    with pytest.raises(InputError, match="no 'topic'"):
        text_groups(trace, "topic")


def test_equal_texts_stay_together_without_a_hash(tmp_path: Path):
    """A trace from arrays has no sha256. Empty sequences, and those of unknown tokens, are equal to nothing."""
    ids = [[5, 6], [7], [5, 6], [6, 5], [7, -1], [7, -1], [], [], [7]]
    seq = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    token_ids = np.concatenate(ids).astype(int)
    experts = np.zeros((len(seq), 1, 1), int)
    given = {"n_experts": 1, "seq": seq, "sequences": pd.DataFrame({"lang": ["de"] * len(ids)})}
    trace = from_arrays(tmp_path / "t.duckdb", experts, token_ids=token_ids, **given)
    assert text_groups(trace).tolist() == [0, 1, 0, 2, 3, 4, 5, 6, 1]
    unknown = from_arrays(tmp_path / "u.duckdb", experts, **given)
    assert text_groups(unknown).tolist() == list(range(len(ids)))


def test_rows_without_a_text_of_their_own_are_not_one_text(tmp_path: Path):
    rows = pd.DataFrame({"segment_id": ["", "", "a", "a"], "sha256": ["x", "", "", "x"]})
    trace = from_arrays(tmp_path / "t.duckdb", np.zeros((4, 1, 1), int), n_experts=1, seq=range(4), sequences=rows)
    assert trace.sequences()["segment_id"].isna().tolist() == [True, True, False, False]
    assert text_groups(trace).tolist() == [0, 1, 0, 0]
    rows = pd.DataFrame({"segment_id": [0, 1]})
    trace = from_arrays(tmp_path / "u.duckdb", np.zeros((2, 1, 1), int), n_experts=1, seq=range(2), sequences=rows)
    assert trace.sequences()["segment_id"].tolist() == ["0", "1"]


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=30, max_size=60),
    st.integers(2, 3),
    st.integers(0, 5),
)
@settings(deadline=None, max_examples=40)
def test_splits_part_the_rows_and_no_text(rows: list[tuple[int, int]], folds: int, seed: int):
    group, value = (np.array(column) for column in zip(*rows, strict=True))
    labels, value = np.unique(value, return_inverse=True)
    found = of(value, [str(label) for label in labels])
    kept = without_rare(found, group, folds)
    assert kept.tolist() == [len(set(group[value == one])) >= folds for one in value]
    found, group = found.only(kept), group[kept]
    if len(found.labels) < 2:
        return
    try:
        parts = splits(found, group, folds, seed)
    except InputError as error:  # a text as large as a fold
        assert "is in a test but not in its training texts" in str(error)
        return
    assert sorted(np.concatenate([part.test for part in parts])) == list(range(len(group)))
    for part in parts:
        assert not set(group[part.train]) & set(group[part.test])
        assert len(part.train) + len(part.test) == len(group)
        assert set(found.value[part.train]) == set(range(len(found.labels)))


def test_numbers_are_split_by_text_too():
    group = np.repeat(np.arange(6), 3)
    found = Target("loss", "token", np.arange(18), np.arange(18.0), [])
    for part in splits(found, group, 3):
        assert not set(group[part.train]) & set(group[part.test])
    with pytest.raises(InputError, match="is 1 everywhere"):
        splits(Target("loss", "token", np.arange(18), np.ones(18), []), group, 3)


def test_a_number_varies_in_every_test():
    number = Target("score", "sequence", np.arange(6), np.arange(6.0), [])
    assert len(splits(number, np.arange(6), 3)) == 3
    with pytest.raises(InputError, match="'score' doesn't vary in a test of 1 row, .* ask for fewer folds"):
        splits(number, np.arange(6), 5)
    half = Target("score", "token", np.arange(6), np.array([1.0, 1, 1, 2, 3, 4]), [])
    with pytest.raises(InputError, match="doesn't vary in a test of 3 rows"):
        splits(half, np.array([0, 0, 0, 1, 1, 1]), 2)


def test_too_little_is_refused():
    two = of(np.array([0, 1, 0, 1]), ["de", "en"])
    with pytest.raises(InputError, match="known for 1 text "):
        splits(two, np.zeros(4, int), 2)
    with pytest.raises(InputError, match="2 texts .* too few for 3 folds"):
        splits(two, np.array([0, 0, 1, 1]), 3)
    with pytest.raises(InputError, match="folds is 1"):
        splits(two, np.arange(4), 1)
    with pytest.raises(InputError, match="is 'de' everywhere"):
        splits(of(np.zeros(4, int), ["de"]), np.arange(4), 2)
    with pytest.raises(InputError, match=r"fewer than 2 texts: 'en' \(1\).*drop-rare"):
        splits(of(np.array([0, 0, 0, 1]), ["de", "en"]), np.arange(4), 2)
