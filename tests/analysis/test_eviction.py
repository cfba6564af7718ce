"""The simulator of all capacities at once, against caches that are filled and emptied one capacity at a time."""

from functools import cache as remember
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_cache import brute

from workbench.analysis.events import Events
from workbench.analysis.eviction import ACCESS, ADMISSION, POLICIES, hits_by_capacity, replay, resident, uses
from workbench.errors import InputError


def stream(runs: list[list[list[int]]], n_experts: int, unit: list[int] | None = None) -> Events:
    """Events from lists: runs of events of experts."""
    flat = [event for run in runs for event in run]
    offsets = np.cumsum([0, *map(len, flat)])
    experts = np.array([expert for event in flat for expert in event], np.int32)
    unit = list(range(len(runs))) if unit is None else unit
    bounds = np.cumsum([0, *map(len, runs)])
    return Events(offsets, experts, bounds, np.array(unit, np.int32), max(unit, default=-1) + 1, n_experts)


def random_runs(random, n_runs=3, n_events=12, n_experts=6, most=3):
    return [
        [
            list(random.permutation(n_experts)[: random.integers(0, most + 1)])
            for _ in range(random.integers(1, n_events))
        ]
        for _ in range(n_runs)
    ]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("admission", ADMISSION)
@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_at_every_capacity(policy, access, admission, keep):
    random = np.random.default_rng(len(policy))
    for _ in range(4):
        runs = random_runs(random)
        events = stream(runs, 6)
        found = replay(events, policy, access=access, admission=admission, keep=keep, span=3, half_life=0.5)
        assert found.accesses.sum() == sum(len(event) for run in runs for event in run)
        largest = max(len(event) for run in runs for event in run)
        tables = {cold: hits_by_capacity(found, cold) for cold in ("miss", "free", "excluded")}
        for capacity in range(1, 7):
            got = {cold: table[0].sum(axis=0)[capacity - 1] for cold, table in tables.items()}
            if access == "token" and admission == "forced" and capacity < largest:
                assert all(np.isnan(value) for value in got.values())
                continue
            hits, free, cold = brute(runs, capacity, policy, access=access, admission=admission, keep=keep)
            assert got == {"miss": hits, "free": hits + free, "excluded": hits}
            assert tables["excluded"][1].sum() == tables["miss"][1].sum() - cold


def test_counts_belong_to_the_run_of_their_unit():
    runs = [[[0, 1], [0]], [[1, 2]], [[2, 1, 0]]]
    apart = replay(stream(runs, 3), "lru", keep=False)
    assert apart.accesses.tolist() == [3, 2, 3] and apart.cold.sum(axis=1).tolist() == [2, 2, 3]
    together = replay(stream(runs, 3, unit=[0, 1, 0]), "lru", keep=False)
    assert np.array_equal(together.depth, apart.depth[[0, 1]] + [apart.depth[2], [0, 0, 0]])
    assert np.array_equal(together.cold[0], apart.cold[0] + apart.cold[2])


def most_hits(events: list[list[int]], capacity: int, n_experts: int, forced: bool) -> int:
    """The most hits of any cache, by trying all contents."""

    @remember
    def best(now: int, held: frozenset) -> int:
        if now == len(events):
            return 0
        needed = frozenset(events[now])
        hits = len(needed & held)
        union = held | needed
        size = min(capacity, len(union))
        contents = (frozenset(kept) for kept in combinations(sorted(union), size))
        return hits + max(best(now + 1, kept) for kept in contents if not forced or needed <= kept)

    return best(0, frozenset())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
def test_belady_is_the_best_possible(seed, most):
    random = np.random.default_rng(seed)
    run = [list(random.permutation(5)[: random.integers(1, most + 1)]) for _ in range(9)]
    events = stream([run], 5)
    for admission in ADMISSION:
        hits, _ = hits_by_capacity(replay(events, "belady", admission=admission))
        for capacity in range(1, 6):
            if np.isfinite(hits[0, capacity - 1]):
                assert hits[0, capacity - 1] == most_hits(run, capacity, 5, admission == "forced")


routing = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 7, 20]), st.integers(1, 3))


def sticky(seed: int, n_experts: int, k: int) -> list[list[list[int]]]:
    """Runs whose experts change slowly."""
    random = np.random.default_rng(seed)
    runs = []
    for _ in range(3):
        taste, run = random.normal(size=n_experts), []
        for _ in range(random.integers(1, 40)):
            taste = 0.9 * taste + random.normal(size=n_experts)
            run.append(list(np.argsort(-taste)[: random.integers(0, min(k, n_experts) + 1)]))
        runs.append(run)
    return runs


