"""Predictors of experts against loops over tokens."""

import numpy as np
import pandas as pd
import pytest
from routed import WHOLE, Routed, full_trace, numbered, random_trace, write

from workbench.analysis.cache import cache
from workbench.analysis.hit_rates import halves
from workbench.analysis.prefetch import figure, findings, prefetch
from workbench.errors import InputError


@pytest.fixture(scope="module")
def routed(tmp_path_factory) -> Routed:
    path = tmp_path_factory.mktemp("prefetch") / "t.duckdb"
    return random_trace(path, n_texts=5, languages=("en", "de"), n_experts=7, n_layers=3, dropped=0.2)


@pytest.fixture(scope="module")
def ahead(tmp_path_factory):
    """A trace with lookahead that is right about half of the time."""
    random = np.random.default_rng(3)
    experts = np.argsort(random.random((60, 3, 6)), axis=2)[..., :2]
    guesses = [np.argsort(random.random((60, 6)), axis=1)[:, :2] for _ in range(2)]
    for layer, guess in enumerate(guesses):
        guess[::2] = experts[::2, layer + 1]
    seq = np.repeat(np.arange(6), 10)
    sequences = pd.DataFrame({"lang": ["en"] * 6})
    path = tmp_path_factory.mktemp("ahead") / "t.duckdb"
    return (
        full_trace(path, experts, n_experts=6, seq=seq, sequences=sequences, lookahead=guesses),
        experts,
        guesses,
        seq,
    )


def chosen(row) -> list[int]:
    return [int(expert) for expert in row if expert >= 0]


def name_all(experts: np.ndarray, seq: np.ndarray, unit: np.ndarray, layer: int, predictor: str, seed: int) -> list:
    """What a predictor names for every token, likeliest first."""
    side = halves(int(unit.max()) + 1, seed)[unit][seq]
    n_experts, n_tokens, named = int(experts.max()) + 1, len(seq), []
    for token in range(n_tokens):
        learnt = [other for other in range(n_tokens) if side[other] != side[token]]
        if predictor == "frequent":
            counts = [sum(e in experts[other, layer] for other in learnt) for e in range(n_experts)]
            named.append(sorted(range(n_experts), key=lambda e: -counts[e]))
        elif predictor == "previous":
            found: list[int] = []
            for other in range(token - 1, -1, -1):
                if seq[other] == seq[token]:
                    found += [e for e in chosen(experts[other, layer]) if e not in found]
            named.append(found)
        else:
            used = chosen(experts[token, layer - 1])
            score = np.zeros(n_experts)
            for first in used:
                with_it = [other for other in learnt if first in experts[other, layer - 1]]
                for e in range(n_experts):
                    score[e] += sum(e in experts[other, layer] for other in with_it) / max(len(with_it), 1)
            named.append(sorted(range(n_experts), key=lambda e: -round(score[e], 9)) if used else [])
    return named


def expected(experts: np.ndarray, layer: int, named: list, budget: int, capacity: int) -> dict[str, float]:
    """The columns of a row, by a loop over tokens."""
    n_named = n_right = n_needed = n_cached = n_covered = n_loads = n_useless = 0
    recent: list[int] = []
    for token in range(len(experts)):
        need, say, held = set(chosen(experts[token, layer])), set(named[token][:budget]), set(recent[:capacity])
        n_needed, n_named, n_right = n_needed + len(need), n_named + len(say), n_right + len(need & say)
        n_cached, n_covered = n_cached + len(need & held), n_covered + len(need & (held | say))
        n_loads, n_useless = n_loads + len(say - held), n_useless + len(say - held - need)
        for e in chosen(experts[token, layer]):
            recent = [e, *(other for other in recent if other != e)]
    return {
        "recall": n_right / n_needed, "precision": n_right / n_named, "cached": n_cached / n_needed,
        "covered": n_covered / n_needed, "loads": n_loads / len(experts),
        "useless": n_useless / n_loads if n_loads else np.nan, "named": n_named, "needed": n_needed, "right": n_right,
    }  # fmt: skip


@pytest.mark.parametrize("predictor", ["affinity", "previous", "frequent"])
def test_against_loop(routed, predictor):
    frame = prefetch(routed.trace, ratios=(0.5, 1.0, 2.0), capacity=3, n_resamples=20, seed=4)
    unit = np.arange(10) // 2
    part = numbered(frame[frame["predictor"] == predictor]).set_index(["layer", "ratio"])
    total = {budget: np.zeros(3) for budget in (1, 2, 4)}
    for layer in range(1 if predictor == "affinity" else 0, 3):
        named = name_all(routed.experts, routed.seq, unit, layer, predictor, 4)
        for ratio, budget in ((0.5, 1), (1.0, 2), (2.0, 4)):
            found = part.loc[(layer, ratio)]
            assert found["budget"] == budget
            want = expected(routed.experts[:], layer, named, budget, 3)
            assert {name: found[name] for name in want} == pytest.approx(want, nan_ok=True)
            if layer:
                total[budget] += [want["right"], want["needed"], want["named"]]
    for ratio, budget in ((0.5, 1), (1.0, 2), (2.0, 4)):
        right, needed, said = total[budget]
        assert part.loc[(WHOLE, ratio), "recall"] == pytest.approx(right / needed)
        assert part.loc[(WHOLE, ratio), "precision"] == pytest.approx(right / said)
    for value in ("recall", "precision", "covered"):
        assert (part[f"{value}_low"] <= part[value] + 1e-9).all() and (
            part[value] <= part[f"{value}_high"] + 1e-9
        ).all()
    pd.testing.assert_frame_equal(
        frame, prefetch(routed.trace, ratios=(2.0, 1.0, 0.5), capacity=3, n_resamples=20, seed=4)
    )


