"""Permuted labels: as many of each, whole texts and sequences, another order."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workbench_probes.controls import control_values, permuted


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.integers(0, 4), st.integers(0, 9))
def test_every_value_stays_as_often(sequences: list[int], per_text: int, seed: int):
    sequence = np.array(sequences)
    text = sequence // (per_text + 1)
    value = np.random.default_rng(seed).normal(size=len(sequence))
    result = permuted(value, sequence, text, seed)
    assert result.dtype == value.dtype and sorted(result) == sorted(value)
    np.testing.assert_array_equal(result, permuted(value, sequence, text, seed))


def test_texts_sequences_and_neighbours_stay_together():
    """3 texts of 2 sequences of 5 tokens, every token with a value of its own that says where it is from."""
    value = np.arange(30)
    sequence, text = value // 5, value // 10
    mixed = np.argsort(value % 5, kind="stable")  # rows of a sequence are in order, and apart
    orders, turns, places = set(), set(), set()
    for seed in range(40):
        found = np.empty(30, int)
        found[mixed] = permuted(value[mixed], sequence[mixed], text[mixed], seed)
        for at in range(6):
            own = found[at * 5 : at * 5 + 5]
            assert len(set(own // 5)) == 1 and set(np.diff(own)) <= {1, -4}  # one sequence, turned as a ring
            turns.add(own[0] % 5)
            places.add((at % 2, own[0] // 5 % 2))
        assert (found.reshape(3, 10) // 10 == found.reshape(3, 10)[:, :1] // 10).all()
        orders.add(tuple(found[::10] // 10))
    assert len(orders) == 6 and len(turns) == 5 and len(places) == 4


def test_control_values_go_by_kind():
    kind = np.array([7, 7, 9, 9, 1])
    value = np.array([0, 1, 1, 1, 0])
    result = control_values(value, kind, 0)
    assert result[0] == result[1] and result[2] == result[3] and set(result) <= {0, 1}