@settings(max_examples=40, deadline=None)
@given(routing, st.booleans(), st.sampled_from(ACCESS))
def test_laws(shape, keep, access):
    runs, n_experts = sticky(*shape), shape[1]
    events = stream(runs, n_experts)
    best = {
        admission: hits_by_capacity(replay(events, "belady", access=access, admission=admission, keep=keep))[0].sum(
            axis=0
        )
        for admission in ADMISSION
    }
    ceiling = hits_by_capacity(replay(events, "belady", admission="bypass", keep=keep))[0].sum(axis=0)
    for policy in POLICIES:
        for admission in ADMISSION:
            counts = replay(events, policy, access=access, admission=admission, keep=keep, span=5, half_life=3)
            hits, accesses = hits_by_capacity(counts)
            total = hits.sum(axis=0)
            known = np.isfinite(total)
            assert (np.diff(total[known]) >= 0).all()  # more room, more hits
            if access != "snapshot":  # where Belady's rule isn't the best
                assert (total[known] <= best["bypass"][known]).all()
            if access == "token" or (access == "single" and admission == "forced"):
                assert (total[known] <= best[admission][known]).all()
            if access != "single":
                assert (total[known] <= ceiling[known]).all()
            if known[-1]:  # everything fits: only first touches miss
                assert total[-1] == accesses.sum() - counts.cold.sum()
            compatible, _ = hits_by_capacity(counts, "free")
            assert (compatible.sum(axis=0)[known] >= total[known]).all()


@settings(max_examples=20, deadline=None)
@given(routing, st.sampled_from(POLICIES), st.sampled_from(ACCESS), st.sampled_from(ADMISSION))
def test_names_of_experts_do_not_matter(shape, policy, access, admission):
    runs, n_experts = sticky(*shape), shape[1]
    other = np.random.default_rng(shape[0]).permutation(n_experts)
    renamed = [[[int(other[expert]) for expert in event] for event in run] for run in runs]
    options = {"access": access, "admission": admission, "span": 4, "half_life": 2.5}
    found, same = (replay(stream(each, n_experts), policy, **options) for each in (runs, renamed))
    assert np.array_equal(found.depth, same.depth) and np.array_equal(found.cold, same.cold)


def test_short_windows_are_lru():
    """One token of past, or of future, says nothing about experts that this token doesn't use."""
    events = stream(sticky(3, 9, 3), 9)
    lru = replay(events, "lru").depth
    for policy in ("window", "lookahead"):
        assert np.array_equal(replay(events, policy, span=1).depth[:, 2:], lru[:, 2:])


def test_aged_counts_of_long_streams_keep_their_order():
    """Weights grow until they are scaled down; experts unused for thousands of half-lives keep their order."""
    random = np.random.default_rng(1)
    run = [[int(e)] for e in range(6)] + [[int(random.integers(6, 9))] for _ in range(3000)] + [[0], [1], [5], [2]]
    found = replay(stream([run], 9), "aged-lfu", half_life=0.5)
    exact = replay(stream([run], 9), "lru")  # with so short a life, the last use decides
    assert np.array_equal(found.depth, exact.depth)


def test_resident():
    runs = sticky(5, 7, 3)
    events = stream(runs, 7)
    order = np.array([3, 1, 0, 2, 6, 5, 4])
    hits, accesses = hits_by_capacity(resident(events, order))
    for unit, run in enumerate(runs):
        flat = [expert for event in run for expert in event]
        assert accesses[unit] == len(flat)
        assert uses(events)[unit].tolist() == [flat.count(expert) for expert in range(7)]
        for capacity in range(1, 8):
            assert hits[unit, capacity - 1] == sum(expert in order[:capacity] for expert in flat)


def test_nothing_to_do():
    for runs in ([], [[]], [[[]], [[], []]]):
        for policy in POLICIES:
            found = replay(stream(runs, 3), policy)
            assert found.depth.sum() == found.cold.sum() == 0 and found.undefined == 0
    one = replay(stream([[[0], [0]]], 1), "belady")
    assert one.depth.tolist() == [[1]] and one.cold.tolist() == [[1]]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"policy": "mru"}, "policy is 'mru'; expected one of lru, lfu"),
        ({"access": "batch"}, "access is 'batch'; expected one of token, single, snapshot"),
        ({"admission": "no"}, "admission is 'no'; expected one of forced, bypass"),
        ({"span": 0}, "window of 0"),
        ({"half_life": 0.0}, "half-life of 0.0"),
        ({"half_life": float("nan")}, "half-life of nan"),
    ],
)
def test_refused(options, said):
    with pytest.raises(InputError, match=said):
        replay(stream([[[0]]], 1), options.pop("policy", "lru"), **options)
    with pytest.raises(InputError, match="cold is 'hot'"):
        hits_by_capacity(replay(stream([[[0]]], 1), "lru"), "hot")


def test_larger_caches_hold_what_smaller_ones_hold():
    """Inclusion, on which the single pass rests, seen from outside: hits never move to a deeper place alone."""
    for policy in POLICIES:
        counts = replay(stream(sticky(11, 12, 3), 12), policy, admission="bypass")
        hits = hits_by_capacity(counts)[0].sum(axis=0)
        assert all(smaller <= larger for smaller, larger in pairwise(hits))
