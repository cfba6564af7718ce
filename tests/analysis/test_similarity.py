"""Likeness of experts' weights against loops; gate regression and expert map against SciPy and scikit-learn."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import tiny
from scipy.stats import kendalltau, linregress
from sklearn.decomposition import PCA

from workbench.analysis.expert_map import expert_map, principal
from workbench.analysis.gate_regression import fit, gate_regression, resample
from workbench.analysis.similarity import match_matrices, shuffle_width, similarity
from workbench.errors import InputError
from workbench.experts import numbers, read, reorder_neurons
from workbench.neurons import best_order, cosine, match

# The package's own names are the functions.
map_file, regression_file, similarity_file = (
    import_module(f"workbench.analysis.{name}") for name in ("expert_map", "gate_regression", "similarity")
)
SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 4, "hidden_size": 16, "head_dim": 4}
QUICK = {"n_chance": 3}


def small(family: str = "olmoe", **changes: Any) -> Any:
    return tiny.model(family, **(SMALL | changes))


def length(values: Any) -> float:
    return float(sum(float(x) ** 2 for x in values)) ** 0.5


def angle(a: Any, b: Any) -> float:
    a, b = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
    return sum(x * y for x, y in zip(a, b, strict=True)) / (length(a) * length(b))


def parts(weights: Any, expert: int) -> dict[str, np.ndarray]:
    """Matrices with a row a neuron, and all of them side by side."""
    found = {name: numbers(matrix[expert]) for name, matrix in weights.matrices.items()}
    return found | {"all": np.concatenate(list(found.values()), axis=1)}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_similarity_against_loops(family: str):
    """4 experts of 4 neurons: every pair, every matrix, all 24 orders of neurons."""
    model = small(family)
    frame = similarity(model, **QUICK)
    layer = model.layers[-1]
    weights = read(layer)
    rows = numbers(weights.router)
    part = frame[frame["layer"] == layer.index].set_index(["expert", "other", "matrix"])
    n = weights.n_experts
    assert len(part) == n * (n - 1) // 2 * 4 and set(part["n_experts"]) == {n}
    for a, b in itertools.combinations(range(n), 2):
        for name in ("gate", "up", "down", "all"):
            first, second = parts(weights, a)[name], parts(weights, b)[name]
            row = part.loc[(a, b, name)]
            assert row["cosine"] == pytest.approx(angle(first, second), abs=1e-5)
            assert row["mean_cosine"] == pytest.approx(angle(first.mean(0), second.mean(0)), abs=1e-4)
            assert row["router_cosine"] == pytest.approx(angle(rows[a], rows[b]), abs=1e-5)
            orders = list(itertools.permutations(range(4)))
            best = max(orders, key=lambda o: sum(angle(first[i], second[j]) for i, j in enumerate(o)))
            assert row["matched_cosine"] == pytest.approx(angle(first, second[list(best)]), abs=1e-5)
            assert row["kendall"] == pytest.approx(kendalltau(best, range(4))[0])


def test_experts_without_a_gate():
    frame = similarity(tiny.model("nemotron_h"), layers=(0,), n_matched=0, n_chance=0)
    assert set(frame["matrix"]) == {"up", "down", "all"} and set(frame["layer"]) == {0}
    assert frame[["matched_cosine", "kendall", "chance_matched"]].isna().all(axis=None)


def test_reordered_copy_is_found():
    """Expert 1 becomes expert 0 with its neurons shuffled: unlike as it is, the same once matched."""
    model = small(intermediate_size=32)
    weights = read(model.layers[0])
    for part in weights.neuron_parts:
        part[1] = part[0]
    order = np.random.default_rng(0).permutation(32)
    reorder_neurons(weights, 1, order)
    frame = similarity(model, layers=(0,), n_chance=20).set_index(["expert", "other", "matrix"])
    copied: Any = frame.sort_index().loc[(0, 1)]
    assert (copied["matched_cosine"] > 0.99999).all() and (copied["mean_cosine"] > 0.99999).all()
    assert (copied["cosine"] < 0.5).all() and (copied["matched_cosine"] > copied["chance_matched_high"]).all()
    assert copied.loc["all", "kendall"] == pytest.approx(kendalltau(np.argsort(order), np.arange(32))[0])


def test_random_experts_are_as_alike_as_chance():
    """Random weights: matched cosines lie where shuffled ones lie, in nine tenths of pairs at least."""
    frame = similarity(tiny.model("olmoe"), n_chance=60)
    whole = frame[frame["matrix"] == "all"]
    assert (whole["matched_cosine"] > 0.1).all()  # matching finds likeness anywhere
    assert whole["matched_cosine"].mean() == pytest.approx(whole["chance_matched"].mean(), abs=0.01)
    assert 0.0 <= (whole["matched_cosine"] > whole["chance_matched_high"]).mean() < 0.2
    assert abs(whole["kendall"].mean()) < 0.05 and abs(whole["cosine"].mean()) < 0.02


def test_match_is_the_best_order():
    random = np.random.default_rng(0)
    for _ in range(10):
        similarity_of = random.normal(size=(5, 5))
        order = best_order(similarity_of)
        best = max(sum(similarity_of[i, j] for i, j in enumerate(o)) for o in itertools.permutations(range(5)))
        assert similarity_of[np.arange(5), order].sum() == pytest.approx(best)
        rows = random.normal(size=(6, 9))
        shuffled = random.permutation(6)
        assert np.array_equal(match(rows, rows[shuffled]), np.argsort(shuffled))
    assert np.isnan(cosine(np.zeros(3), np.ones(3)))


def test_matching_with_neurons_of_zeros():
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    found = match_matrices(rows, np.zeros_like(rows), 2)
    assert np.isnan(found[:, [0, 2, 3]]).all()
    assert np.isnan(match_matrices(rows[:1], rows[:1], 2)[0, 1])  # one neuron has no order
    rows[2] = 0
    assert np.allclose(match_matrices(rows, rows[[2, 0, 3, 1]], 2)[:, 0], 1)


def test_shuffled_width_keeps_an_expert_apart():
    rows = np.random.default_rng(0).normal(size=(4, 15))
    shuffled = shuffle_width(rows, 3, np.random.default_rng(1))
    order = np.random.default_rng(1).permutation(5)
    for matrix in range(3):
        assert np.array_equal(shuffled[:, 5 * matrix : 5 * matrix + 5], rows[:, 5 * matrix : 5 * matrix + 5][:, order])


def test_drawn_pairs_and_seeds():
    model = tiny.model("olmoe")
    few = similarity(model, n_matched=5, n_chance=2)
    assert few.groupby(["layer", "matrix"])["matched_cosine"].count().eq(5).all()
    every = similarity(model, n_matched=100, n_chance=2)
    both = few["matched_cosine"].notna()
    assert np.allclose(few.loc[both, "matched_cosine"], every.loc[both, "matched_cosine"])
    assert few.equals(similarity(model, n_matched=5, n_chance=2))
    assert not few["matched_cosine"].equals(similarity(model, n_matched=5, n_chance=2, seed=1)["matched_cosine"])


def test_similarity_of_zeros_and_of_one_expert():
    model = small()
    for part in read(model.layers[0]).neuron_parts:
        part[2] = 0
    frame = similarity(model, layers=(0,), **QUICK)
    zero = (frame["expert"] == 2) | (frame["other"] == 2)
    assert frame.loc[zero, ["cosine", "mean_cosine", "matched_cosine"]].isna().all(axis=None)
    assert frame.loc[~zero, "cosine"].notna().all()
    similarity_file.figure(frame)
    assert similarity_file.findings(frame)
    with pytest.raises(InputError, match="has two experts to compare"):
        similarity(small(num_experts=1, num_experts_per_tok=1))


@pytest.mark.parametrize("ask", [similarity, gate_regression, expert_map])
def test_layers_and_families_that_can_not_be_asked_for(ask: Any):
    with pytest.raises(InputError, match="layer 3 doesn't exist; the model has 3"):
        ask(small(), layers=(0, 3))
    with pytest.raises(InputError, match="switch_transformers.*can't be read as matrices"):
        ask(tiny.model("switch_transformers"))


def test_numbers_of_pairs():
    with pytest.raises(InputError, match="n_matched is -1 and n_chance 5"):
        similarity(small(), n_matched=-1, n_chance=5)


def test_figure_and_findings_of_similarity():
    frame = similarity(small(), **QUICK)
    drawn: Any = similarity_file.figure(frame)
    assert {line.name for line in drawn.data} >= {"gate", "up", "down", "all"}
    assert "With neurons matched" in similarity_file.findings(frame)[1]
    bare = similarity(small(), n_matched=0, n_chance=0)
    similarity_file.figure(bare)
    assert len(similarity_file.findings(bare)) == 1


# -- gate regression -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cosine", "mean_cosine"])
def test_regression_against_scipy(measure: str):
    model = tiny.model("olmoe")
    frame = gate_regression(model, measure=measure, n_resamples=50, n_permutations=50)
    assert set(frame["measure"]) == {measure} and set(frame["n_pairs"]) == {28}
    for layer in model.layers:
        weights = read(layer)
        rows = numbers(weights.router)
        for name in ("gate", "up", "down", "all"):
            x, y = [], []
            for a, b in itertools.combinations(range(8), 2):
                first, second = parts(weights, a)[name], parts(weights, b)[name]
                x.append(angle(first, second) if measure == "cosine" else angle(first.mean(0), second.mean(0)))
                y.append(angle(rows[a], rows[b]))
            expected: Any = linregress(x, y)
            row = frame[(frame["layer"] == layer.index) & (frame["matrix"] == name)].iloc[0]
            assert row["slope"] == pytest.approx(expected.slope, rel=1e-3, abs=1e-3)
            assert row["intercept"] == pytest.approx(expected.intercept, abs=1e-4)
            assert row["r2"] == pytest.approx(expected.rvalue**2, abs=1e-4)
            assert row["mean_expert_cosine"] == pytest.approx(np.mean(x), abs=1e-4)
            assert row["low"] <= row["high"] and 0 <= row["r2_low"] <= row["r2_high"] <= 1


def test_resamples_against_loops():
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(5, 5)) for _ in range(2))
    x, y = x + x.T, y + y.T
    counts = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 1, 1], [0, 3, 0, 1, 1], [5, 0, 0, 0, 0]], np.float32)
    found = resample(x, y, counts)
    for at, count in enumerate(counts[:3]):
        drawn = [expert for expert in range(5) for _ in range(int(count[expert]))]
        pairs = [(a, b) for a, b in itertools.combinations(drawn, 2) if a != b]
        expected: Any = linregress([x[p] for p in pairs], [y[p] for p in pairs])
        assert found[0, at] == pytest.approx(expected.slope) and found[1, at] == pytest.approx(expected.rvalue**2)
    assert np.isnan(found[:, 3]).all()


def test_planted_regression_is_found_and_noise_is_not():
    """Router rows that are the experts' own averages, and random ones: p small, and uniform."""
    model = tiny.model("olmoe", num_experts=16, intermediate_size=4)
    for layer in model.layers:
        weights = read(layer)
        shared = np.random.default_rng(layer.index).normal(size=(4, 64)).astype(np.float32)
        for expert in range(16):  # experts of four kinds, in weights and in router
            weights.up[expert] += 2 * read(layer).up.new_tensor(shared[expert % 4])
            weights.router[expert] = weights.router.new_tensor(shared[expert % 4]) + 0.3 * weights.router[expert]
    frame = gate_regression(model, n_resamples=50, n_permutations=200)
    planted = frame[frame["matrix"] == "up"]
    assert (planted["q"] < 0.05).all() and (planted["slope"] > 0).all() and (planted["r2"] > 0.5).all()
    assert "in 3 of 3 layers" in regression_file.findings(frame)[0]
    p = np.concatenate(
        [gate_regression(tiny.model("olmoe", seed=s), n_resamples=0, n_permutations=99)["p"] for s in range(4)]
    )
    assert (p < 0.05).mean() < 0.2 and p.min() >= 0.01


