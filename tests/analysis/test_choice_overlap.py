"""Two choices for one token, and chance, against sets in plain Python."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.analysis.choice_overlap import Choices, chances, compare
from workbench.analysis.counting import Cells
from workbench.routing import NO_EXPERT

N_EXPERTS = 7


def one_choice(random: np.random.Generator, n: int, k: int) -> np.ndarray:
    experts = np.argsort(random.random((n, N_EXPERTS)), axis=1)[:, :k].astype(np.uint16)
    experts[random.random(experts.shape) < 0.2] = NO_EXPERT
    experts[random.random(n) < 0.1] = NO_EXPERT
    return experts


def compared(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> tuple[dict, dict]:
    """Measures of each token and chance levels, without weights."""
    n = len(a)
    columns = {name: np.full(n, np.nan) for name in ("overlap", "exact_match", "top1_match", "difference", "shift")}
    none, marks = np.zeros((1, 1), np.float32), np.uint64(1) << np.arange(N_EXPERTS, dtype=np.uint64)
    sizes, first = np.zeros((n, 2), np.uint8), np.full((n, 2), NO_EXPERT)
    hashes = np.zeros((n, 2), np.uint64)
    compare(a, b, none, none, False, marks, *columns.values(), sizes, first, hashes)
    order = np.sort(np.unique(group[group >= 0]))
    cells = Cells(
        labels=[str(label) for label in order], group=order.astype(np.int32), text=np.zeros(len(order), np.int32),
        strata=None, of_token=group.astype(np.int32), n_tokens=order, n_sequences=order, n_texts=order, n_unlabelled=0,
    )  # fmt: skip
    return columns, chances(Choices(a, b, columns, sizes, first, hashes), cells, N_EXPERTS)


def chosen(row: np.ndarray) -> list[int]:
    return [int(expert) for expert in row if expert != NO_EXPERT]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 5), st.integers(1, 12))
def test_against_sets(seed, k, other_k, n):
    random = np.random.default_rng(seed)
    a, b = one_choice(random, n, k), one_choice(random, n, other_k)
    group = random.integers(-1, 2, n)
    group[random.integers(n)], group[0] = 1, 0
    columns, chance = compared(a, b, group)

    def values(x, y) -> list[float] | None:
        s, t = chosen(x), chosen(y)
        if not s and not t:
            return None
        return [len(set(s) & set(t)) / max(len(s), len(t)), float(set(s) == set(t)), float(s[:1] == t[:1])]

    for token in range(n):
        expected = values(a[token], b[token])
        found = [columns[name][token] for name in ("overlap", "exact_match", "top1_match")]
        assert np.isnan(found).all() if expected is None else found == pytest.approx(expected)
    for label in sorted(set(group[group >= 0])):
        used = [t for t in range(n) if group[t] == label and (chosen(a[t]) or chosen(b[t]))]
        pairs = [values(a[i], b[j]) for i in used for j in used if i != j]
        means = np.mean([pair for pair in pairs if pair], axis=0) if any(pairs) else [np.nan] * 3
        place = sorted(set(group[group >= 0])).index(label)
        assert [chance[name][place] for name in chance] == pytest.approx(list(means), nan_ok=True, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9))
def test_laws(seed):
    """Symmetric, blind to the names of experts, 1 for a run with itself, 0 for runs without an expert in common."""
    random = np.random.default_rng(seed)
    a, b = one_choice(random, 20, 3), one_choice(random, 20, 3)
    group = np.zeros(20, int)
    names = np.append(random.permutation(N_EXPERTS), np.zeros(NO_EXPERT - N_EXPERTS, int)).astype(np.uint16)
    names = np.append(names, NO_EXPERT)
    there, back, renamed, same = (compared(x, y, group) for x, y in ((a, b), (b, a), (names[a], names[b]), (a, a)))
    for name in ("overlap", "exact_match", "top1_match"):
        np.testing.assert_array_equal(there[0][name], renamed[0][name])
        np.testing.assert_allclose(there[0][name], back[0][name])
        np.testing.assert_allclose(there[1][name], back[1][name])
        np.testing.assert_allclose(there[1][name], renamed[1][name])
        assert np.nanmin(same[0][name]) == 1
    low, high = a.copy(), a.copy()
    low[a != NO_EXPERT] %= 3
    high[a != NO_EXPERT] = 3 + high[a != NO_EXPERT] % 4
    apart, chance = compared(low, high, group)
    assert np.nanmax(apart["overlap"]) == 0 and chance["overlap"][0] == 0