def test_lookahead_against_loop(ahead):
    trace, experts, guesses, seq = ahead
    frame = prefetch(trace, ratios=(0.5, 1.0, 2.0), n_resamples=20)
    assert list(dict.fromkeys(frame["predictor"])) == ["previous", "frequent", "lookahead", "affinity"]
    part = numbered(frame[frame["predictor"] == "lookahead"]).set_index(["layer", "ratio"])
    assert set(part.index) == {(layer, ratio) for layer in (1, 2, WHOLE) for ratio in (0.5, 1.0)}  # no more than k
    for layer in (1, 2):
        named = [list(map(int, row)) for row in guesses[layer - 1]]
        for ratio, budget in ((0.5, 1), (1.0, 2)):
            want = expected(experts, layer, named, budget, 4)
            found = part.loc[(layer, ratio)]
            assert {name: found[name] for name in want} == pytest.approx(want)
    assert float(part.loc[(WHOLE, 1.0), "recall"]) > 0.5 and "lookahead finds" in findings(frame)[0]
    figure(frame)
    only = prefetch(trace, predictors=("lookahead",), ratios=(2.0,), n_resamples=0)
    assert (only["budget"] == 4).all() and (only["named"] == [120, 120, 240]).all()  # all it knows


def test_cached_is_the_hit_rate_of_lru(routed):
    frame = prefetch(routed.trace, capacity=5, n_resamples=0)
    rates = cache(routed.trace, policies=("lru",), capacities=(5,), n_resamples=0).set_index("layer")["hit_rate"]
    for layer in range(3):
        assert np.allclose(frame.loc[frame["layer"] == layer, "cached"], rates[layer])


def test_planted_affinity_is_found_and_noise_is_not(tmp_path):
    random = np.random.default_rng(0)
    first = random.integers(0, 8, 2000)
    experts = np.stack([first, (first * 3) % 8, random.integers(0, 8, 2000)], axis=1)[:, :, None]
    sequences = pd.DataFrame({"lang": ["en"] * 20})
    trace = write(tmp_path / "t.duckdb", experts, np.repeat(np.arange(20), 100), sequences, 8).trace
    frame = prefetch(trace, ratios=(1.0,), n_resamples=200).set_index(["predictor", "layer"])
    assert frame.loc[("affinity", 1), "recall"] == 1 and frame.loc[("affinity", 1), "precision"] == 1
    low, high = (float(frame.loc[("affinity", 2), name]) for name in ("recall_low", "recall_high"))
    assert low - 0.02 < 1 / 8 < high + 0.02
    assert float(frame.loc[("previous", 1), "recall"]) < 0.2


@pytest.mark.parametrize("n_experts, k, n_tokens", [(1, 1, 5), (4, 4, 3), (300, 2, 40), (3, 1, 1)])
def test_extremes(tmp_path, n_experts, k, n_tokens):
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((n_tokens, 1, n_experts)), axis=2)[..., :k]
    routed = write(tmp_path / "t.duckdb", experts, np.zeros(n_tokens, int), pd.DataFrame({"lang": ["en"]}), n_experts)
    frame = prefetch(routed.trace, n_resamples=5)
    assert set(frame["predictor"]) == {"previous"} and frame["recall_low"].isna().all()  # one text, one layer
    figure(frame)
    assert findings(frame)
    with pytest.raises(InputError, match="nothing to predict from: affinity, frequent"):
        prefetch(routed.trace, predictors=("affinity", "frequent"))


def test_nothing_chosen(tmp_path):
    routed = write(tmp_path / "t.duckdb", np.full((3, 2, 2), -1), [0, 0, 1], pd.DataFrame({"lang": ["en", "de"]}), 4)
    frame = prefetch(routed.trace)
    assert frame["recall"].isna().all() and "Nothing could be predicted" in findings(frame)[0]
    figure(frame)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"predictors": ("lookahead",)}, "lookahead was not recorded.*trace again with --record ids,lookahead"),
        ({"predictors": ("oracle",)}, "predictor is 'oracle'; expected one of lookahead"),
        ({"predictors": ()}, "at least one predictor"),
        ({"ratios": (0.0,)}, "ratios above 0"),
        ({"capacity": 1}, "capacity is 1; a token needs up to 2"),
    ],
)
def test_refused(routed, options, said):
    with pytest.raises(InputError, match=said):
        prefetch(routed.trace, **options)