def test_regression_of_few_experts():
    frame = gate_regression(small(num_experts=2, num_experts_per_tok=1))
    assert frame[["slope", "low", "r2", "p", "q"]].isna().all(axis=None) and set(frame["n_pairs"]) == {1}
    assert regression_file.findings(frame) == ["No layer has enough different experts for a regression."]
    regression_file.figure(frame)
    alone = gate_regression(small(num_experts=1, num_experts_per_tok=1))
    assert set(alone["n_pairs"]) == {0} and alone["mean_expert_cosine"].isna().all()
    assert np.isnan(fit(np.ones(4), np.arange(4.0))).all()


def test_regression_without_resamples():
    frame = gate_regression(small(), n_resamples=0, n_permutations=0)
    assert frame[["low", "high", "p", "q"]].isna().all(axis=None) and frame["r2"].notna().all()
    regression_file.figure(frame)
    assert regression_file.findings(frame)
    with pytest.raises(InputError, match="measure is 'angle'"):
        gate_regression(small(), measure="angle")


# -- expert map ------------------------------------------------------------------------------------------------------


def test_map_against_scikit_learn():
    model = tiny.model("olmoe")
    frame = expert_map(model)
    for layer in model.layers:
        weights = read(layer)
        for name in ("gate", "up", "down", "all"):
            points = np.array([parts(weights, expert)[name].ravel() for expert in range(8)], float)
            pca = PCA(2, svd_solver="full").fit(points)
            expected = pca.transform(points)
            expected *= np.sign(expected[np.abs(expected).argmax(0), [0, 1]])
            part = frame[(frame["layer"] == layer.index) & (frame["matrix"] == name)]
            assert np.allclose(part[["x", "y"]], expected, atol=1e-3)
            assert np.allclose(part[["x_share", "y_share"]].iloc[0], pca.explained_variance_ratio_, atol=1e-4)
            assert np.allclose(part["norm"], np.linalg.norm(points, axis=1), rtol=1e-4)
    assert frame["even_share"].iloc[0] == pytest.approx(1 / 7)
    drawn: Any = map_file.figure(frame)
    assert len({panel.xaxis for panel in drawn.data}) == 3
    assert "times an even share" in map_file.findings(frame)[0]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_map_of_few_experts(n: int):
    frame = expert_map(small(num_experts=n, num_experts_per_tok=1))
    assert np.isfinite(frame[["x", "y"]]).all(axis=None)
    if n == 1:
        assert (frame[["x", "y"]] == 0).all(axis=None) and frame["x_share"].isna().all()
    if n == 2:
        assert np.allclose(frame["x_share"], 1) and (frame["y"] == 0).all()
    map_file.figure(frame)
    assert map_file.findings(frame)


def test_map_of_equal_points():
    places, shares = principal(np.full((5, 5), 3.0))
    assert (places == 0).all() and np.isnan(shares).all()
